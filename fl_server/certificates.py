"""A lab's own certificates: an authority, the SuperLink's certificate, and a key for each node."""

import contextlib
import datetime
import ipaddress
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from common.errors import DataError, UsageError

AUTHORITY, AUTHORITY_KEY = "ca.crt", "ca.key"
SERVER, SERVER_KEY = "server.pem", "server.key"
AUTHORITY_DAYS = 3650
EARLIER = datetime.timedelta(days=1)
"""Certificates are valid from a day ago: the clock of a board without a battery may be late."""
ALWAYS = ("localhost", "127.0.0.1", "::1")


class File(NamedTuple):
    """A file to be written."""

    name: str
    content: bytes
    private: bool


class Authority(NamedTuple):
    """What certificates are signed with."""

    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey


def make_certificates(
    folder: Path, hosts: Sequence[str], days: int, nodes: Sequence[str], extend: bool = False
) -> list[Path]:
    """Write an authority, a server certificate and the key pairs of nodes into a folder.

    Args:
        folder: made if it is not there.
        hosts: names and IP addresses of the SuperLink, beside `ALWAYS`.
        days: that the server certificate is valid, at most as long as its authority.
        nodes: names of nodes; each gets an ECDSA P-384 pair in OpenSSH's formats, `NAME.key` and
            `NAME.pub`.
        extend: keep the files that are there and sign with the authority among them.

    Returns:
        The files written; private ones have mode 0600.

    Raises:
        UsageError: a bad host or name, or a file that is there already; nothing is written then.
        DataError: an authority to extend that cannot be read.
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
        authority, made = _authority(max(days, AUTHORITY_DAYS))
        files += made
    if SERVER not in there:
        files += _server(authority, names, days)
    elif missing := sorted(set(map(canonical, hosts)) - set(hosts_of(folder))):
        raise UsageError(
            f"{folder / SERVER} is not for {', '.join(missing)}: remove it and {SERVER_KEY} for "
            "--extend to make them again, with every --host"
        )
    for node in nodes:
        if f"{node}.key" not in there:
            files += _node(node)
    folder.mkdir(parents=True, exist_ok=True)
    return _write(folder, files)


def hosts_of(folder: Path) -> list[str]:
    """The hosts that the server certificate of a folder is for, this machine last.

    Raises:
        DataError: not a certificate with names.
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
    """The subjectAltName of hosts, after those of this machine.

    Raises:
        UsageError: neither a host name nor an IP address that a device can connect to.
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
    """A host name in small letters, or an address in its one form.

    Raises:
        UsageError: neither.
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
    """`["3"]` is node-0, node-1 and node-2; anything else is the names themselves.

    Raises:
        UsageError: no node, or not the name of a file.
    """
    if len(given) == 1 and re.fullmatch(r"\d+", given[0]):
        if int(given[0]) < 1:
            raise UsageError("--nodes 0: there must be one at least")
        return [f"node-{number}" for number in range(int(given[0]))]
    check_names(given)
    return list(given)


def check_names(nodes: Sequence[str]) -> None:
    """Check that names can be those of files beside the authority's.

    Raises:
        UsageError: which cannot.
    """
    for node in nodes:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", node):
            raise UsageError(f"--nodes '{node}': use letters, digits, dots and dashes")
        if node.lower() in ("ca", "server"):
            raise UsageError(f"--nodes {node}: {node}.key is the name of another key here")
    if len({node.lower() for node in nodes}) < len(nodes):
        raise UsageError(f"--nodes {' '.join(nodes)}: a name is given twice")


def read_authority(folder: Path) -> Authority:
    """The authority made earlier.

    Raises:
        DataError: not a certificate and its key, or no longer valid.
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
    if certificate.not_valid_after_utc <= _now():
        raise DataError(f"{where}: no longer valid; make new ones with another --output")
    return Authority(certificate, key)


def _now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC).replace(microsecond=0)


def _key() -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(ec.SECP384R1())


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def _builder(
    subject: str, public: ec.EllipticCurvePublicKey, end: datetime.datetime, signs: bool
) -> x509.CertificateBuilder:
    """A certificate of one use: to sign others, or to be signed for a server."""
    usage = x509.KeyUsage(
        digital_signature=not signs,
        key_cert_sign=signs,
        crl_sign=signs,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )
    return (
        x509.CertificateBuilder()
        .subject_name(_name(subject))
        .public_key(public)
        .serial_number(x509.random_serial_number())
        .not_valid_before(_now() - EARLIER)
        .not_valid_after(end)
        .add_extension(x509.BasicConstraints(signs, 0 if signs else None), critical=True)
        .add_extension(usage, critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
    )


def _authority(days: int) -> tuple[Authority, list[File]]:
    key = _key()
    builder = _builder("Shortwave lab", key.public_key(), _end(days), signs=True)
    certificate = builder.issuer_name(_name("Shortwave lab")).sign(key, hashes.SHA384())
    files = [
        File(AUTHORITY, certificate.public_bytes(Encoding.PEM), False),
        File(AUTHORITY_KEY, _pem(key), True),
    ]
    return Authority(certificate, key), files


def _server(authority: Authority, names: list[x509.GeneralName], days: int) -> list[File]:
    key, issuer = _key(), authority.certificate
    end = min(_end(days), issuer.not_valid_after_utc)
    identifier = issuer.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    certificate = (
        _builder("Shortwave SuperLink", key.public_key(), end, signs=False)
        .issuer_name(issuer.subject)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(identifier),
            critical=False,
        )
        .sign(authority.key, hashes.SHA384())
    )
    return [
        File(SERVER, certificate.public_bytes(Encoding.PEM), False),
        File(SERVER_KEY, _pem(key), True),
    ]


def _end(days: int) -> datetime.datetime:
    try:
        return _now() + datetime.timedelta(days=days)
    except OverflowError:
        raise UsageError(f"--days {days} is beyond the year 9999") from None


def _node(name: str) -> list[File]:
    # OpenSSH's formats are the ones that flower-supernode and `flwr supernode register` read.
    key = _key()
    public = key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)
    private = key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption())
    return [
        File(f"{name}.pub", public + b" " + name.encode() + b"\n", False),
        File(f"{name}.key", private, True),
    ]


def _pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def _write(folder: Path, files: list[File]) -> list[Path]:
    """Write new files, all or none; a private one is never readable by others, not for a moment."""
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
