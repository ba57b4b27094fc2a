"""A Raspberry Pi's case: `python -m benchmarks.board --data DIR`.

SuperNode, ClientApp and training of `base` at 5 s x 4 share one memory cgroup of 4 GB; the
SuperLink runs outside it, on another machine in practice. Two rounds. The last line is one JSON
object.
"""

import dataclasses
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jsonargparse.typing import PositiveInt

from benchmarks.exchange_lab import Lab
from benchmarks.flower_processes import ROOT
from common import command, strict_json
from common.errors import ShortwaveError
from common.options import settings_parser
from common.settings import parse
from common.units import Size
from ssl_core.planning.memory_cgroup import capped


@dataclasses.dataclass(frozen=True, kw_only=True)
class BoardSettings:
    """The board, and what it trains on."""

    data: Path
    """Corpus in LibriSpeech's layout."""
    cap: Size = Size.parse("4GB")
    """Memory of the cgroup, as in 4GB."""
    device: str = "rpi4-4gb"
    """Device profile that the client plans for."""
    encoding: str = "int8"
    """Encoding of messages."""
    rounds: PositiveInt = PositiveInt(2)
    """Rounds of the run."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run and print; returns the exit code."""
    parser = settings_parser(BoardSettings, prog="python -m benchmarks.board", description=__doc__)
    settings, _ = parse(BoardSettings, parser, arguments)
    data = settings.data.resolve()
    with tempfile.TemporaryDirectory(prefix="board-") as name, capped(settings.cap) as group:
        folder = Path(name)
        run = folder / "run"
        lab = Lab(
            folder / "lab", 1, data, plain=False, cgroup=str(group.folder),
            options=("--device", settings.device),
        )  # fmt: skip
        with lab:
            text = lab.run(
                ROOT,
                f"model='base' length='5s' batch=4 local-updates=1 rounds={settings.rounds} "
                f"clients-per-round=1 min-clients=1 held-out=0.0 encoding='{settings.encoding}' "
                f"output='{run}' data='{data}'",
            )
        path = run / "metrics.jsonl"
        rows = (
            [strict_json.loads(line) for line in path.read_text().splitlines()]
            if path.exists()
            else []
        )
        if len(rows) < settings.rounds:
            raise ShortwaveError(f"only {len(rows)} rounds were done: {text[-2000:]}")
        peak = group.peak_bytes()
    print(strict_json.dumps(result_of(rows, lab.peaks, settings.cap, peak)))
    return 0


def result_of(
    rows: Sequence[dict[str, Any]], peaks: dict[str, int], cap: int, cgroup_peak: int
) -> dict[str, Any]:
    """What is printed; sizes in bytes.

    Args:
        rows: metrics of each round.
        peaks: largest use of each kind of process.
        cap: limit of the cgroup.
        cgroup_peak: largest use of the cgroup, file cache included.
    """
    return {
        "cap": cap,
        "rounds": len(rows),
        "failures": sum(row["failures"] for row in rows),
        "cgroup_peak_with_file_cache": cgroup_peak,
        "device_peak": peaks["supernode"] + peaks["clientapp"],
        "supernode_peak": peaks["supernode"],
        "clientapp_peak": peaks["clientapp"],
        "training_process_peak": max(row["peak_bytes"] for row in rows),
        "predicted": max(row["predicted_bytes"] for row in rows),
        "allowed": max(row["memory_bytes"] for row in rows),
        "micro_batch": rows[-1]["micro_batch"],
        "fallbacks": sum(row["fallbacks"] for row in rows),
        "seconds_a_round": [row["round_seconds"] for row in rows],
    }


if __name__ == "__main__":
    command.run(main)
