"""Environment variables of Ray, which reads most of them when it is imported."""

import os
import secrets
import sys

from common.errors import ShortwaveError

_TOKEN = "RAY_AUTH_TOKEN"
_OWN = {
    # Without this a raylet kills workers while other programs fill the memory. Plans bound ours.
    "RAY_memory_monitor_refresh_ms": "0",
    # Ray's workers have niceness 15: beside other work they would get next to no processor time.
    "RAY_worker_niceness": "0",
    "RAY_raylet_start_wait_time_s": "45",  # then Ray does not start
    # Agents look for a control store that has been killed for so long before they end.
    "RAY_gcs_rpc_server_reconnect_timeout_s": "15",
}
_made = ""
"""The token of this process' own Ray."""


def prepare_own_ray() -> None:
    """Set what a Ray of our own needs; call it before Ray is imported.

    Ray listens on all interfaces, and who reaches its ports can run code. Its own processes
    therefore have to show a random token, which only this process and its children know.

    Raises:
        ShortwaveError: Ray has been imported without a token.
    """
    global _made
    if not _made:
        if "ray" in sys.modules:
            raise ShortwaveError(
                "Ray was imported before the simulation set its token: do not import ray first"
            )
        _made = secrets.token_hex(32)
    for name, value in _OWN.items():
        os.environ.setdefault(name, value)
    os.environ |= {"RAY_AUTH_MODE": "token", _TOKEN: _made}
    for name in ("RAY_ADDRESS", "RAY_AUTH_TOKEN_PATH"):  # of another Ray
        os.environ.pop(name, None)
