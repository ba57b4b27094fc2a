"""A device: `python -m fl_client --device rpi4 --data DIR` starts a genuine Flower SuperNode."""

import dataclasses
import os
import re
import socket
import subprocess
import sys
import zlib
from collections.abc import Sequence
from pathlib import Path

from common.process_environment import restart

if __name__ == "__main__":
    restart()  # here, as ClientApps are forked from this process

from jsonargparse.typing import PositiveInt

from common import command
from common.errors import DataError, UsageError
from common.options import settings_parser
from common.settings import parse
from common.stop import signals
from common.units import Names, Seconds, Size
from fl_client import warm_start
from fl_client.contact import Watch, diagnose
from fl_client.environment import be_lean, be_quiet
from fl_client.identity import default_folder, identity
from fl_client.link_security import link_security
from fl_client.polling import quicken
from fl_client.unneeded import left_out
from partitions.librispeech import list_audio
from ssl_core.planning.device import AUTO
from ssl_core.planning.device_profiles import find_profile


@dataclasses.dataclass(frozen=True, kw_only=True)
class DeviceSettings:
    """What a device is, what it trains on, and where its SuperLink is."""

    device: str = AUTO
    """Device whose memory the step is planned for, such as rpi4; auto: this machine."""
    memory: Size | None = None
    """Plan the training step for a process of this size, as in 4GB; by default what the device has
    left for it, of this machine what there is at each round."""
    length: Seconds | None = None
    """Length of this device's crops, as in 5s, at most the run's; by default the run's."""
    devices: Path | None = None
    """YAML file with devices of your own."""
    data: Path | None = None
    """Corpus in LibriSpeech's layout, or the corpus of --task; needed."""
    subset: Names = Names()
    """Subsets of the corpus, separated by commas."""
    partition: str = ""
    """Train on part I (from 0) of N of the corpus, written I/N."""
    speakers: Names = Names()
    """Train on these speakers, separated by commas."""
    superlink: str = "127.0.0.1:8000"
    """HOST:PORT of the SuperLink."""
    root_certificates: Path | None = None
    """PEM file that the SuperLink is checked with."""
    key: Path | None = None
    """Private key of this node, ECDSA P-384, for a SuperLink that asks who it is; needs
    --root-certificates."""
    state: Path | None = None
    """Folder for what is kept between rounds; by default ~/.local/state/shortwave."""
    task: str = ""
    """The run fine-tunes this task, such as kws35; without it the run pretrains."""
    checkpoint: Path | None = None
    """With --task: this device's copy of the backbone's directory; by default the path that the run
    names."""
    threads: PositiveInt | None = None
    """CPU threads of this device; by default the run's, or all cores."""
    pause_temperature: float = 0.0
    """Pause training while the device is hotter than so many degrees Celsius."""
    pause_load: float = 0.0
    """Pause training while the load average, training included, is above this."""
    pause_memory: Size = Size(0)
    """Pause training while less memory than this is available, as in 500MB."""
    cold_start: bool = False
    """Start Python and PyTorch anew in every round: takes seconds longer, and leaves about 190 MB
    more to others between rounds."""
    insecure: bool = False
    """Do not encrypt, even off this machine."""
    port: PositiveInt | None = None
    """Local port of this SuperNode, one for each on a machine; by default a free one."""

    def validate(self) -> None:
        """Check values and that they fit together; raises `UsageError`."""
        if self.data is None:
            raise UsageError("--data: give the corpus that this device trains on")
        for name in ("pause_temperature", "pause_load"):
            if getattr(self, name) < 0:
                raise UsageError(f"--{name.replace('_', '-')} must not be below zero")
        if self.checkpoint and not self.task:
            raise UsageError("--checkpoint is for a --task; the run sends what it pretrains")
        if self.partition and self.speakers:
            raise UsageError("--partition and --speakers exclude each other")


def main(arguments: Sequence[str] | None = None) -> int:
    """Start the SuperNode; returns when it is stopped."""
    parser = settings_parser(DeviceSettings, prog="python -m fl_client", description=__doc__)
    options, _ = parse(DeviceSettings, parser, arguments)
    code = _check_data(options)
    if code:
        return code
    security = link_security(
        options.superlink, options.root_certificates, options.insecure, options.key
    )
    key, _lock = _number(options)
    node = _node_config(options, key)
    be_quiet()
    be_lean()
    # SuperNode looks for flower-superexec on PATH; it lies beside this interpreter.
    here = str(Path(sys.executable).parent)
    os.environ["PATH"] = here + os.pathsep + os.environ.get("PATH", "")
    os.environ.setdefault("FLWR_SUPEREXEC_TASK_POLL_INTERVAL", "0.2")
    port = options.port or _free_port()
    forks = None if options.cold_start else warm_start.begin(f"127.0.0.1:{port}")
    if forks is None and not options.cold_start:
        print("every round starts Python and PyTorch anew, as with --cold-start", flush=True)
    sys.argv = [
        "flower-supernode",
        "--superlink",
        options.superlink,
        "--port",
        str(port),
        "--isolation",
        "process" if forks else "subprocess",
        "--node-config",
        node,
        *security,
    ]
    print(f"SuperNode for {options.superlink}, device {options.device}: {node}", flush=True)
    if "--insecure" in security and not options.insecure:
        print(
            "not encrypted, as the SuperLink is on this machine; for one elsewhere give "
            "--root-certificates (`python -m fl_server certificates` makes them)",
            flush=True,
        )
    with left_out():
        import httpx
        from flwr.supernode.cli import flower_supernode

    watch = Watch(options.superlink, options.root_certificates, _say)
    watch.start()
    quicken(forks)
    if forks is not None:
        forks.watch(_say)
    with signals() as received:
        try:
            flower_supernode()
        except SystemExit as end:  # Flower's own handling of a signal ends with code 0
            if not (stopped := received()):
                return end.code if isinstance(end.code, int) else 1
            return 128 + stopped
        except (httpx.HTTPError, ImportError) as error:  # Flower does not try these again
            if watch.met:
                raise
            found = diagnose(options.superlink, options.root_certificates)
            raise DataError(f"no contact with the SuperLink: {error}; {found}") from None
    return 0


def _say(text: str) -> None:
    print(text, flush=True)


def _check_data(options: DeviceSettings) -> int:
    """Refuse now what would be refused in the first round; the exit code."""
    assert options.data is not None
    if not options.task:
        list_audio(options.data, options.subset)
        return 0
    given = (options.task, options.data, options.subset, options.checkpoint or "")
    command_line = [sys.executable, "-m", "fl_client.check_task", *map(str, given)]
    return subprocess.run(command_line).returncode


def _number(options: DeviceSettings) -> tuple[int, object]:
    """The number of a device without a partition, and a lock on it; 0 with one."""
    if options.partition:
        return 0, None
    data = str(Path(options.data or "").resolve())
    what = f"{data}\t{options.subset}\t{options.speakers}"
    former = 1_000_000 + zlib.crc32(f"{socket.gethostname()}\t{what}".encode()) % 1_000_000_000
    found = identity(options.state or default_folder(), what, former)
    if found.note:
        print(found.note, flush=True)
    return found.number, found.lock


def _node_config(options: DeviceSettings, key: int = 0) -> str:
    """Flower's node config, as text: the values by which this device differs from others.

    Args:
        options: of the command.
        key: the device's number, unless it has a partition.
    """
    partition, speakers, subset = options.partition, str(options.speakers), str(options.subset)
    folder = str(Path(options.data or "").resolve())
    values: dict[str, str | int | float] = {"device": options.device, "data": folder}
    if subset:
        values["subset"] = subset
    if partition:
        match = re.fullmatch(r"(\d+)/(\d+)", partition)
        if match is None or int(match[1]) >= int(match[2]):
            raise UsageError(f"--partition '{partition}' is not I/N with I from 0 to N - 1")
        values |= {"partition-id": int(match[1]), "num-partitions": int(match[2])}
    else:
        values["client-key"] = key
    if speakers:
        values["speakers"] = speakers
    if options.checkpoint:
        values["checkpoint"] = str(options.checkpoint.resolve())
    if options.state:
        values["state"] = str(options.state.resolve())
    memory: int | None = options.memory
    if options.device != AUTO:  # else read in every round, by the process that trains
        memory = memory or find_profile(options.device, options.devices).process_bytes
    limits: dict[str, int | float | None] = {
        "memory": memory,
        "length": options.length,
        "threads": options.threads,
        "pause-temperature": options.pause_temperature,
        "pause-load": options.pause_load,
        "pause-memory": options.pause_memory,
    }
    for name, value in limits.items():
        if value:
            values[name] = int(value) if isinstance(value, int) else float(value)
    if any(mark in str(value) for value in values.values() for mark in '"\\\n'):
        raise UsageError(
            'a " or \\ in --data, --subset, --speakers, --checkpoint or --device cannot be passed '
            "on"
        )
    return " ".join(
        f'{name}="{value}"' if isinstance(value, str) else f"{name}={value}"
        for name, value in values.items()
    )


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


if __name__ == "__main__":
    command.run(main)
