"""Devices by name: what memory they have, and what of it is left for training.

`device_profiles.yaml` documents the figures and says where each is from. `auto` is this machine,
read live.
"""

import dataclasses
import typing
from importlib import resources
from pathlib import Path
from typing import Any

from common.command import nearest
from common.errors import UsageError
from common.settings import read_yaml
from common.units import parse_size
from ssl_core.planning.device import AUTO, SIZES, DeviceProfile
from ssl_core.planning.step_plan import Precision
from ssl_core.planning.this_machine import this_machine


def read_profiles(path: Path) -> dict[str, DeviceProfile]:
    """The profiles in a file of the form of `device_profiles.yaml`.

    Raises:
        UsageError: unreadable, an unknown key (the nearest is named), or an impossible figure.
    """
    return {
        str(name): _profile(str(name), values, f"{path}: {name}")
        for name, values in read_yaml(path).items()
    }


def known_profiles(extra: Path | None = None) -> dict[str, DeviceProfile]:
    """The packaged profiles, and those of a user's file, which come first where names agree.

    Raises:
        UsageError: see `read_profiles`; a user's profile named `auto`.
    """
    with resources.as_file(resources.files(__package__) / "device_profiles.yaml") as path:
        profiles = read_profiles(path)
    if extra is not None:
        profiles |= read_profiles(extra)
    if AUTO in profiles:
        raise UsageError(f"{extra}: '{AUTO}' is this machine; give the device another name")
    return profiles


def find_profile(name: str, extra: Path | None = None) -> DeviceProfile:
    """The device of that name; `auto` is this machine.

    Raises:
        UsageError: no such device; the nearest is named.
        DataError: this machine's limits cannot be read.
    """
    profiles = known_profiles(extra)
    if name == AUTO:
        return this_machine()
    if name not in profiles:
        names = [AUTO, *profiles]
        raise UsageError(
            f"no device '{name}': choose from {', '.join(names)}{nearest(name, names)}"
        )
    return profiles[name]


def _profile(name: str, values: object, where: str) -> DeviceProfile:
    if not isinstance(values, dict):
        raise UsageError(f"{where}: a device is a mapping of figures, not '{values}'")
    fields = {field.name: field for field in dataclasses.fields(DeviceProfile)}
    del fields["name"]
    for key in values:
        if key not in fields:
            raise UsageError(f"{where}: unknown figure '{key}'{nearest(str(key), list(fields))}")
    required = [
        key
        for key, field in fields.items()
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    ]
    missing = [key for key in required if values.get(key) is None]
    if missing:
        raise UsageError(f"{where}: missing {', '.join(missing)}")
    chosen: dict[str, Any] = {"name": name}
    for key, value in values.items():
        chosen[key] = _value(key, value, f"{where}: {key}")
    profile = DeviceProfile(**chosen)
    try:
        profile.validate()
    except UsageError as error:
        raise UsageError(f"{where}: {error}") from None
    return profile


def _value(key: str, value: Any, where: str) -> Any:
    if key in SIZES:
        if str(value).strip() == "0":
            return 0
        try:
            return parse_size(value)
        except UsageError as error:
            raise UsageError(f"{where}: {error}") from None
    if key == "precisions":
        known = typing.get_args(Precision)
        items = value if isinstance(value, list) else [value]
        for item in items:
            if item not in known:
                raise UsageError(f"{where}: '{item}' is not one of {', '.join(known)}")
        return tuple(items)
    if key == "sources":
        if not isinstance(value, dict):
            raise UsageError(f"{where}: a mapping of figures to texts, not '{value}'")
        return {str(name): str(text) for name, text in value.items()}
    if key == "accelerator" and value not in ("cpu", "cuda"):
        raise UsageError(f"{where}: '{value}' is not one of cpu, cuda")
    kinds = {"shared": bool, "share": float, "times_faster": float, "cores": int}
    kind = kinds.get(key, str)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise UsageError(f"{where}: '{value}' is not of type {kind.__name__}")
    return value
