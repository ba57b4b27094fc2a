"""What travels, how long it takes and what it weighs: `python -m benchmarks.exchange`.

A real SuperLink, K SuperNodes and as many ClientApps on loopback exchange weights of base's size,
with plain Flower (its FedAvg strategy, fp32) and with this project in its encodings, one after the
other in one process tree. Plain Flower's client and server hold transformers' model, as its users'
do. Clients do not train, they add noise: only the exchange is measured. Seconds are from the end of
the first round to that of the last, checkpoints included, which plain Flower does not write. The
held-out loss after some rounds of `tiny` on real speech is that of the Ray simulation, for each
encoding. The last line is one JSON object.
"""

import argparse
import contextlib
import itertools
import json
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console

from benchmarks.flower_processes import (
    ROOT,
    FlowerProcesses,
    free_port,
    wait_until,
    write_tones,
)
from common import command
from common.errors import ShortwaveError, UsageError
from common.units import format_bytes
from fl_client.environment import LEAN
from ssl_core.planning.trace import count_parameters
from ssl_core.training import checkpoint
from ssl_core.wav2vec2.config import preset

ENCODINGS = ("int8", "int4")
KINDS = {
    "superlink": ("flower-superlink",),
    "serverapp": ("flwr-serverapp",),
    "clientapp": ("flwr-clientapp",),
    "supernode": ("flower-supernode", "fl_client"),
}
"""Words in name or command line of each kind of process; Flower's starters are left out."""
CONNECTION = "exchange"
PLAIN_APP = """
import time

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from transformers import Wav2Vec2Config, Wav2Vec2ForPreTraining

client = ClientApp()
server = ServerApp()


@client.train()
def train(message: Message, context: Context) -> Message:
    model = Wav2Vec2ForPreTraining(Wav2Vec2Config())
    model.load_state_dict(message.content["arrays"].to_torch_state_dict())
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for value in model.parameters():
            value.add_(torch.randn(value.shape, generator=generator), alpha=1e-4)
    content = {
        "arrays": ArrayRecord(model.state_dict()),
        "metrics": MetricRecord({"num-examples": 1}),
    }
    return Message(RecordDict(content), reply_to=message)


class Timed(FedAvg):
    def aggregate_train(self, server_round, replies):
        found = super().aggregate_train(server_round, replies)
        with open(self.times, "a") as stream:
            stream.write(f"{time.time()}\\n")
        return found


@server.main()
def main(grid: Grid, context: Context) -> None:
    arrays = ArrayRecord(Wav2Vec2ForPreTraining(Wav2Vec2Config()).state_dict())
    clients = int(context.run_config["clients"])
    strategy = Timed(fraction_train=1.0, fraction_evaluate=0.0, min_train_nodes=clients,
                     min_available_nodes=clients)
    strategy.times = context.run_config["times"]
    with open(strategy.times, "w") as stream:
        stream.write(f"{time.time()}\\n")
    strategy.start(grid, arrays, num_rounds=int(context.run_config["rounds"]))
"""
PLAIN_PROJECT = """
[project]
name = "plain"
version = "1.0.0"
[tool.flwr.app]
publisher = "benchmark"
[tool.flwr.app.components]
serverapp = "plain:server"
clientapp = "plain:client"
[tool.flwr.app.config]
times = ""
clients = 4
rounds = 2
"""
NOISE_CLIENT = '''
"""The project's ClientApp, with noise in place of training."""

import collections

import torch

from fl_client import client_app, local_training
from ssl_core.training.pretraining_step import StepReport


def _noise(model, *_):
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for value in model.parameters():
            value.add_(torch.randn(value.shape, generator=generator), alpha=1e-4)
    fields = dict.fromkeys(StepReport.__dataclass_fields__, 1.0)
    report = StepReport(**(fields | {"applied": True, "crops": 1}))
    return local_training._Trained([report], {0}, collections.Counter())


local_training._train = _noise
app = client_app.app
'''


class Lab:
    """A SuperLink with K devices in processes of their own, and what they weigh together."""

    def __init__(
        self,
        folder: Path,
        clients: int,
        data: Path,
        plain: bool,
        cgroup: str = "",
        options: Sequence[str] = ("--device", "auto", "--memory", "8GB"),
    ) -> None:
        """`cgroup` is entered by every device; `options` are those of ours."""
        self.clients, self.data, self.plain = clients, data, plain
        self.cgroup, self.options = cgroup, options
        self.processes = FlowerProcesses(
            folder / "home",
            XDG_STATE_HOME=str(folder / "state"),
            OMP_WAIT_POLICY="passive",
            **({} if plain else LEAN),
        )
        self.peaks: dict[str, int] = {}
        self._stop = threading.Event()

    def __enter__(self) -> "Lab":
        try:
            self._begin()
        except BaseException:
            self.processes.end()
            raise
        threading.Thread(target=self._watch, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self.processes.end()

    def _begin(self) -> None:
        start, log = self.processes.start, self.processes.log
        port = free_port()
        address = f"127.0.0.1:{port}"
        (self.processes.home / "config.toml").write_text(
            f'[superlink.{CONNECTION}]\naddress = "{address}"\ninsecure = true\n'
        )
        link = start("flower-superlink", "--insecure", "--port", str(port))
        wait_until(
            lambda: link.poll() is None and b"Uvicorn running" in log.read_bytes(),
            "the SuperLink is up",
        )
        for number in range(self.clients):
            if self.plain:
                start(
                    "flower-supernode", "--insecure", "--superlink", address, "--port",
                    str(free_port()),
                )  # fmt: skip
                continue
            enter = f"echo $$ > {self.cgroup}/cgroup.procs; " if self.cgroup else ""
            start(
                "sh", "-c", enter + 'exec "$@"', "sh",
                sys.executable, "-m", "fl_client", *self.options,
                "--data", str(self.data), "--superlink", address,
                "--partition", f"{number}/{self.clients}",
            )  # fmt: skip

    def _watch(self) -> None:
        """Largest proportional set size of all processes together, and of each kind."""
        known: dict[int, str] = {}  # what it is of each process that was seen, empty for others
        for looks in itertools.count():
            if self._stop.wait(0.5):
                return
            if looks % 8 == 0:  # one that was seen before its own program ran is something else now
                known.clear()
            sizes = dict.fromkeys(KINDS, 0)
            there = set(psutil.pids())
            for identifier in there - known.keys():
                known[identifier] = self._kind(identifier)
            for identifier, kind in list(known.items()):
                if identifier not in there:
                    del known[identifier]
                elif kind:
                    with contextlib.suppress(OSError, IndexError):
                        text = Path(f"/proc/{identifier}/smaps_rollup").read_text()
                        sizes[kind] += 1024 * int(text.split("Pss:")[1].split()[0])
            for kind, size in (sizes | {"together": sum(sizes.values())}).items():
                self.peaks[kind] = max(self.peaks.get(kind, 0), size)

    def _kind(self, identifier: int) -> str:
        """Which of `KINDS` a process of this lab is; a child that has yet to begin is looked at."""
        with contextlib.suppress(psutil.Error):
            process = psutil.Process(identifier)
            if process.environ().get("FLWR_HOME") == str(self.processes.home):
                words = " ".join([process.name(), *process.cmdline()])
                return next((k for k, names in KINDS.items() if any(n in words for n in names)), "")
        return ""

    def run(self, app: Path, config: str) -> str:
        """`flwr run`, to its end."""
        words = ("flwr", "run", str(app), CONNECTION, "--stream", "-c", config)
        return self.processes.run(*words, timeout=1500).stdout


def run_plain(folder: Path, clients: int, rounds: int) -> dict[str, Any]:
    """Plain Flower's FedAvg."""
    app = folder / "app"
    app.mkdir(parents=True)
    (app / "plain.py").write_text(PLAIN_APP)
    (app / "pyproject.toml").write_text(PLAIN_PROJECT)
    times = folder / "times"
    with Lab(folder / "lab", clients, folder, plain=True) as lab:
        text = lab.run(app, f"times='{times}' clients={clients} rounds={rounds}")
        if not times.exists() or len(times.read_text().split()) <= rounds:
            raise ShortwaveError(f"plain Flower did not finish: {text[-2000:]}")
        stamps = [float(line) for line in times.read_text().split()]
    size = 4 * count_parameters(preset("base"))
    seconds = (stamps[-1] - stamps[1]) / (rounds - 1)
    return {"bytes": 2 * clients * size, "seconds": seconds, "peaks": lab.peaks}


def run_ours(folder: Path, clients: int, rounds: int, encoding: str) -> dict[str, Any]:
    """Our own exchange, with clients that add noise."""
    app, data = folder / "app", write_tones(folder / "data")
    app.mkdir()
    for name in ("partitions", "ssl_core", "fl_client", "fl_server"):
        shutil.copytree(ROOT / name, app / name, ignore=shutil.ignore_patterns("__pycache__"))
    (app / "noise_client.py").write_text(NOISE_CLIENT)
    project = (ROOT / "pyproject.toml").read_text()
    project = project.replace("fl_client.client_app:app", "noise_client:app")
    project = project.replace('    "partitions/**/*.py",', '    "*.py",\n    "partitions/**/*.py",')
    (app / "pyproject.toml").write_text(project)
    for name in ("README.md", "LICENSE"):
        shutil.copy(ROOT / name, app / name)
    run = folder / "run"
    with Lab(folder / "lab", clients, data, plain=False) as lab:
        text = lab.run(
            app,
            f"model='base' length='1s' batch=1 local-updates=1 rounds={rounds} "
            f"clients-per-round={clients} min-clients={clients} held-out=0.0 "
            f"encoding='{encoding}' keep={rounds} output='{run}' data='{data}'",
        )
        path = run / "metrics.jsonl"
        rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        if len(rows) < rounds:
            raise ShortwaveError(f"{encoding} did not finish: {text[-2000:]}")
    ends = [path.stat().st_mtime for _, path in checkpoint.numbered(run / "checkpoints")]
    if any(row["failures"] for row in rows):
        raise ShortwaveError(f"{encoding}: a client failed: {text[-2000:]}")
    return {
        "bytes": sum(row["bytes_sent"] + row["bytes_received"] for row in rows) / rounds,
        "seconds": (ends[-1] - ends[0]) / (rounds - 1),
        "peaks": lab.peaks,
    }


def run_exchange(clients: int, rounds: int, say: Console) -> dict[str, Any]:
    """Plain Flower, then each encoding; ratios to plain Flower."""
    result: dict[str, Any] = {"clients": clients, "rounds": rounds}
    found: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory(prefix="exchange-") as folder:
        for name in ("flower", *ENCODINGS):
            own = Path(folder) / name
            own.mkdir()
            if name == "flower":
                found[name] = run_plain(own, clients, rounds)
            else:
                found[name] = run_ours(own, clients, rounds, name)
            peaks = ", ".join(f"{k} {format_bytes(v)}" for k, v in found[name]["peaks"].items())
            say.print(
                f"{name}: {format_bytes(found[name]['bytes'])} and "
                f"{found[name]['seconds']:.1f} s a round; {peaks}",
                highlight=False,
            )
    flower = found["flower"]
    for name in ENCODINGS:
        own_run = found[name]
        result[f"bytes_ratio_{name}"] = own_run["bytes"] / flower["bytes"]
        result[f"seconds_ratio_vs_flower_{name}"] = own_run["seconds"] / flower["seconds"]
        peak = own_run["peaks"]["together"] / flower["peaks"]["together"]
        result[f"peak_ratio_vs_flower_{name}"] = peak
    result["seconds_ratio_vs_flower"] = result["seconds_ratio_vs_flower_int8"]
    result["peak_ratio_vs_flower"] = result["peak_ratio_vs_flower_int8"]
    result["runs"] = found
    return result


def run_accuracy(data: Path, rounds: int, say: Console) -> dict[str, Any]:
    """Held-out loss of tiny after some rounds, by encoding, and relative to fp32."""
    losses: dict[str, float] = {}
    with tempfile.TemporaryDirectory(prefix="exchange-") as folder:
        for encoding in ("fp32", "bf16", *ENCODINGS, "topk"):
            run = Path(folder) / encoding
            subprocess.run(
                [
                    sys.executable, str(ROOT / "simulation" / "run.py"), "--model", "tiny",
                    "--clients", "20", "--clients-per-round", "8", "--length", "5s", "--rounds",
                    str(rounds), "--encoding", encoding, "--data", str(data), "--output", str(run),
                    "--eval-crops", "64",
                ],
                check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=ROOT,
            )  # fmt: skip
            row = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
            losses[encoding] = row["held_out_loss"]
            say.print(
                f"{encoding}: held-out loss {row['held_out_loss']:.4f}, accuracy "
                f"{row['held_out_accuracy']:.3f} after {rounds} rounds",
                highlight=False,
            )
    return {
        "held_out_loss": losses,
        "held_out_loss_relative": {k: v / losses["fp32"] - 1 for k, v in losses.items()},
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print; returns the exit code."""
    parser = command.Parser(
        prog="python -m benchmarks.exchange",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    positive = command.argument(command.positive)
    parser.add_argument("--clients", type=positive, default=4, help="K, devices in every round")
    parser.add_argument("--rounds", type=positive, default=3, help="of the exchange")
    parser.add_argument("--data", type=Path, help="speech for the held-out loss; else it is left")
    parser.add_argument("--accuracy-rounds", type=positive, default=20, help="of the simulation")
    parser.add_argument("--accuracy", action="store_true", help="the held-out loss alone")
    options = parser.parse_args(arguments)
    if options.rounds < 2:
        raise UsageError("--rounds: the first is not counted, so at least 2")
    console = Console(stderr=True)
    result: dict[str, Any] = {}
    if not options.accuracy:
        result |= run_exchange(options.clients, options.rounds, console)
    if options.data is not None:
        result |= run_accuracy(options.data.resolve(), options.accuracy_rounds, console)
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    command.run(main)
