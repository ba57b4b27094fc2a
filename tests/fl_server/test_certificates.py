"""`python -m fl_server certificates`: what it makes is valid, private and read by Flower."""

import argparse
import datetime
import ipaddress
import os
import shlex
import ssl
import stat
import tomllib
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from cryptography.x509.verification import PolicyBuilder, Store

from common import command
from common.errors import DataError, UsageError
from fl_server.__main__ import main, next_commands
from fl_server.certificates import alternative_names, hosts_of, make_certificates, node_names

HOSTS = ["superlink.lan", "192.168.1.10", "fe80::1"]


def certificate(path: Path) -> x509.Certificate:
    return x509.load_pem_x509_certificate(path.read_bytes())


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("parent") / "lab"
    make_certificates(folder, HOSTS, 30, ["pi-0", "pi-1"])
    return folder


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "::1", *HOSTS])
def test_the_chain_verifies_for_every_host(lab: Path, host: str) -> None:
    try:
        subject: x509.GeneralName = x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        subject = x509.DNSName(host)
    assert isinstance(subject, x509.IPAddress | x509.DNSName)
    store = Store([certificate(lab / "ca.crt")])
    verifier = PolicyBuilder().store(store).build_server_verifier(subject)
    chain = verifier.verify(certificate(lab / "server.pem"), [])
    assert chain == [certificate(lab / "server.pem"), certificate(lab / "ca.crt")]


def test_no_other_host_and_no_other_authority_verifies(lab: Path, tmp_path: Path) -> None:
    server = certificate(lab / "server.pem")
    names = server.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert list(names) == alternative_names(HOSTS)
    make_certificates(tmp_path, [], 30, [])
    store = Store([certificate(tmp_path / "ca.crt")])
    verifier = PolicyBuilder().store(store).build_server_verifier(x509.DNSName("localhost"))
    with pytest.raises(x509.verification.VerificationError):
        verifier.verify(server, [])


def test_a_tls_handshake_succeeds_under_strict_rules(lab: Path) -> None:
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(lab / "server.pem", lab / "server.key")
    client = ssl.create_default_context(cafile=str(lab / "ca.crt"))
    client.verify_flags |= ssl.VERIFY_X509_STRICT
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    here = client.wrap_bio(to_client, to_server, server_hostname="192.168.1.10")
    there = server.wrap_bio(to_server, to_client, server_side=True)
    for _ in range(2):
        for side in (here, there):
            try:
                side.do_handshake()
            except ssl.SSLWantReadError:
                continue
    assert here.version() == "TLSv1.3"


def test_validity_begins_a_day_ago_and_ends_after_the_days(lab: Path) -> None:
    server, authority = certificate(lab / "server.pem"), certificate(lab / "ca.crt")
    day = datetime.timedelta(days=1)
    assert server.not_valid_after_utc - server.not_valid_before_utc == 31 * day
    assert authority.not_valid_after_utc - authority.not_valid_before_utc == 3651 * day
    now = datetime.datetime.now(datetime.UTC)
    assert server.not_valid_before_utc < now - 0.9 * day


def test_days_beyond_the_calendar_are_refused(tmp_path: Path) -> None:
    for days in (9_999_999, 10**12):
        with pytest.raises(UsageError, match="beyond the year 9999"):
            make_certificates(tmp_path, [], days, [])
    assert list(tmp_path.iterdir()) == []


def test_private_files_are_for_their_owner_only(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        written = make_certificates(tmp_path / "lab", [], 1, ["a"])
    finally:
        os.umask(before)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in written}
    assert modes == {
        "ca.crt": 0o644,
        "ca.key": 0o600,
        "server.pem": 0o644,
        "server.key": 0o600,
        "a.pub": 0o644,
        "a.key": 0o600,
    }


def test_flower_reads_the_keys_of_a_node(lab: Path) -> None:
    from flwr.cli.supernode.register import try_load_public_key
    from flwr.supercore.primitives.asymmetric import public_key_to_bytes
    from flwr.supernode.cli.flower_supernode import _try_setup_client_authentication

    options = {"auth_supernode_public_key": None}
    known = []
    for name in ("pi-0", "pi-1"):
        given = argparse.Namespace(auth_supernode_private_key=str(lab / f"{name}.key"), **options)
        private, public = _try_setup_client_authentication(given) or (None, None)
        assert isinstance(private, ec.EllipticCurvePrivateKey)
        assert private.curve.name == "secp384r1"
        assert try_load_public_key(lab / f"{name}.pub") == public_key_to_bytes(public)
        known.append(public_key_to_bytes(public))
    assert known[0] != known[1]


@pytest.mark.parametrize("name", ["ca.crt", "ca.key", "server.pem", "a.key", "a.pub"])
def test_nothing_is_overwritten(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("mine")
    with pytest.raises(UsageError, match=rf"already has {name}, and nothing is overwritten"):
        make_certificates(tmp_path, [], 1, ["a"])
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [(name, "mine")]


def test_a_link_to_nowhere_is_not_written_through(tmp_path: Path) -> None:
    (tmp_path / "ca.key").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UsageError, match=r"already has ca\.key"):
        make_certificates(tmp_path, [], 1, ["a"])
    assert not (tmp_path / "elsewhere").exists()


def test_extending_adds_nodes_and_renews_under_the_same_authority(tmp_path: Path) -> None:
    make_certificates(tmp_path, [], 30, ["a"])
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    written = make_certificates(tmp_path, [], 30, ["a", "b"], extend=True)
    assert [path.name for path in written] == ["b.pub", "b.key"]
    assert all((tmp_path / name).read_bytes() == content for name, content in before.items())
    (tmp_path / "server.pem").unlink()
    with pytest.raises(UsageError, match=r"has server\.key of server\.pem and server\.key"):
        make_certificates(tmp_path, [], 30, ["a"], extend=True)
    (tmp_path / "server.key").unlink()
    written = make_certificates(tmp_path, ["new.lan"], 99_999, ["a"], extend=True)
    assert [path.name for path in written] == ["server.pem", "server.key"]
    authority, server = certificate(tmp_path / "ca.crt"), certificate(tmp_path / "server.pem")
    server.verify_directly_issued_by(authority)
    assert server.not_valid_after_utc == authority.not_valid_after_utc
    key = load_pem_private_key((tmp_path / "server.key").read_bytes(), None)
    assert key.public_key() == server.public_key()


def test_a_host_that_an_existing_certificate_lacks_is_an_error(tmp_path: Path) -> None:
    make_certificates(tmp_path, ["Pi.lan", "FE80::1"], 30, [])
    assert hosts_of(tmp_path) == ["pi.lan", "fe80::1", "localhost", "127.0.0.1", "::1"]
    make_certificates(tmp_path, ["pi.LAN", "fe80:0::1", "127.0.0.1"], 30, ["a"], extend=True)
    with pytest.raises(UsageError, match=r"server\.pem is not for new\.lan: remove it"):
        make_certificates(tmp_path, ["new.lan"], 30, ["b"], extend=True)
    assert not (tmp_path / "b.key").exists()
    (tmp_path / "server.pem").write_text("x")
    with pytest.raises(DataError, match="not a server's certificate"):
        make_certificates(tmp_path, ["new.lan"], 30, ["b"], extend=True)


def test_a_renewal_makes_no_node(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = ["certificates", "--output", str(tmp_path / "lab")]
    assert main([*output, "--host", "pi.lan"]) == 0
    assert "--key node-0.key" in capsys.readouterr().out
    assert main([*output, "--extend"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("made: nothing, all was there\n")
    assert "--host 0.0.0.0 --port 8000" in printed
    assert "register" not in printed


def test_an_authority_that_cannot_sign_is_an_error(tmp_path: Path) -> None:
    make_certificates(tmp_path / "one", [], 30, [])
    make_certificates(tmp_path / "two", [], 30, [])
    (tmp_path / "one" / "ca.key").write_bytes((tmp_path / "two" / "ca.key").read_bytes())
    with pytest.raises(DataError, match="the key is not that of the certificate"):
        make_certificates(tmp_path / "one", [], 30, ["a"], extend=True)
    (tmp_path / "one" / "ca.key").write_text("no key")
    with pytest.raises(DataError, match="not a certificate and its private key"):
        make_certificates(tmp_path / "one", [], 30, ["a"], extend=True)


@pytest.mark.parametrize(
    "host",
    ["", "a b", "192.168.1.10:8000", "https://a", "-a.lan", "a..b", "300.1.1.1", "ü.lan", "a" * 64],
)
def test_a_bad_host_is_refused(tmp_path: Path, host: str) -> None:
    with pytest.raises(UsageError, match="neither a host name nor an IP address"):
        make_certificates(tmp_path / "lab", [host], 1, [])
    assert not (tmp_path / "lab").exists()


@pytest.mark.parametrize("host", ["0.0.0.0", "::"])
def test_an_address_that_nobody_can_connect_to_is_refused(tmp_path: Path, host: str) -> None:
    with pytest.raises(UsageError, match="stands for every address"):
        make_certificates(tmp_path, [host], 1, [])


def test_nodes_are_a_number_or_names() -> None:
    assert node_names(["3"]) == ["node-0", "node-1", "node-2"]
    assert node_names(["kitchen", "attic"]) == ["kitchen", "attic"]


@pytest.mark.parametrize("nodes", [["0"], ["../a"], [".a"], ["ca"], ["Server"], ["a", "A"], [""]])
def test_bad_nodes_are_refused(nodes: list[str]) -> None:
    with pytest.raises(UsageError, match="--nodes"):
        node_names(nodes)


def test_a_failed_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = os.open

    def full(path: Path, flags: int, mode: int) -> int:
        if path.name == "server.key":
            raise OSError(28, "No space left on device", str(path))
        return opened(path, flags, mode)

    monkeypatch.setattr(os, "open", full)
    with pytest.raises(OSError, match="No space left"):
        make_certificates(tmp_path / "lab", [], 1, ["a"])
    assert list((tmp_path / "lab").iterdir()) == []


def test_the_command_prints_what_to_run_and_the_folder_last(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "my lab"
    options = ["--host", "pi.lan", "--host", "10.0.0.9", "--nodes", "2", "--days", "5"]
    assert main(["certificates", "--output", str(folder), *options]) == 0
    printed = capsys.readouterr().out
    assert printed.splitlines()[-1] == f"certificates and keys: {folder}"
    assert f"flwr supernode register '{folder / 'node-1.pub'}' lab" in printed
    assert "--superlink pi.lan:8000" in printed
    names = alternative_names(["pi.lan", "10.0.0.9"])
    extensions = certificate(folder / "server.pem").extensions
    assert list(extensions.get_extension_for_class(x509.SubjectAlternativeName).value) == names


def test_the_printed_commands_name_files_that_are_there(lab: Path) -> None:
    text = next_commands(lab, HOSTS, ["pi-0", "pi-1"])
    words = shlex.split(text.replace("\\\n", " "), comments=False)
    named = {word for word in words if word.startswith(str(lab))}
    assert named == {
        str(lab / name) for name in ("ca.crt", "server.pem", "server.key", "pi-0.pub", "pi-1.pub")
    }
    config = text[text.index("[superlink.lab]") : text.index("Then let")]
    assert tomllib.loads(config)["superlink"]["lab"]["root-certificates"] == str(lab / "ca.crt")


@pytest.mark.parametrize(
    ("hosts", "listen", "here", "there"),
    [
        ([], "", "127.0.0.1:8000", "127.0.0.1:8000"),
        (["pi.lan"], "--host 0.0.0.0 ", "127.0.0.1:8000", "pi.lan:8000"),
        (["fe80::1"], "--host :: ", "[::1]:8000", "[fe80::1]:8000"),
    ],
)
def test_the_superlink_listens_where_devices_call(
    tmp_path: Path, hosts: list[str], listen: str, here: str, there: str
) -> None:
    text = next_commands(tmp_path, hosts, ["a"])
    assert f"flower-superlink {listen}--port 8000 --enable-supernode-auth" in text
    assert f'address = "{here}"' in text
    assert f"--superlink {there} " in text


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--hots", "a"], "did you mean 'host'?"),
        (["--days", "0"], "0 is not above zero"),
        ([], "--output: give the folder for the files"),
    ],
)
def test_bad_options_are_one_line(
    options: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["--output", str(tmp_path / "lab"), *options] if options else []
    with pytest.raises(SystemExit, match="2"):
        command.run(lambda _: main(["certificates", *given]))
    error = capsys.readouterr().err
    assert words in error
    assert len(error.splitlines()) == 1
