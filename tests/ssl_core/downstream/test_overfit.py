"""A handful of real utterances can be learnt by heart."""

import json
from pathlib import Path

import pytest

from ssl_core.downstream.corpora import asr
from ssl_core.finetune import main

SUBSETS = {"train-clean-100": (1, 20), "dev-clean": (2, 1), "test-clean": (3, 1)}
"""Speaker of each, and how often it holds every utterance."""


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        ["--epochs", "16", "--recipe.lstm-units", "64", "--recipe.lstm-layers", "1",
         "--recipe.dropout", "0", "--recipe.anneal", "1", "--recipe.head-rate", "0.01"],
        ["--unfrozen", "--epochs", "7", "--recipe.head", "linear-ctc", "--recipe.anneal", "1",
         "--recipe.backbone-anneal", "1", "--recipe.head-rate", "0.01",
         "--recipe.backbone-rate", "0.001"],
    ],
    ids=["lstm-ctc, frozen", "linear-ctc, unfrozen"],
)  # fmt: skip
def test_the_words_of_a_few_utterances_are_learnt(
    librispeech: Path, tmp_path: Path, options: list[str]
) -> None:
    real = asr.read(librispeech, ("train-clean-100",), (), ())
    shortest = sorted((*real.train, *real.valid), key=lambda clip: clip.piece.samples)[:3]
    for subset, (speaker, times) in SUBSETS.items():
        folder = tmp_path / "corpus" / subset / str(speaker) / "1"
        folder.mkdir(parents=True)
        lines = []
        for number, clip in enumerate(shortest * times):
            name = f"{speaker}-1-{number:04d}"
            (folder / f"{name}.flac").symlink_to(real.root / clip.piece.path)
            lines.append(f"{name} {clip.text}\n")
        (folder / f"{speaker}-1.trans.txt").write_text("".join(lines))
    run = tmp_path / "run"
    arguments = ["--task", "asr", "--data", str(tmp_path / "corpus"), "--batch", "3"]
    backbone = ["--checkpoint", "random", "--model", "tiny", "--threads", "1"]
    assert main([*arguments, *backbone, *options, "--output", str(run)]) == 0
    result = json.loads((run / "result.json").read_text())
    assert result["test_clips"] == 3
    assert result["wer"] < 0.05
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert rows[0]["valid_wer"] > 0.5
