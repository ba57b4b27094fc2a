"""Bytes, time and memory of the exchange of weights: `python -m benchmarks.exchange`.

A real SuperLink, K SuperNodes and K ClientApps on loopback exchange weights of the size of `base`,
first with plain Flower (its FedAvg strategy, fp32), then with this project in each encoding. Plain
Flower's client and server hold transformers' model, as its users' do. Clients add noise instead of
training, so that only the exchange is measured. Seconds run from the end of the first round to the
end of the last; they include writing checkpoints, which plain Flower does not do.

With --data, the held-out loss after some rounds of `tiny` on real speech is measured for each
encoding, in the Ray simulation. The last line is one JSON object.
"""

import dataclasses
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jsonargparse.typing import PositiveInt
from rich.console import Console

from benchmarks.exchange_apps import NOISE_CLIENT, PLAIN_APP, PLAIN_PROJECT
from benchmarks.exchange_lab import Lab
from benchmarks.flower_processes import ROOT, write_tones
from common import command, strict_json
from common.errors import ShortwaveError, UsageError
from common.options import settings_parser
from common.settings import parse
from common.units import format_bytes
from ssl_core.training import checkpoint
from ssl_core.training.pretraining_recipe import RECIPES
from ssl_core.training.pretraining_work import PretrainingWork
from ssl_core.wav2vec2.config import preset

ENCODINGS = ("int8", "int4")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExchangeSettings:
    """What is exchanged, and how often."""

    clients: PositiveInt = PositiveInt(4)
    """K, devices in every round."""
    rounds: PositiveInt = PositiveInt(3)
    """Rounds of the exchange, at least 2: the first is not counted."""
    data: Path | None = None
    """Speech for the held-out loss, which is skipped without it."""
    accuracy_rounds: PositiveInt = PositiveInt(20)
    """Rounds of the simulation before the held-out loss."""
    accuracy: bool = False
    """Measure the held-out loss only."""

    def validate(self) -> None:
        """Check values; raises `UsageError`."""
        if self.rounds < 2:
            raise UsageError("--rounds must be at least 2: the first round is not counted")


def run_plain(folder: Path, clients: int, rounds: int) -> dict[str, Any]:
    """Run plain Flower's FedAvg; bytes and seconds a round, and peaks by kind of process.

    Args:
        folder: new.
        clients: how many devices.
        rounds: at least 2.

    Raises:
        ShortwaveError: the run failed.
    """
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
    base = PretrainingWork(architecture=preset("base"), recipe=RECIPES["base"])
    size = 4 * base.trained_parameters()
    seconds = (stamps[-1] - stamps[1]) / (rounds - 1)
    return {"bytes": 2 * clients * size, "seconds": seconds, "peaks": lab.peaks}


def run_ours(folder: Path, clients: int, rounds: int, encoding: str) -> dict[str, Any]:
    """Run our exchange with clients that add noise; see `run_plain`.

    Args:
        folder: new.
        clients: how many devices.
        rounds: at least 2.
        encoding: of weights and updates.

    Raises:
        ShortwaveError: the run or a client failed.
    """
    app, data = folder / "app", write_tones(folder / "data")
    app.mkdir()
    for name in ("common", "partitions", "ssl_core", "fl_client", "fl_server"):
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
        rows = (
            [strict_json.loads(line) for line in path.read_text().splitlines()]
            if path.exists()
            else []
        )
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
    """Measure plain Flower, then each encoding, and their ratios to plain Flower.

    Args:
        clients: how many devices.
        rounds: at least 2.
        say: prints a line for each.
    """
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
    """Held-out loss of `tiny` after some rounds, by encoding, and relative to fp32.

    Args:
        data: corpus in LibriSpeech's layout.
        rounds: of the simulation.
        say: prints a line for each encoding.
    """
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
            row = strict_json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
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
    parser = settings_parser(
        ExchangeSettings, prog="python -m benchmarks.exchange", description=__doc__
    )
    settings, _ = parse(ExchangeSettings, parser, arguments)
    console = Console(stderr=True)
    result: dict[str, Any] = {}
    if not settings.accuracy:
        result |= run_exchange(settings.clients, settings.rounds, console)
    if settings.data is not None:
        result |= run_accuracy(settings.data.resolve(), settings.accuracy_rounds, console)
    print(strict_json.dumps(result))
    return 0


if __name__ == "__main__":
    command.run(main)
