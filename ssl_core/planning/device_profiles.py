"""Reads device profiles by name, from `device_profiles.yaml` or a user's file.

`device_profiles.yaml` documents the figures and their sources. `auto` is this machine, read live.
"""

from importlib import resources
from pathlib import Path
from typing import Any

from common.command import nearest
from common.errors import UsageError
from common.settings import from_mapping, read_yaml
from ssl_core.planning.device import AUTO, DeviceProfile
from ssl_core.planning.this_machine import this_machine


def read_profiles(path: Path) -> dict[str, DeviceProfile]:
    """Read a file in the format of `device_profiles.yaml`.

    Raises:
        UsageError: the file is unreadable, has an unknown key, or an impossible figure.
    """
    return {
        str(name): _profile(str(name), values, f"{path}: {name}")
        for name, values in read_yaml(path).items()
    }


def known_profiles(extra: Path | None = None) -> dict[str, DeviceProfile]:
    """Read the packaged profiles and those of a user's file, which override them.

    Raises:
        UsageError: see `read_profiles`; or a user's profile is named `auto`.
    """
    packaged = {name: _profile(name, values, name) for name, values in _packaged().items()}
    return packaged | _of_user(extra)


def find_profile(name: str, extra: Path | None = None) -> DeviceProfile:
    """Find a device by name; `auto` is this machine.

    A name may leave out what follows a hyphen if only one device begins so: `h100` for `h100-80gb`.

    Raises:
        UsageError: no such device; the message names the nearest.
        DataError: this machine's limits cannot be read.
    """
    own = _of_user(extra)
    if name == AUTO:
        return this_machine()
    if name in own:
        return own[name]
    packaged = _packaged()
    alike = [each for each in packaged if each.startswith(f"{name}-")]
    if len(alike) == 1 and name not in packaged:
        name = alike[0]
    if name not in packaged:
        names = [AUTO, *(packaged | own)]
        raise UsageError(f"no device '{name}'{nearest(name, names)} (known: {', '.join(names)})")
    return _profile(name, packaged[name], name)  # checking them all takes a board a second


def _packaged() -> dict[str, Any]:
    """The packaged profiles by name, as they are in the file."""
    with resources.as_file(resources.files(__package__) / "device_profiles.yaml") as path:
        return read_yaml(path)


def _of_user(path: Path | None) -> dict[str, DeviceProfile]:
    if path is None:
        return {}
    profiles = read_profiles(path)
    if AUTO in profiles:
        raise UsageError(f"{path}: '{AUTO}' is this machine; give the device another name")
    return profiles


def _profile(name: str, values: object, where: str) -> DeviceProfile:
    if not isinstance(values, dict):
        raise UsageError(f"{where}: a device is a mapping of figures, not '{values}'")
    return from_mapping(DeviceProfile, {"name": name, **values}, where)
