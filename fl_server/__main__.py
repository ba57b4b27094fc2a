"""`python -m fl_server`: what a SuperLink needs beside Flower's own commands."""

import dataclasses
import json
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from jsonargparse.typing import PositiveInt
from rich.console import Console
from rich.live import Live

from common import command
from common.errors import UsageError
from common.options import Parser, settings_parser
from common.settings import parse
from common.units import Names
from fl_server.certificates import (
    ALWAYS,
    AUTHORITY,
    SERVER,
    SERVER_KEY,
    hosts_of,
    make_certificates,
    node_names,
)
from fl_server.status import is_done, view

PROG = "python -m fl_server"


@dataclasses.dataclass(frozen=True, kw_only=True)
class CertificateSettings:
    """What certificates and keys to make."""

    output: Path | None = None
    """Folder for the files; needed."""
    host: Names = Names()
    """Names and IP addresses by which devices reach the SuperLink, beside localhost and
    127.0.0.1."""
    days: PositiveInt = PositiveInt(365)
    """Days that the SuperLink's certificate is valid."""
    nodes: Names = Names()
    """How many nodes (node-0, node-1, ...), or their names; one, or none with --extend, if not
    given."""
    extend: bool = False
    """Keep the files that are in the folder and make only what is missing: keys of further nodes,
    or a new certificate after server.pem and server.key were removed."""

    def validate(self) -> None:
        """Check values; raises `UsageError`."""
        if self.output is None:
            raise UsageError("--output: give the folder for the files")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one subcommand; returns the exit code."""
    commands = {
        "certificates": (
            "make certificates for an encrypted SuperLink, and a key for each node",
            _certificates,
        ),
        "watch": (
            "look on at a federation: who trains with what, peaks, replies, errors",
            _watch,
        ),
    }
    words = sys.argv[1:] if arguments is None else arguments
    return command.subcommand(PROG, str(__doc__), commands, words)


def _watch(arguments: Sequence[str] | None) -> None:
    description = "Show what a federation does, from its run directory, until it is done."
    parser = Parser(prog=f"{PROG} watch", description=description)
    parser.add_argument("directory", type=Path, help="run directory")
    parser.add_argument("--once", action="store_true", help="print it once")
    options = parser.parse_args(arguments)
    console = Console()
    if options.once:
        console.print(view(options.directory))
        return
    with Live(view(options.directory), console=console, auto_refresh=False) as live:
        while not is_done(options.directory):
            time.sleep(1)
            live.update(view(options.directory), refresh=True)
    print(options.directory)


def _certificates(arguments: Sequence[str] | None) -> None:
    description = (
        "Make a lab's own certificate authority, a certificate for the SuperLink and an ECDSA "
        "P-384 key pair for each node; prints the commands that use them. The last line is the "
        "folder."
    )
    parser = settings_parser(
        CertificateSettings, prog=f"{PROG} certificates", description=description
    )
    settings, _ = parse(CertificateSettings, parser, arguments)
    assert settings.output is not None
    nodes = node_names(settings.nodes or ([] if settings.extend else ["1"]))
    written = make_certificates(
        settings.output, settings.host, settings.days, nodes, extend=settings.extend
    )
    folder = settings.output.resolve()
    print(f"made: {', '.join(path.name for path in written) or 'nothing, all was there'}\n")
    print(next_commands(folder, hosts_of(folder), nodes))
    print(f"certificates and keys: {folder}")


def next_commands(folder: Path, hosts: Sequence[str], nodes: Sequence[str]) -> str:
    """What to run with the files, for a reader to copy.

    Args:
        folder: of the files.
        hosts: that the server certificate is for; the first is given to devices.
        nodes: that have been given keys.
    """

    def file(name: str) -> str:
        return shlex.quote(str(folder / name))

    others = [host for host in hosts if host not in ALWAYS]
    six = bool(others) and all(":" in host for host in others)  # an IPv6 network
    here = "::1" if six else "127.0.0.1"
    listen = f"--host {'::' if six else '0.0.0.0'} " if others else ""
    note = "" if others else " (for devices elsewhere, make certificates with --host)"
    text = f"""\
The SuperLink, on this machine{note}:

    flower-superlink {listen}--port 8000 --enable-supernode-auth \\
        --ssl-ca-certfile {file(AUTHORITY)} \\
        --ssl-certfile {file(SERVER)} --ssl-keyfile {file(SERVER_KEY)}

In ~/.flwr/config.toml of whoever starts runs:

    [superlink.lab]
    address = "{_host_and_port(here)}"
    root-certificates = {json.dumps(str(folder / AUTHORITY), ensure_ascii=False)}
"""
    if not nodes:
        return text
    register = "\n".join(f"    flwr supernode register {file(f'{n}.pub')} lab" for n in nodes)
    return f"""{text}
Then let the nodes in, while the SuperLink runs (it forgets them when it ends, but for --database):

{register}

On a node, with {AUTHORITY} and its own key copied there (all other keys stay here):

    python -m fl_client --data DIR --superlink {_host_and_port((others or [here])[0])} \\
        --root-certificates {AUTHORITY} --key {nodes[0]}.key
"""


def _host_and_port(host: str) -> str:
    return f"[{host}]:8000" if ":" in host else f"{host}:8000"


if __name__ == "__main__":
    command.run(main)
