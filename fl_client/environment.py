"""Environment variables that keep Flower and Ray from calling home. Set before either is imported.

`eval "$(python -m fl_client.environment)"` sets them in a shell, for `flower-superlink` and `flwr`.
"""

import os

QUIET = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}
"""Telemetry, update checks, dependency downloads on the device, Ray's usage statistics."""


def be_quiet() -> None:
    """Set each variable that the user has not set."""
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)


if __name__ == "__main__":
    for name, value in QUIET.items():
        print(f"export {name}={value}")
