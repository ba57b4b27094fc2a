"""The centralised baseline: results, resume to the same bytes, errors."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch

from common import command
from common.errors import UsageError
from common.process_environment import tuned
from ssl_core.train import main
from ssl_core.training import checkpoint
from ssl_core.training import hf_checkpoint as hf
from ssl_core.wav2vec2.config import ModelConfig

OPTIONS = [
    "--model", "tiny", "--architecture.num-hidden-layers", "1", "--length", "1s", "--batch", "3",
    "--eval-crops", "4", "--eval-every", "2", "--save-every", "3", "--threads", "1",
]  # fmt: skip


def content(run: Path) -> dict[str, bytes]:
    newest = checkpoint.latest(run / "checkpoints")
    assert newest is not None
    return {path.name: path.read_bytes() for path in newest.iterdir()}


@pytest.mark.slow
def test_sigterm_saves_and_the_resumed_run_gives_the_same_bytes(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    options = ["--data", str(corpus), *OPTIONS, "--updates", "40"]
    assert main([*options, "--output", str(whole)]) == 0
    assert capsys.readouterr().out.strip().splitlines()[-1] == str(whole)
    rows = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, 41))
    assert "held_out_accuracy" in rows[1]
    assert "held_out_accuracy" not in rows[0]
    assert (whole / "curves.png").stat().st_size > 1000

    process = subprocess.Popen(
        [sys.executable, "-m", "ssl_core.train", *options, "--output", str(stopped)],
        stderr=subprocess.PIPE,
        text=True,
        env=dict(os.environ),
    )
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("update 2/"):
            assert tuned(found := psutil.Process(process.pid).environ()) == found
            for _ in range(2):  # as `timeout` does
                process.send_signal(signal.SIGTERM)
            break
    rest = process.stderr.read()
    assert process.wait(timeout=60) == 143
    assert rest.splitlines()[-1].endswith(f"; go on with --resume {stopped}")
    assert main(["--resume", str(stopped)]) == 0
    assert content(stopped) == content(whole)
    metrics = (stopped / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in metrics] == list(range(1, 41))


def test_a_checkpoint_holds_the_optimizer_state_and_opens_as_a_model(
    corpus: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    assert main(["--data", str(corpus), *OPTIONS, "--updates", "2", "--output", str(run)]) == 0
    saved = checkpoint.load(run / "checkpoints" / "update-0000002")
    assert saved.state["next_update"] == 2
    model = hf.load_model(run / "checkpoints" / "update-0000002")
    for name, value in model.named_parameters():
        assert saved.optimizer_state[f"exp_avg/{name}"].shape == value.shape
    with pytest.raises(UsageError, match=r"--resume .*: updates was 2 there and is 3 now"):
        main(["--resume", str(run), "--updates", "3"])
    second = tmp_path / "second"
    again = ["--data", str(corpus), *OPTIONS, "--updates", "1", "--output", str(second)]
    assert main([*again, "--checkpoint", str(run / "checkpoints" / "update-0000002")]) == 0
    moved = hf.load_model(second / "checkpoints" / "update-0000001").state_dict()
    change = max(float((moved[n] - v).abs().max()) for n, v in model.state_dict().items())
    assert 0 < change < 0.01


@pytest.mark.parametrize(
    ("options", "code", "text"),
    [
        (["--updates", "0"], 2, "at least 1"),
        (["--updats", "5"], 2, "unknown setting 'updats'; did you mean 'updates'?"),
        (["--checkpoint", "{tmp}/none"], 1, "not a checkpoint"),
        (["--resume", "{tmp}/none"], 2, "no run"),
        (["--micro-batch", "1", "--recipe.negative-pool", "batch"], 2, "whole batch"),
    ],
)
def test_wrong_input_is_one_clear_line(
    corpus: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    code: int,
    text: str,
) -> None:
    chosen = [option.format(tmp=tmp_path) for option in options]
    arguments = ["--data", str(corpus), "--model", "tiny", "--length", "1s", *chosen]
    arguments += [] if "--resume" in chosen else ["--output", str(tmp_path / "run")]
    with pytest.raises(SystemExit) as stopped:
        command.run(lambda _: main(arguments))
    error = capsys.readouterr().err
    assert stopped.value.code == code, error
    assert text in error
    assert "Traceback" not in error


def test_a_failed_save_keeps_the_last_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = ModelConfig(num_hidden_layers=1)
    weights = {"a": torch.ones(3)}
    place = tmp_path / "round-00001"
    checkpoint.save(place, config, weights, state={"next_round": 1})

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(hf, "write_tensors", full)
    with pytest.raises(OSError, match="No space left"):
        checkpoint.save(tmp_path / "round-00002", config, weights, state={"next_round": 2})
    assert [path.name for path in tmp_path.iterdir()] == ["round-00001"]
    assert checkpoint.latest(tmp_path) == place
