"""Makes certificates and keys in memory: an authority, a server certificate, a node's key pair."""

import datetime
from typing import NamedTuple

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from common.errors import UsageError

EARLIER = datetime.timedelta(days=1)
"""Certificates are valid from a day ago: the clock of a board without a battery may be late."""


class KeyPair(NamedTuple):
    """A certificate or public key, and its private key, as the contents of their files."""

    public: bytes
    private: bytes


class Authority(NamedTuple):
    """A certificate authority."""

    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey

    def pair(self) -> KeyPair:
        """The authority as files in PEM."""
        return KeyPair(self.certificate.public_bytes(Encoding.PEM), _pem(self.key))


def new_authority(days: int) -> Authority:
    """Make an authority that is valid for so many days.

    Raises:
        UsageError: the last day is beyond the year 9999.
    """
    key = _key()
    builder = _builder("Shortwave lab", key.public_key(), _end(days), signs=True)
    certificate = builder.issuer_name(_name("Shortwave lab")).sign(key, hashes.SHA384())
    return Authority(certificate, key)


def server_pair(authority: Authority, names: list[x509.GeneralName], days: int) -> KeyPair:
    """Make a server certificate and its key.

    Args:
        authority: signs the certificate.
        names: hosts that the certificate is for.
        days: that it is valid, at most as long as its authority.

    Raises:
        UsageError: the last day is beyond the year 9999.
    """
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
    return KeyPair(certificate.public_bytes(Encoding.PEM), _pem(key))


def node_pair(name: str) -> KeyPair:
    """Make a node's key pair in OpenSSH's formats, which Flower's commands read."""
    key = _key()
    public = key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)
    private = key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption())
    return KeyPair(public + b" " + name.encode() + b"\n", private)


def now() -> datetime.datetime:
    """The current time in UTC, in whole seconds."""
    return datetime.datetime.now(datetime.UTC).replace(microsecond=0)


def _end(days: int) -> datetime.datetime:
    try:
        return now() + datetime.timedelta(days=days)
    except OverflowError:
        raise UsageError(f"--days {days} is beyond the year 9999") from None


def _key() -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(ec.SECP384R1())


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def _pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def _builder(
    subject: str, public: ec.EllipticCurvePublicKey, end: datetime.datetime, signs: bool
) -> x509.CertificateBuilder:
    """A certificate for one use: to sign others, or for a server."""
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
        .not_valid_before(now() - EARLIER)
        .not_valid_after(end)
        .add_extension(x509.BasicConstraints(signs, 0 if signs else None), critical=True)
        .add_extension(usage, critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
    )
