"""The settings that a run directory keeps."""

import dataclasses
from pathlib import Path

from common.errors import UsageError
from common.settings import Settings, from_mapping, read_yaml
from ssl_core.training.old_settings import upgraded

CONFIG = "config.yaml"


def require_run(path: Path) -> None:
    """Check that a run was started in a directory.

    Raises:
        UsageError: there is none.
    """
    if not (path / CONFIG).is_file():
        raise UsageError(f"{path}: no run is there ({CONFIG} is missing)")


def stored_settings(kind: type[Settings], path: Path) -> Settings:
    """Read the settings a run was started with.

    Args:
        kind: dataclass of the settings.
        path: the run directory.

    Raises:
        UsageError: no run is there, or its settings are unknown to this version.
    """
    require_run(path)
    known = {field.name for field in dataclasses.fields(kind)} | set(getattr(kind, "SHORT", {}))  # type: ignore[arg-type]
    return from_mapping(
        kind, upgraded(read_yaml(path / CONFIG), frozenset(known)), str(path / CONFIG)
    )
