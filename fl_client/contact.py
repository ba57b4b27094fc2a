"""Tells a device's owner, after a minute without contact to the SuperLink, what to check."""

import logging
import socket
import ssl
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Callable
from pathlib import Path

PATIENCE = 60.0
"""Seconds without contact after which the owner is told; then again after ever longer times."""
_TIMEOUT = 5.0
_FOUND = ("SuperNode ID:", "Connection successful")
_LOST = "Connection attempt failed"


class Watch(logging.Handler):
    """Follows Flower's log, and prints what is wrong when the SuperLink is out of reach."""

    def __init__(
        self,
        superlink: str,
        certificates: Path | None,
        say: Callable[[str], None],
        patience: float = PATIENCE,
    ) -> None:
        """Start without contact.

        Args:
            superlink: HOST:PORT.
            certificates: PEM file that the SuperLink is checked with; None without encryption.
            say: prints a line.
            patience: seconds without contact after which to tell.
        """
        super().__init__(logging.DEBUG)
        self.superlink, self.certificates, self.say = superlink, certificates, say
        self.patience = patience
        self._changed = threading.Condition()
        self._lost: float | None = time.monotonic()

    def start(self) -> None:
        """Follow the log from now on, in a thread that ends with the process."""
        logging.getLogger("flwr").addHandler(self)
        threading.Thread(target=self._run, name="contact", daemon=True).start()

    @property
    def met(self) -> bool:
        """Whether the SuperLink is within reach, as far as is known."""
        return self._lost is None

    def emit(self, record: logging.LogRecord) -> None:
        """Note that contact was made or lost."""
        text = str(record.msg)
        with self._changed:
            if text.startswith(_FOUND):
                self._lost = None
            elif text.startswith(_LOST) and self._lost is None:
                self._lost = time.monotonic()
            self._changed.notify_all()

    def _run(self) -> None:
        told, wait = 0.0, self.patience
        while True:
            with self._changed:
                if self._lost is None:
                    self._changed.wait()
                    wait = self.patience
                    continue
                due = max(self._lost + self.patience, told + wait)
                left = due - time.monotonic()
                if left > 0:
                    self._changed.wait(left)
                    continue
                minutes = (time.monotonic() - self._lost) / 60
            found = diagnose(self.superlink, self.certificates)
            self.say(f"no contact with the SuperLink for {minutes:.0f} min; {found}")
            told, wait = time.monotonic(), 2 * wait


def diagnose(superlink: str, certificates: Path | None) -> str:
    """What happens on the way to a SuperLink, and what to check.

    Args:
        superlink: HOST:PORT.
        certificates: PEM file that the SuperLink is checked with; None without encryption.
    """
    host, _, port = superlink.rpartition(":")
    host = host.strip("[]")
    proxy = _proxy(host, "http" if certificates is None else "https")
    if proxy:
        tried = f"tried {superlink} through the proxy {proxy[1]} that the variable {proxy[0]} names"
        address = urllib.parse.urlsplit(proxy[1] if "://" in proxy[1] else f"http://{proxy[1]}")
        problem = _connect(address.hostname or "", address.port or 80)
        return (
            f"{tried}: {problem or 'the proxy answers'}. Check that the proxy may connect to "
            f"{superlink}, or name {host} in NO_PROXY to call it directly"
        )
    problem = _connect(host, int(port))
    if problem:
        return (
            f"tried {superlink}: {problem}. Check the address, that the SuperLink runs and listens "
            "there (--host 0.0.0.0), and firewalls between"
        )
    if certificates is not None:
        problem = _handshake(host, int(port), certificates)
        if problem:
            return (
                f"tried {superlink}: it answers, but {problem}. Check that {certificates} is its "
                f"ca.crt, that its certificate names {host} (`python -m fl_server certificates "
                "--host`), that it runs encrypted, and this device's clock"
            )
    return (
        f"tried {superlink}: something answers there. Check that it is a SuperLink of the same "
        "Flower version, with the same encryption, that knows this device's --key"
    )


def _proxy(host: str, scheme: str) -> tuple[str, str] | None:
    """The variable that names a proxy for a host, and the proxy; None if it is called directly."""
    if urllib.request.proxy_bypass(host):
        return None
    found = urllib.request.getproxies()
    for name in (scheme, "all"):
        if found.get(name):
            return f"{name}_proxy", _without_password(found[name])
    return None


def _without_password(url: str) -> str:
    before, at, after = url.rpartition("@")
    return f"{before.split('://')[0]}://{after}" if at and "://" in before else after


def _connect(host: str, port: int) -> str:
    """Connect and disconnect; the problem, or an empty text."""
    try:
        socket.create_connection((host, port), _TIMEOUT).close()
    except socket.gaierror:
        return f"no address is known for the name {host}"
    except TimeoutError:
        return f"no answer within {_TIMEOUT:.0f} s"
    except OSError as error:
        return (error.strerror or str(error)).lower()
    return ""


def _handshake(host: str, port: int, certificates: Path) -> str:
    """Agree on encryption as the SuperNode does; the problem, or an empty text."""
    try:
        context = ssl.create_default_context(cafile=str(certificates))
        with (
            socket.create_connection((host, port), _TIMEOUT) as plain,
            context.wrap_socket(plain, server_hostname=host),
        ):
            return ""
    except ssl.SSLCertVerificationError as error:
        return f"its certificate is not accepted: {error.verify_message}"
    except (ssl.SSLError, OSError) as error:
        return f"encryption fails: {getattr(error, 'reason', None) or error}"
