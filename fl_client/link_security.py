"""Checks how a device's connection to its SuperLink is protected."""

from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_ssh_private_key

from common.errors import UsageError
from fl_client.environment import LOOPBACK

_HERE = (*LOOPBACK, "[::1]")


def link_security(
    superlink: str, certificates: Path | None, insecure: bool, key: Path | None = None
) -> list[str]:
    """Options of Flower's SuperNode for a connection that is encrypted where it must be.

    Args:
        superlink: HOST:PORT.
        certificates: PEM file that the SuperLink is checked with.
        insecure: do not encrypt, even off this machine.
        key: private key of this node.

    Raises:
        UsageError: options that do not fit together, or files that are not what they should be.
    """
    host, colon, port = superlink.rpartition(":")
    if not colon or not port.isdigit():
        raise UsageError(f"--superlink '{superlink}' is not HOST:PORT, as in 192.168.1.10:8000")
    if certificates is not None:
        if insecure:
            raise UsageError("--insecure and --root-certificates exclude each other")
        if not certificates.is_file():
            raise UsageError(f"--root-certificates {certificates}: no such file")
        security = ["--root-certificates", str(certificates)]
        if key is not None:
            _check_key(key)
            security += ["--auth-supernode-private-key", str(key)]
        return security
    if key is not None:
        raise UsageError(
            "--key proves who this node is over an encrypted connection only: give "
            "--root-certificates ca.crt of the SuperLink with it"
        )
    if insecure or host in _HERE:
        return ["--insecure"]
    raise UsageError(
        f"the connection to {superlink} leaves this machine and would not be encrypted: give "
        "--root-certificates ca.crt of the SuperLink (`python -m fl_server certificates` makes "
        "one there), or --insecure if the network is your own"
    )


def _check_key(path: Path) -> None:
    if not path.is_file():
        raise UsageError(f"--key {path}: no such file")
    try:
        key = load_ssh_private_key(path.read_bytes(), None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, ec.EllipticCurvePrivateKey) or key.curve.name != "secp384r1":
        raise UsageError(
            f"--key {path}: not an ECDSA P-384 private key in OpenSSH's format without a "
            "passphrase; `python -m fl_server certificates` makes one"
        )
