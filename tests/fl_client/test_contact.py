"""A device that cannot reach its SuperLink says what it tried and what to check."""

import logging
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from flwr.supercore.logger import LOGGER_NAME

from fl_client.contact import Watch, diagnose
from fl_client.environment import without_proxies
from fl_server.certificates import make_certificates


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


@pytest.fixture
def closed() -> Iterator[str]:
    """An address at which nobody listens."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield f"127.0.0.1:{taken.getsockname()[1]}"


@pytest.fixture
def listening() -> Iterator[str]:
    """An address at which something accepts connections and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"127.0.0.1:{server.getsockname()[1]}"


def test_an_address_where_nobody_listens(closed: str) -> None:
    found = diagnose(closed, None)
    assert found.startswith(f"tried {closed}: connection refused. Check the address")


def test_a_name_that_nobody_knows() -> None:
    found = diagnose("superlink.invalid:8000", None)
    assert "no address is known for the name superlink.invalid" in found


def test_something_that_answers(listening: str) -> None:
    assert f"tried {listening}: something answers there" in diagnose(listening, None)


@pytest.mark.parametrize("variable", ["http_proxy", "HTTP_PROXY", "all_proxy"])
def test_a_proxy_is_named_without_its_password(
    monkeypatch: pytest.MonkeyPatch, closed: str, variable: str
) -> None:
    monkeypatch.setenv(variable, f"http://me:secret@{closed}")
    found = diagnose("192.0.2.7:8000", None)
    assert f"through the proxy http://{closed} that the variable {variable.lower()} names" in found
    assert "connection refused" in found
    assert "name 192.0.2.7 in NO_PROXY" in found
    assert "secret" not in found


def test_this_machine_is_exempt_from_every_proxy(
    monkeypatch: pytest.MonkeyPatch, closed: str, listening: str
) -> None:
    monkeypatch.setenv("http_proxy", f"http://{closed}")
    assert "proxy" in diagnose(listening, None)
    for name, value in without_proxies({"no_proxy": "10.0.0.1"}).items():
        monkeypatch.setenv(name, value)
    assert "something answers there" in diagnose(listening, None)
    assert without_proxies({"NO_PROXY": "*"}) == {"no_proxy": "*", "NO_PROXY": "*"}


def test_a_wrong_certificate_is_named(tmp_path: Path) -> None:
    for name in ("mine", "other"):
        make_certificates(tmp_path / name, ["127.0.0.1"], 1, [])
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "mine" / "server.pem", tmp_path / "mine" / "server.key")
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            while True:
                try:
                    connection, _ = server.accept()
                    with context.wrap_socket(connection, server_side=True):
                        pass
                except ssl.SSLError:
                    continue
                except OSError:
                    return

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        address = f"127.0.0.1:{server.getsockname()[1]}"
        right, wrong = (diagnose(address, tmp_path / name / "ca.crt") for name in ("mine", "other"))
        server.shutdown(socket.SHUT_RDWR)
    thread.join(10)
    assert "something answers there" in right
    assert "it answers, but its certificate is not accepted" in wrong
    assert f"Check that {tmp_path / 'other' / 'ca.crt'} is its ca.crt" in wrong


def test_the_owner_is_told_again_and_again_until_there_is_contact(closed: str) -> None:
    said: list[str] = []
    told = threading.Event()

    def say(text: str) -> None:
        said.append(text)
        told.set()

    watch = Watch(closed, None, say, patience=0.05)
    log = logging.getLogger(LOGGER_NAME)
    watch.start()
    try:
        for count in (1, 2):
            assert told.wait(30)
            told.clear()
            assert len(said) >= count
        assert not watch.met
        log.info("SuperNode ID: %s", 7)
        assert watch.met
        time.sleep(0.3)
        before = len(said)
        time.sleep(0.5)
        assert len(said) == before, "nothing is said while there is contact"
        log.warning("Connection attempt failed, retrying in %.2f seconds", 1.0)
        assert not watch.met
        told.clear()
        assert told.wait(30)
        assert said[-1].startswith("no contact with the SuperLink for 0 min; tried ")
    finally:
        log.removeHandler(watch)
