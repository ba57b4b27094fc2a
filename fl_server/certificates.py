"""Writes a lab's certificates: an authority, the SuperLink's certificate, a key for each node."""

import contextlib
import ipaddress
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from common.errors import DataError, UsageError
from fl_server.key_pairs import Authority, KeyPair, new_authority, node_pair, now, server_pair

AUTHORITY, AUTHORITY_KEY = "ca.crt", "ca.key"
SERVER, SERVER_KEY = "server.pem", "server.key"
AUTHORITY_DAYS = 3650
ALWAYS = ("localhost", "127.0.0.1", "::1")
"""Hosts that every server certificate is for."""


class File(NamedTuple):
    """A file to write."""

    name: str
    content: bytes
    private: bool


def make_certificates(
    folder: Path, hosts: Sequence[str], days: int, nodes: Sequence[str], extend: bool = False
) -> list[Path]:
    """Write an authority, a server certificate and the key pairs of nodes into a folder.

    Args:
        folder: created if it does not exist.
        hosts: names and IP addresses of the SuperLink, in addition to `ALWAYS`.
        days: that the server certificate is valid, at most as long as its authority.
        nodes: names of nodes; each gets an ECDSA P-384 pair in OpenSSH's formats, `NAME.key` and
            `NAME.pub`.
        extend: keep the existing files and sign with their authority.

    Returns:
        The files written; private ones have mode 0600.

    Raises:
        UsageError: a bad host or name, or a file that exists already; nothing is written then.
        DataError: the authority to extend cannot be read.
    """
    names = alternative_names(hosts)
    check_names(nodes)
    pairs = [(AUTHORITY, AUTHORITY_KEY), (SERVER, SERVER_KEY)]
    pairs += [(f"{node}.pub", f"{node}.key") for node in nodes]
    there = {name for pair in pairs for name in pair if os.path.lexists(folder / name)}
    if there and not extend:
        raise UsageError(
            f"{folder} already has {', '.join(sorted(there))}, and nothing is overwritten: give "
            "another --output, or --extend to make only what is missing"
        )
    for pair in pairs:
        if len(there & set(pair)) == 1:
            (found,) = there & set(pair)
            raise UsageError(f"{folder} has {found} of {' and '.join(pair)}: remove it first")
    files: list[File] = []
    if AUTHORITY in there:
        authority = read_authority(folder)
    else:
        authority = new_authority(max(days, AUTHORITY_DAYS))
        files += _files(AUTHORITY, AUTHORITY_KEY, authority.pair())
    if SERVER not in there:
        files += _files(SERVER, SERVER_KEY, server_pair(authority, names, days))
    elif missing := sorted(set(map(canonical, hosts)) - set(hosts_of(folder))):
        raise UsageError(
            f"{folder / SERVER} is not for {', '.join(missing)}: remove it and {SERVER_KEY} for "
            "--extend to make them again, with every --host"
        )
    for node in nodes:
        if f"{node}.key" not in there:
            files += _files(f"{node}.pub", f"{node}.key", node_pair(node))
    folder.mkdir(parents=True, exist_ok=True)
    return _write(folder, files)


def hosts_of(folder: Path) -> list[str]:
    """Hosts that the server certificate in a folder is for, this machine's own names last.

    Raises:
        DataError: the file is not a certificate with names.
    """
    path = folder / SERVER
    try:
        certificate = x509.load_pem_x509_certificate(path.read_bytes())
        found = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName)
    except (ValueError, x509.ExtensionNotFound) as error:
        raise DataError(f"{path}: not a server's certificate ({error})") from None
    hosts = [str(name.value) for name in found.value]
    return sorted(hosts, key=ALWAYS.__contains__)


def alternative_names(hosts: Iterable[str]) -> list[x509.GeneralName]:
    """The names of a server certificate (subjectAltName): `ALWAYS`, then hosts.

    Raises:
        UsageError: a host is not a name or IP address that a device can connect to.
    """
    names: list[x509.GeneralName] = []
    for host in dict.fromkeys((*ALWAYS, *map(canonical, hosts))):
        try:
            address = ipaddress.ip_address(host)
        except ValueError:
            names.append(x509.DNSName(host))
            continue
        if address.is_unspecified:
            raise UsageError(
                f"--host {host} stands for every address of a machine: give the one that devices "
                "connect to"
            )
        names.append(x509.IPAddress(address))
    return names


def canonical(host: str) -> str:
    """A host name in lower case, or an IP address in canonical form.

    Raises:
        UsageError: neither a host name nor an IP address.
    """
    try:
        return str(ipaddress.ip_address(host))
    except ValueError:
        pass
    label = r"(?!-)[A-Za-z0-9-]{1,63}(?<!-)"
    # A name that ends in a number is a mistyped address (RFC 1123, section 2.1).
    fits = re.fullmatch(rf"{label}(\.{label})*", host) and not re.search(r"(^|\.)\d+$", host)
    if not fits or len(host) > 253:
        raise UsageError(
            f"--host '{host}' is neither a host name nor an IP address, as in superlink.lan or "
            "192.168.1.10 (without a port)"
        )
    return host.lower()


def node_names(given: Sequence[str]) -> list[str]:
    """Names of nodes: `["3"]` gives node-0, node-1 and node-2; other names are kept.

    Raises:
        UsageError: no node, or a name that cannot be used.
    """
    if len(given) == 1 and re.fullmatch(r"\d+", given[0]):
        if int(given[0]) < 1:
            raise UsageError("--nodes 0: there must be one at least")
        return [f"node-{number}" for number in range(int(given[0]))]
    check_names(given)
    return list(given)


def check_names(nodes: Sequence[str]) -> None:
    """Check that names can be used for files beside the authority's.

    Raises:
        UsageError: a name that cannot be used.
    """
    for node in nodes:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", node):
            raise UsageError(f"--nodes '{node}': use letters, digits, dots and dashes")
        if node.lower() in ("ca", "server"):
            raise UsageError(f"--nodes {node}: {node}.key is the name of another key here")
    if len({node.lower() for node in nodes}) < len(nodes):
        raise UsageError(f"--nodes {' '.join(nodes)}: a name is given twice")


def read_authority(folder: Path) -> Authority:
    """Read the authority in a folder.

    Raises:
        DataError: the files are not a certificate and its key, or it is no longer valid.
    """
    where = f"{folder / AUTHORITY} and {AUTHORITY_KEY}"
    try:
        certificate = x509.load_pem_x509_certificate((folder / AUTHORITY).read_bytes())
        key = load_pem_private_key((folder / AUTHORITY_KEY).read_bytes(), None)
    except (ValueError, TypeError) as error:
        raise DataError(f"{where}: not a certificate and its private key ({error})") from None
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise DataError(f"{where}: not made by this command")
    if key.public_key() != certificate.public_key():
        raise DataError(f"{where}: the key is not that of the certificate")
    if certificate.not_valid_after_utc <= now():
        raise DataError(f"{where}: no longer valid; make new ones with another --output")
    return Authority(certificate, key)


def _files(public: str, private: str, pair: KeyPair) -> list[File]:
    return [File(public, pair.public, False), File(private, pair.private, True)]


def _write(folder: Path, files: list[File]) -> list[Path]:
    """Write new files, all or none; private ones are created with mode 0600."""
    written: list[Path] = []
    try:
        for file in files:
            path = folder / file.name
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
            handle = os.open(path, flags, 0o600 if file.private else 0o644)
            written.append(path)
            with os.fdopen(handle, "wb") as stream:
                stream.write(file.content)
    except BaseException:
        for path in written:
            with contextlib.suppress(OSError):
                path.unlink()
        raise
    return written
