"""Slot filling from end to end, on commands that the demo voices speak."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest

from ssl_core.downstream.corpora import slots
from ssl_core.finetune import main

pytest.importorskip("espeakng_loader", reason="espeak-ng is an optional extra")
ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def commands(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("commands") / "timers-and-such"
    # espeak-ng keeps its state for as long as a process lives.
    subprocess.run(
        [sys.executable, "-m", "benchmarks.spoken_commands", str(folder)], check=True, cwd=ROOT
    )
    return folder


def test_spoken_numbers_are_tagged_where_they_stand(commands: Path) -> None:
    data = slots.read(commands)
    assert (len(data.train), len(data.valid), len(data.test)) == (36, 6, 6)
    assert len({clip.speaker for clip in data.train}) == 6
    names = slots.slot_names(commands)
    shown = [slots.readable(clip.text, names) for clip in data.train]
    for text in shown:
        assert text.count("</>") == (3 if "<op>" in text else 1), text
        assert not any(symbol.isdigit() for symbol in text.replace("number1", "").replace(
            "number2", "")), text  # fmt: skip
    assert any(text.startswith("what is <number1>") for text in shown)
    assert any("set a timer for <minutes>" in text for text in shown)


@pytest.mark.slow
def test_a_frozen_backbone_learns_to_fill_slots(commands: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    arguments = [
        "--task", "slots", "--data", str(commands), "--checkpoint", "logmel", "--epochs", "40",
        "--recipe.lstm-units", "96", "--recipe.head-rate", "4e-3", "--output", str(run),
        "--threads", "1",
    ]  # fmt: skip
    assert main(arguments) == 0
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["loss"] < 0.2 * rows[0]["loss"]
    with open(run / "predictions.tsv", encoding="utf-8", newline="") as stream:
        table = list(csv.DictReader(stream, delimiter="\t", quoting=csv.QUOTE_NONE))
    assert len(table) == 6
    assert all("</>" in row["expected"] for row in table)
    result = json.loads((run / "result.json").read_text())
    # Nothing but the commonest symbols would score about 0.75.
    assert result["cer"] < 0.6
