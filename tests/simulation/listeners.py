"""Finds the ports on which processes listen, and asks them without Ray's token."""

import contextlib
import socket
from collections.abc import Iterable

import grpc
import psutil

METHODS = (
    "NodeInfoGcsService/CheckAlive",
    "NodeManagerService/GetNodeStats",
    "ObjectManagerService/FreeObjects",
    "CoreWorkerService/GetCoreWorkerStats",
)
"""One method of each service of Ray 2.55: control store, raylet, object manager, driver/worker."""


def listeners(processes: Iterable[psutil.Process]) -> list[tuple[str, int]]:
    """Address and port of each listening socket that is not on loopback."""
    found = []
    for process in processes:
        with contextlib.suppress(psutil.Error):
            for each in process.net_connections("inet"):
                if each.status == psutil.CONN_LISTEN and each.laddr.ip not in ("127.0.0.1", "::1"):
                    anywhere = each.laddr.ip in ("::", "0.0.0.0")
                    found.append(("127.0.0.1" if anywhere else each.laddr.ip, each.laddr.port))
    return found


def refuses(host: str, port: int) -> bool:
    """Whether a server of Ray refuses a call without a token, by gRPC or HTTP."""
    with grpc.insecure_channel(f"{host}:{port}") as channel:
        for method in METHODS:
            code = _code(channel, method)
            if code != grpc.StatusCode.UNIMPLEMENTED:
                break
    if code != grpc.StatusCode.UNAVAILABLE:
        return code == grpc.StatusCode.UNAUTHENTICATED
    with socket.create_connection((host, port), timeout=30) as connection:
        connection.sendall(b"GET / HTTP/1.1\r\nHost: ray\r\n\r\n")
        return connection.recv(100).startswith(b"HTTP/1.1 401 ")


def _code(channel: grpc.Channel, method: str) -> grpc.StatusCode:
    try:
        channel.unary_unary(f"/ray.rpc.{method}")(b"", timeout=30)
    except grpc.RpcError as error:
        return error.code()
    return grpc.StatusCode.OK
