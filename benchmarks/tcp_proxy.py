"""A TCP proxy whose connections can be cut during an upload."""

import contextlib
import socket
import struct
import threading
import time

from benchmarks.flower_processes import free_port


class Proxy:
    """Forwards connections to a port of loopback until they are cut."""

    def __init__(self, target: int) -> None:
        """Listen on a free port and forward to the port `target`."""
        self.target, self.port = target, free_port()
        self.was_cut = threading.Event()
        self._sockets: set[socket.socket] = set()
        self._lock = threading.Lock()
        self._left: int | None = None
        self._shut_until = 0.0
        self._away = 0.0
        self._ended = False
        threading.Thread(target=self._listen, daemon=True).start()

    def cut_after(self, sent: int, away: float) -> None:
        """Cut all connections after `sent` more bytes of upload, for `away` seconds."""
        with self._lock:
            self._left, self._away = sent, away

    def cut(self) -> None:
        """Reset all connections now."""
        with self._lock:
            self._left, self._shut_until = None, time.monotonic() + self._away
            sockets, self._sockets = self._sockets, set()
        for one in sockets:
            with contextlib.suppress(OSError):
                one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RD)
            one.close()
        self.was_cut.set()

    def close(self) -> None:
        """Stop listening and reset all connections."""
        self._ended = True
        self.cut()

    def _listen(self) -> None:
        while not self._ended:
            if time.monotonic() < self._shut_until:
                time.sleep(0.05)
                continue
            with socket.socket() as server:
                server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                server.bind(("127.0.0.1", self.port))
                server.listen()
                server.settimeout(0.05)
                while not self._ended and time.monotonic() >= self._shut_until:
                    with contextlib.suppress(TimeoutError):
                        self._join(server.accept()[0])

    def _join(self, near: socket.socket) -> None:
        near.settimeout(None)
        try:
            far = socket.create_connection(("127.0.0.1", self.target), timeout=5)
        except OSError:
            near.close()
            return
        far.settimeout(None)
        with self._lock:
            self._sockets |= {near, far}
        for source, sink, up in ((near, far, True), (far, near, False)):
            threading.Thread(target=self._pump, args=(source, sink, up), daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket, up: bool) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(2**14):
                due = False
                with self._lock:
                    if up and self._left is not None:
                        self._left -= len(data)
                        due = self._left <= 0
                if due:
                    sink.sendall(data[: len(data) // 2])
                    self.cut()
                    return
                sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)
        if not up:
            with self._lock:
                self._sockets -= {source, sink}
            for one in (source, sink):
                one.close()
