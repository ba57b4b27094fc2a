"""A Raspberry Pi's case: `python -m benchmarks.board --data DIR`.

SuperNode, ClientApp and training of base at 5 s x 4 share one memory cgroup of 4 GB; the SuperLink
is outside, as it is in reality. Two rounds. The last line is one JSON object.
"""

import argparse
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks.exchange import Lab
from benchmarks.flower_processes import ROOT
from common import command
from common.errors import ShortwaveError
from common.units import parse_size
from ssl_core.planning.memory_cgroup import capped


def main(arguments: Sequence[str] | None = None) -> int:
    """Run and print; returns the exit code."""
    parser = command.Parser(
        prog="python -m benchmarks.board",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--data", type=Path, required=True, help="corpus in LibriSpeech's layout")
    parser.add_argument("--cap", type=command.argument(parse_size), default="4GB", help="of memory")
    parser.add_argument("--device", default="rpi4-4gb", help="profile that the client plans for")
    parser.add_argument("--encoding", default="int8", help="of messages")
    parser.add_argument("--rounds", type=command.argument(command.positive), default=2)
    options = parser.parse_args(arguments)
    data = options.data.resolve()
    with tempfile.TemporaryDirectory(prefix="board-") as name, capped(options.cap) as group:
        folder = Path(name)
        run = folder / "run"
        lab = Lab(
            folder / "lab", 1, data, plain=False, cgroup=str(group.folder),
            options=("--device", options.device),
        )  # fmt: skip
        with lab:
            text = lab.run(
                ROOT,
                f"model='base' length='5s' batch=4 local-updates=1 rounds={options.rounds} "
                f"clients-per-round=1 min-clients=1 held-out=0.0 encoding='{options.encoding}' "
                f"output='{run}' data='{data}'",
            )
        path = run / "metrics.jsonl"
        rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        if len(rows) < options.rounds:
            raise ShortwaveError(f"{len(rows)} rounds were done: {text[-2000:]}")
        peak = group.peak_bytes()
    print(
        json.dumps(
            {
                "cap": options.cap,
                "rounds": len(rows),
                "failures": sum(row["failures"] for row in rows),
                "cgroup_peak_with_file_cache": peak,
                "device_peak": lab.peaks["supernode"] + lab.peaks["clientapp"],
                "supernode_peak": lab.peaks["supernode"],
                "clientapp_peak": lab.peaks["clientapp"],
                "training_process_peak": max(row["peak_bytes"] for row in rows),
                "predicted": max(row["predicted_bytes"] for row in rows),
                "allowed": max(row["memory_bytes"] for row in rows),
                "micro_batch": rows[-1]["micro_batch"],
                "fallbacks": sum(row["fallbacks"] for row in rows),
                "seconds_a_round": [row["round_seconds"] for row in rows],
            }
        )
    )
    return 0


if __name__ == "__main__":
    command.run(main)
