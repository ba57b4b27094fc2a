"""Fine-tuning from the command line: results, resume to the same bytes, errors, the cache."""

import csv
import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import soundfile
import yaml
from small_corpora import (
    EMOTIONS,
    WORDS,
    emotions,
    speech_commands,
    timers,
    transcripts,
    utterances,
    voices,
    write_tone,
)
from small_models import save_backbone

from common import command
from common.errors import DataError, Interrupted, UsageError
from common.options import settings_parser
from common.process_environment import tuned
from common.settings import from_mapping, parse
from common.stop import Stop
from partitions.manifest import Piece
from ssl_core import finetune
from ssl_core.downstream.clip_loader import check
from ssl_core.downstream.clips import Clip, TaskData
from ssl_core.downstream.finetune_settings import FinetuneSettings
from ssl_core.downstream.metrics import (
    accuracy,
    character_error_rate,
    equal_error_rate,
    word_error_rate,
)
from ssl_core.downstream.task_recipe import FOLDER, TaskRecipe, recipe_of, tasks
from ssl_core.downstream.task_settings import TaskSettings
from ssl_core.finetune import main
from ssl_core.training import checkpoint
from ssl_core.training.tensor_file import write_tensors

OPTIONS = ["--threads", "1", "--epochs", "2"]
Maker = Callable[[Path], Path]
Row = dict[str, str]
CORPORA: dict[str, Maker] = {
    "kws35": speech_commands,
    "emotion": emotions,
    "speaker": voices,
    "verification": voices,
    "asr": utterances,
    "slots": timers,
}


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A checkpoint of random weights."""
    return str(save_backbone(tmp_path_factory.mktemp("backbone") / "model"))


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Speech Commands; to be read only."""
    return speech_commands(tmp_path_factory.mktemp("words") / "speech_commands_v0.02")


def predictions(run: Path) -> list[Row]:
    text = (run / "predictions.tsv").read_text(encoding="utf-8")
    return list(csv.DictReader(text.splitlines(), delimiter="\t", quoting=csv.QUOTE_NONE))


def result(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "result.json").read_text(encoding="utf-8"))
    return found


def parsed(*arguments: str) -> FinetuneSettings:
    """The settings of a command line."""
    return parse(FinetuneSettings, settings_parser(FinetuneSettings), arguments)[0]


def column(rows: list[Row], name: str) -> list[str]:
    return [row[name] for row in rows]


TASKS = [
    ("kws35", "backbone", []),
    ("kws35", "logmel", []),
    ("kws35", "backbone", ["--unfrozen", "--recipe.train-extractor", "--micro-batch", "3"]),
    ("emotion", "logmel", ["--fold", "2"]),
    ("speaker", "backbone", []),
    ("verification", "logmel", []),
    ("asr", "backbone", ["--recipe.head", "linear-ctc", "--unfrozen"]),
    ("slots", "backbone", ["--recipe.lstm-units", "8"]),
]


@pytest.mark.parametrize(("task", "upstream", "options"), TASKS)
def test_results_agree_with_the_predictions(
    task: str, upstream: str, options: list[str], backbone: str, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    data, run = CORPORA[task](tmp_path / "data"), tmp_path / "run"
    chosen = backbone if upstream == "backbone" else upstream
    arguments = ["--task", task, "--data", str(data), "--checkpoint", chosen, "--batch", "4"]
    assert main([*arguments, *OPTIONS, *options, "--output", str(run)]) == 0
    assert capsys.readouterr().out.strip().splitlines()[-1] == str(run)
    found, rows = result(run), predictions(run)
    assert found["task"] == task
    assert found["checkpoint"] == chosen
    assert found["backbone"] == ("unfrozen" if "--unfrozen" in options else "frozen")
    assert found["clips_skipped"] == 0
    if task == "verification":
        same = [row["same"] == "1" for row in rows]
        rate, threshold = equal_error_rate([float(row["cosine"]) for row in rows], same)
        assert found["eer"] == pytest.approx(rate, abs=1e-9)
        assert found["threshold"] == pytest.approx(threshold, abs=1e-5)
        assert (found["trials"], found["test_clips"]) == (15, 6)
        assert sum(same) == 6
        assert all(abs(float(row["cosine"])) <= 1.000001 for row in rows)
    else:
        expected, given = column(rows, "expected"), column(rows, "predicted")
        assert found["test_clips"] == len(rows) > 0
        if task == "asr":
            assert found["wer"] == pytest.approx(word_error_rate(expected, given))
            assert found["cer"] == pytest.approx(character_error_rate(expected, given))
            assert sorted(expected) == ["A CAD", "ACE", "BAD DAB"]
        elif task == "slots":
            assert sorted(expected) == [
                f"set <minutes>{word}</> minutes" for word in ("five", "nine", "two")
            ]
            assert 0 < found["cer"] <= 1
        else:
            assert found["accuracy"] == pytest.approx(accuracy(expected, given))
        assert (run / "confusion.png").exists() == (task not in ("asr", "slots"))
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in metrics] == [1, 2]
    name = {"asr": "wer", "slots": "cer"}.get(task, "accuracy")
    best = (min if name != "accuracy" else max)(row[f"valid_{name}"] for row in metrics)
    assert found[f"valid_{name}"] == best
    assert metrics[found["best_epoch"] - 1][f"valid_{name}"] == best
    assert all(np.isfinite(row["loss"]) and row["updates_skipped"] == 0 for row in metrics)
    assert ("backbone_rate" in metrics[0]) == ("--unfrozen" in options)
    config = yaml.safe_load((run / "config.yaml").read_text())
    recipe = config["recipe"]
    assert (config["task"], recipe["epochs"], recipe["batch"]) == (task, 2, 4)
    assert (run / "curves.png").stat().st_size > 1000
    assert (run / "model" / "task.json").exists()


def test_all_folds_are_taken_and_averaged(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, run = emotions(tmp_path / "data", 7), tmp_path / "run"
    arguments = ["--task", "emotion", "--data", str(data), "--checkpoint", "logmel"]
    assert main([*arguments, *OPTIONS, "--fold", "all", "--output", str(run)]) == 0
    assert "fold 3 of 3" in capsys.readouterr().out
    speakers, scores = [], []
    for fold in (1, 2, 3):
        rows = predictions(run / f"fold-{fold}")
        speakers.append({Path(clip).name[:2] for clip in column(rows, "clip")})
        scores.append(accuracy(column(rows, "expected"), column(rows, "predicted")))
        assert sorted(set(column(rows, "expected"))) == list(EMOTIONS)
        assert result(run / f"fold-{fold}")["accuracy"] == scores[-1]
    assert speakers == [{"00", "01"}, {"02", "03"}, {"04", "05", "06"}]
    found = result(run)
    assert found["folds"] == 3
    assert [found[f"fold_{fold}"] for fold in (1, 2, 3)] == scores
    assert found["accuracy_mean"] == pytest.approx(np.mean(scores))
    assert found["accuracy_deviation"] == pytest.approx(np.std(scores))


def test_training_hears_the_tones(words: Path, tmp_path: Path) -> None:
    """Log-mel frames tell the pitches apart within a few epochs."""
    arguments = ["--task", "kws35", "--data", str(words), "--checkpoint", "logmel", "--batch", "4"]
    options = ["--epochs", "40", "--recipe.head-rate", "0.03", "--threads", "1"]
    assert main([*arguments, *options, "--output", str(tmp_path / "run")]) == 0
    found = result(tmp_path / "run")
    assert found["accuracy"] == found["valid_accuracy"] == 1.0
    metrics = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    rates = [json.loads(line)["head_rate"] for line in metrics]
    assert rates[0] == 0.03
    assert rates[-1] == pytest.approx(1e-4)
    assert rates == sorted(rates, reverse=True)


def content(run: Path) -> dict[str, bytes]:
    """What a run has come to: newest checkpoint, best weights, model, predictions, result."""
    newest = checkpoint.latest(run / "checkpoints")
    assert newest is not None
    files = [*newest.iterdir(), *(run / "best").iterdir(), *(run / "model").iterdir()]
    files += [run / "predictions.tsv", run / "result.json"]
    return {str(path.relative_to(run)): path.read_bytes() for path in files}


def rows_of(run: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.endswith("_seconds")} for row in rows]


NEVER = 10**6


class StopAfter(Stop):
    """Asked to stop from the n-th look on."""

    looks = NEVER

    def __call__(self) -> bool:
        StopAfter.looks -= 1
        return StopAfter.looks <= 0


SMALL_LSTM = ["--recipe.lstm-units", "8", "--recipe.dropout", "0.3"]
SETTINGS = {
    "frozen": ("kws35", speech_commands, []),
    "frozen, no cache": ("kws35", speech_commands, ["--cache", "0"]),
    "unfrozen": (
        "asr",
        utterances,
        ["--unfrozen", *SMALL_LSTM, "--recipe.train-extractor", "true"],
    ),
    "convolutions kept": ("slots", timers, ["--unfrozen", *SMALL_LSTM]),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_an_interrupted_run_goes_on_to_the_same_bytes(
    name: str, backbone: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task, make, options = SETTINGS[name]
    arguments = ["--task", task, "--data", str(make(tmp_path / "data")), "--checkpoint", backbone]
    arguments += ["--threads", "1", "--batch", "2", "--epochs", "3", *options]
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert main([*arguments, "--output", str(whole)]) == 0
    monkeypatch.setattr(finetune, "Stop", StopAfter)
    updates = {"kws35": 8, "asr": 3, "slots": 3}[task]
    # In the first epoch, about the end of one, and in the next.
    resume = ["--resume", str(stopped)]
    for looks, begin in (
        (2, [*arguments, "--output", str(stopped)]),
        (updates, resume),
        (2, resume),
    ):
        StopAfter.looks = looks
        with pytest.raises(
            Interrupted, match=rf"interrupted after .*; go on with --resume {stopped}$"
        ):
            main(begin)
    StopAfter.looks = NEVER
    assert main(resume) == 0
    assert content(stopped) == content(whole)
    assert rows_of(stopped) == rows_of(whole)
    # A whole run that is resumed changes nothing.
    assert main(resume) == 0
    assert content(stopped) == content(whole)


def test_stopped_in_a_later_fold_the_whole_run_can_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = emotions(tmp_path / "data")
    arguments = ["--task", "emotion", "--data", str(data), "--checkpoint", "logmel"]
    arguments += [*OPTIONS, "--fold", "all"]
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert main([*arguments, "--output", str(whole)]) == 0
    monkeypatch.setattr(finetune, "Stop", StopAfter)
    StopAfter.looks = 9
    with pytest.raises(Interrupted, match=rf"go on with --resume {stopped}$"):
        main([*arguments, "--output", str(stopped)])
    assert (stopped / "fold-1" / "result.json").exists()
    assert not (stopped / "result.json").exists()
    StopAfter.looks = NEVER
    assert main(["--resume", str(stopped)]) == 0
    for fold in (1, 2, 3):
        assert content(stopped / f"fold-{fold}") == content(whole / f"fold-{fold}")
    assert result(stopped) == result(whole)


def test_stopped_while_features_are_made_the_run_can_go_on(
    words: Path, backbone: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["--task", "kws35", "--data", str(words), "--checkpoint", backbone, *OPTIONS]
    monkeypatch.setattr(finetune, "Stop", StopAfter)
    StopAfter.looks = 1
    with pytest.raises(Interrupted, match=r"after 0 clips of 32; go on with --resume .*run$"):
        main([*arguments, "--output", str(tmp_path / "run")])
    StopAfter.looks = NEVER
    assert main(["--resume", str(tmp_path / "run")]) == 0
    assert len(rows_of(tmp_path / "run")) == 2


@pytest.mark.slow
def test_ctrl_c_saves_and_the_resumed_run_gives_the_same_bytes(
    words: Path, backbone: str, tmp_path: Path
) -> None:
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    arguments = ["--task", "kws35", "--data", str(words), "--checkpoint", backbone]
    arguments += ["--threads", "1", "--epochs", "25", "--batch", "1"]
    assert main([*arguments, "--output", str(whole)]) == 0
    process = subprocess.Popen(
        [sys.executable, "-m", "ssl_core.finetune", *arguments, "--output", str(stopped)],
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        env=dict(os.environ),
    )
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("epoch 2/"):
            assert tuned(found := psutil.Process(process.pid).environ()) == found
            process.send_signal(signal.SIGINT)
            break
    rest = process.stderr.read()
    assert process.wait(timeout=120) == 130
    assert "Traceback" not in rest
    assert f"--resume {stopped}" in rest
    assert main(["--resume", str(stopped)]) == 0
    assert content(stopped) == content(whole)


def test_a_run_is_resumed_with_its_own_settings(
    words: Path, backbone: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = str(tmp_path / "run")
    arguments = ["--task", "kws35", "--data", str(words), "--checkpoint", backbone, *OPTIONS]
    assert main([*arguments, "--output", run]) == 0
    for option, value, name, was, now in (
        ("--epochs", "7", "recipe.epochs", "2", "7"),
        ("--seed", "1", "seed", "0", "1"),
        ("--recipe.head-rate", "1", "recipe.head-rate", "0.001", "1.0"),
        ("--checkpoint", "random", "checkpoint", f"'{backbone}'", "'random'"),
    ):
        text = rf"--resume {run}: {name} was {was} there and is {now} now$"
        with pytest.raises(UsageError, match=text):
            main(["--resume", run, option, value])
    with pytest.raises(UsageError, match="backbone was 'frozen' there and is 'unfrozen' now"):
        main(["--resume", run, "--unfrozen"])
    (tmp_path / "more.yaml").write_text("epoch: 3\n")
    code, error = failed(["--resume", run, "--config", str(tmp_path / "more.yaml")], capsys)
    assert (code, "unknown setting 'epoch'; did you mean 'epochs'" in error) == (2, True), error
    with pytest.raises(UsageError, match="is not empty: choose another, or go on with --resume"):
        main([*arguments, "--output", run])
    assert main(["--resume", run, "--cache", "1MiB", "--keep", "1", "--epochs", "2"]) == 0


def test_a_run_goes_on_by_its_recipe_whatever_becomes_of_the_file(
    words: Path, tmp_path: Path
) -> None:
    file, run = tmp_path / "own.yaml", tmp_path / "run"
    text = (FOLDER / "kws35.yaml").read_text()
    file.write_text(text.replace("epochs: 100", "epochs: 2") + "epsilon: 1.0e-7\n")
    arguments = ["--task", "kws35", "--data", str(words), "--checkpoint", "logmel"]
    settings = ["--recipe", str(file), "--recipe.head-rate", "2e-3", "--threads", "1"]
    assert main([*arguments, *settings, "--output", str(run)]) == 0
    file.unlink()
    kept = parsed("--resume", str(run)).recipe
    assert (kept.epochs, kept.epsilon, kept.head_rate) == (2, 1e-7, 2e-3)
    assert dataclasses.replace(kept, epochs=100, epsilon=1e-8, head_rate=1e-3) == recipe_of("kws35")
    assert main(["--resume", str(run)]) == 0


def test_settings_in_a_file(words: Path, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(
        f"task: kws35\ndata: {words}\ncheckpoint: logmel\nepochs: 3\nthreads: 1\n"
    )
    arguments = ["--config", str(tmp_path / "run.yaml"), "--epochs", "1"]
    assert main([*arguments, "--output", str(tmp_path / "run")]) == 0
    assert len(rows_of(tmp_path / "run")) == 1
    again = ["--config", str(tmp_path / "run" / "config.yaml"), "--output", str(tmp_path / "again")]
    assert main(again) == 0
    assert content(tmp_path / "again") == content(tmp_path / "run")


def test_features_are_computed_once_for_all_runs(
    words: Path, backbone: str, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    arguments = ["--task", "kws35", "--data", str(words), "--checkpoint", backbone, *OPTIONS]

    def computed(name: str, *options: str) -> bool:
        assert main([*arguments, *options, "--output", str(tmp_path / name)]) == 0
        return "32 clips went through the frozen" in capsys.readouterr().out

    assert computed("first")
    from ssl_core.wav2vec2.model import Backbone

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the backbone was run again")

    with monkeypatch.context() as patched:
        patched.setattr(Backbone, "contextualise", refuse)
        assert not computed("second", "--seed", "1")
    assert computed("bf16", "--precision", "bf16")
    assert computed("convolutions", "--unfrozen")
    assert not computed("waveforms", "--unfrozen", "--recipe.train-extractor")
    assert not computed("off", "--cache", "0")
    assert content(tmp_path / "first").keys() == content(tmp_path / "off").keys()


def test_what_is_not_kept_is_said(
    words: Path, backbone: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--task", "kws35", "--data", str(words), "--checkpoint", backbone, *OPTIONS]
    assert main([*arguments, "--cache", "20KiB", "--output", str(tmp_path / "a")]) == 0
    assert "some features are computed again in every epoch" in capsys.readouterr().out
    whole = ["--unfrozen", "--recipe.train-extractor", "true"]
    assert main([*arguments, *whole, "--output", str(tmp_path / "b")]) == 0
    assert "computed again" not in capsys.readouterr().out


def spoil(root: Path) -> dict[str, int]:
    """Spoil clips to train on, and make others unusual; the reasons to skip the former."""
    folder = root / "up"
    soundfile.write(folder / "aa00c1e7_nohash_0.wav", np.zeros(4800), 16_000)
    write_tone(folder / "aa01_nohash_0.wav", 500, 300)
    name = folder / "aa02_nohash_0.wav"
    soundfile.write(name, np.random.default_rng(0).uniform(-1, 1, 40_000), 16_000, format="FLAC")
    name.write_bytes(name.read_bytes()[:40_000])
    nothing = np.full(4800, np.nan)
    soundfile.write(folder / "aa03_nohash_0.wav", nothing, 16_000, subtype="FLOAT")
    write_tone(root / "no" / "aa00c1e7_nohash_0.wav", 500, 4800, channels=2)
    write_tone(root / "no" / "aa01_nohash_0.wav", 500, 9600, rate=44_100)
    write_tone(root / "no" / "aa02_nohash_0.wav", 500, 2400, rate=8_000)
    return {"silent": 1, "too short": 1, "truncated": 1, "not finite": 1}


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ([], "the validation loss is not finite after update 2"),
        (["--batch", "1"], r"the gradient is not finite from update \d+ on \(10 updates\)"),
    ],
)
def test_a_run_that_diverges_fails_and_keeps_no_such_weights(
    words: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str],
    problem: str,
) -> None:  # fmt: skip
    arguments = [
        "--task", "kws35", "--data", str(words), "--checkpoint", "logmel", *OPTIONS,
        "--recipe.head-rate", "3e38", "--batch", "8", *options, "--output", str(tmp_path / "run"),
    ]  # fmt: skip
    with pytest.raises(SystemExit) as stopped:
        command.run(lambda _: main(arguments))
    assert stopped.value.code == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert re.search(f"^error: training has diverged: {problem}; no checkpoint was saved", error)
    assert not (tmp_path / "run" / "best").exists()
    assert not (tmp_path / "run" / "result.json").exists()
    metrics = tmp_path / "run" / "metrics.jsonl"
    if metrics.exists():
        assert "NaN" not in metrics.read_text()
        assert rows_of(tmp_path / "run")[0]["valid_loss"] is None


@pytest.mark.parametrize("options", [[], ["--unfrozen", "--recipe.train-extractor", "true"]])
def test_clips_that_cannot_be_used_are_skipped_and_reported(
    options: list[str], backbone: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = speech_commands(tmp_path / "words")
    reasons = spoil(root)
    arguments = ["--task", "kws35", "--data", str(root), "--checkpoint", backbone, *OPTIONS]
    assert main([*arguments, *options, "--output", str(tmp_path / "run")]) == 0
    output = capsys.readouterr().out
    for reason, count in reasons.items():
        assert f"skipped, {reason}: {count}" in output
    assert result(tmp_path / "run")["clips_skipped"] == 4
    assert [row["clips_skipped"] for row in rows_of(tmp_path / "run")] == [4, 4]
    assert all(np.isfinite(row["loss"]) for row in rows_of(tmp_path / "run"))


def test_when_no_clip_can_be_used_the_error_shows_one(tmp_path: Path) -> None:
    root = speech_commands(tmp_path / "words")
    for path in root.rglob("*.wav"):
        soundfile.write(path, np.zeros(4800), 16_000)
    arguments = ["--task", "kws35", "--data", str(root), "--checkpoint", "logmel", *OPTIONS]
    for options in ([], ["--cache", "0"]):
        with pytest.raises(DataError, match=r"none of the clips can be used, such as: .*silence"):
            main([*arguments, *options, "--output", str(tmp_path / f"run{len(options)}")])


def test_a_trial_of_a_broken_file_is_found_before_training(tmp_path: Path) -> None:
    root = voices(tmp_path / "voices")
    soundfile.write(root / "wav" / "id9" / "video0" / "00002.wav", np.zeros(4800), 16_000)
    arguments = ["--task", "verification", "--data", str(root), "--checkpoint", "logmel", *OPTIONS]
    for options in ([], ["--cache", "0"]):
        run = tmp_path / f"run{len(options)}"
        with pytest.raises(
            DataError, match=r"1 files of the trials .* such as wav/id9/video0/00002\.wav"
        ):
            main([*arguments, *options, "--output", str(run)])
        assert (run / "metrics.jsonl").exists() == bool(options)


def test_silence_is_a_class_of_its_own(tmp_path: Path) -> None:
    """Digital silence is a clip like any other where silence is what is to be found."""
    from ssl_core.downstream.corpora.kws import COMMANDS, NOISE

    root = tmp_path / "words"
    names: dict[str, list[str]] = {"validation": [], "testing": []}
    for place, word in enumerate((*COMMANDS, "bed")):
        for number, kind in enumerate(("", "validation", "testing")):
            name = f"{word}/aa{number}_nohash_0.wav"
            write_tone(root / name, 100 * (place + 1))
            if kind:
                names[kind].append(name)
    for kind, listed in names.items():
        (root / f"{kind}_list.txt").write_text("\n".join(listed) + "\n")
    (root / NOISE).mkdir()
    soundfile.write(root / NOISE / "hum.wav", np.zeros(16_000 * 8), 16_000)
    arguments = ["--task", "kws12", "--data", str(root), "--checkpoint", "logmel", *OPTIONS]
    assert main([*arguments, "--output", str(tmp_path / "run")]) == 0
    assert result(tmp_path / "run")["clips_skipped"] == 0
    assert "silence" in column(predictions(tmp_path / "run"), "expected")


def failed(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """Exit code and error of a command."""
    with pytest.raises(SystemExit) as stopped:
        command.run(lambda _: main(arguments))
    error = capsys.readouterr().err
    assert "Traceback" not in error
    assert isinstance(stopped.value.code, int)
    return stopped.value.code, error


KWS = ["--task", "kws35", "--data", "{words}", "--checkpoint", "logmel"]


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        ([], 2, "--task: say which"),
        (["--task", "kws13"], 2, "no task 'kws13'"),
        (["--task", "kws_12"], 2, "did you mean 'kws12'"),
        (["--task", "verificaton"], 2, "did you mean 'verification'"),
        (["--task", "kws35"], 2, "--checkpoint: give a directory, or one of random, logmel"),
        (["--task", "kws35", "--checkpoint", "logmel"], 2, "--data: give the corpus of kws35"),
        (
            ["--task", "emotion", "--checkpoint", "logmel", "--fold", "all"],
            2,
            "--data: give the corpus of emotion",
        ),
        ([*KWS, "--epoch", "2"], 2, "did you mean 'epochs'"),
        ([*KWS, "--epochs", "two"], 2, "'two' is not a whole number"),
        ([*KWS, "--epochs", "-1"], 2, "epochs must be at least 1"),
        ([*KWS, "--unfrozen"], 2, "logmel has no backbone to unfreeze"),
        ([*KWS, "--beam", "5"], 2, "are for transcription; kws35 has classes"),
        ([*KWS, "--fold", "2"], 2, "--fold is for emotion"),
        ([*KWS, "--cache", "lots"], 2, "'lots' is not a size"),
        ([*KWS, "--micro-batch", "-2"], 2, "micro-batch"),
        ([*KWS, "--device", "tpu9"], 2, "tpu9"),
        ([*KWS, "--recipe.head-rat", "1"], 2, "did you mean 'recipe.head-rate'"),
        ([*KWS, "--recipe.head-rate"], 2, "--recipe.head-rate: expected one argument"),
        ([*KWS, "--recipe.head-rate", "'1"], 2, "--recipe.head-rate: ''1' is not a number"),
        ([*KWS, "--recipe.head-rate", "0"], 2, "head-rate must be above zero"),
        ([*KWS, "--recipe.head-rate", ".inf"], 2, "head-rate must be finite"),
        ([*KWS, "--recipe.weight-decay", ".nan"], 2, "weight-decay must be finite"),
        ([*KWS, "--recipe.dropout", "1"], 2, "dropout must be in [0, 1)"),
        ([*KWS, "--recipe.head", "lstm"], 2, "'lstm' is not one of"),
        ([*KWS, "--recipe.head", "lstm-ctc"], 2, "lstm-ctc cannot be scored by accuracy"),
        (
            [*KWS, "--recipe.head", "lstm-ctc", "--recipe.metric", "wer"],
            2,
            "lstm-ctc transcribes; kws35 needs one to classify",
        ),
        ([*KWS, "--recipe.metric", "eer"], 2, "kws35 cannot be scored by eer: it has no trials"),
        (
            ["--task", "verification", "--checkpoint", "logmel", "--recipe.head", "mean-linear"],
            2,
            "verification needs the head x-vector",
        ),
        ([*KWS, "--recipe", "{tmp}/none.yaml"], 2, "cannot read"),
        ([*KWS, "--resume", "{tmp}/none"], 2, "no run is there"),
        ([*KWS, "--output", "{words}"], 2, "is not empty"),
        (
            ["--task", "kws35", "--data", "{tmp}/none", "--checkpoint", "logmel"],
            1,
            "no such folder",
        ),
        (["--task", "asr", "--data", "{words}", "--checkpoint", "logmel"], 1, "layout"),
        (["--task", "slots", "--data", "{words}", "--checkpoint", "logmel"], 1, "layout"),
        (["--task", "emotion", "--data", "{words}", "--checkpoint", "logmel"], 1, "layout"),
        (["--task", "speaker", "--data", "{words}", "--checkpoint", "logmel"], 1, "layout"),
        (
            ["--task", "kws35", "--data", "{words}", "--checkpoint", "{tmp}"],
            1,
            "is not a checkpoint",
        ),
        (
            ["--task", "kws35", "--data", "{words}", "--checkpoint", "random", "--model", "big"],
            2,
            "no model 'big'",
        ),
    ],
)
def test_wrong_input_is_one_clear_line(
    words: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    code: int,
    text: str,
) -> None:
    chosen = [argument.format(tmp=tmp_path, words=words) for argument in arguments]
    if not {"--output", "--resume"} & set(chosen):
        chosen += ["--output", str(tmp_path / "run")]
    found, error = failed([*chosen, "--threads", "1"], capsys)
    assert found == code, error
    assert text in error
    assert len(error.strip().splitlines()) == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("option", ["--recipe", "--config"])
@pytest.mark.parametrize(
    ("content", "text"),
    [("head: [", "while parsing a flow node"), ("heads: lstm-ctc", "unknown setting '")],
)
def test_bad_settings_files_are_one_clear_line(
    option: str, content: str, text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "own.yaml").write_text(content)
    arguments = ["--task", "kws35", "--data", "words", "--checkpoint", "logmel", option]
    code, error = failed([*arguments, str(tmp_path / "own.yaml")], capsys)
    assert (code, text in error, len(error.strip().splitlines())) == (2, True, 1), error


def test_bad_corpora_are_one_clear_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = speech_commands(tmp_path / "words")
    (root / "testing_list.txt").unlink()
    base = ["--checkpoint", "logmel", *OPTIONS, "--output", str(tmp_path / "run")]
    code, error = failed(["--task", "kws35", "--data", str(root), *base], capsys)
    assert (code, "no testing_list.txt" in error) == (1, True), error

    root = voices(tmp_path / "voices")
    with open(root / "veri_test.txt", "a") as stream:
        stream.write("1 id9/video0/00000.wav id9/video0/00009.wav\n")
    code, error = failed(["--task", "verification", "--data", str(root), *base], capsys)
    assert (code, "veri_test.txt:16: wav/id9/video0/00009.wav is missing" in error) == (1, True)

    root = transcripts(tmp_path / "speech", "train-clean-100", ("A", "B"))
    transcripts(root, "dev-clean", ("",), 8)
    transcripts(root, "test-clean", ("A",), 9)
    code, error = failed(["--task", "asr", "--data", str(root), *base], capsys)
    assert code == 1, error
    assert "no clip to validate on" in error
    assert "no transcript: 1" in error
    code, error = failed(
        ["--task", "asr", "--data", str(root), "--train", "train-clean-10", *base], capsys
    )
    assert code == 2, error
    assert "did you mean 'train-clean-100'" in error
    assert not (tmp_path / "run").exists()


def test_a_beam_search_reads_the_test_set(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("flashlight.lib.text.decoder")
    root = utterances(tmp_path / "speech")
    arguments = ["--task", "asr", "--data", str(root), "--checkpoint", "logmel", *OPTIONS]
    arguments += ["--recipe.lstm-units", "8", "--output", str(tmp_path / "run"), "--words"]
    code, error = failed([*arguments, str(tmp_path / "words")], capsys)
    assert (code, "need a beam search" in error) == (2, True), error
    code, error = failed([*arguments, str(tmp_path / "words"), "--beam", "5"], capsys)
    assert (code, "words: no such file" in error) == (2, True), error
    assert not (tmp_path / "run").exists()
    (tmp_path / "words").write_text("A\nBAD\nDAB\n")
    assert main([*arguments, str(tmp_path / "words"), "--beam", "5"]) == 0
    found = column(predictions(tmp_path / "run"), "predicted")
    assert {word for text in found for word in text.split()} <= {"A", "BAD", "DAB"}


def test_an_interrupt_exits_with_130(
    words: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(finetune, "Stop", StopAfter)
    StopAfter.looks = 2
    arguments = ["--task", "kws35", "--data", str(words), "--checkpoint", "logmel", *OPTIONS]
    code, error = failed([*arguments, "--batch", "2", "--output", str(tmp_path / "run")], capsys)
    assert code == 130
    assert f"go on with --resume {tmp_path / 'run'}" in error


@pytest.mark.parametrize("save", [1, 2])
def test_a_full_disk_is_one_clear_line_and_the_run_goes_on(
    save: int, words: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    arguments = ["--task", "kws35", "--data", str(words), "--checkpoint", "logmel", *OPTIONS]
    whole, run = tmp_path / "whole", tmp_path / "run"
    assert main([*arguments, "--output", str(whole)]) == 0
    calls = iter(range(1, 100))

    def full(path: Path, *rest: Any, **named: Any) -> None:
        if next(calls) == save * 2:  # in the middle of a checkpoint: weights and optimizer state
            raise OSError(28, "No space left on device", str(path))
        write_tensors(path, *rest, **named)

    with monkeypatch.context() as patched:
        patched.setattr(checkpoint, "write_tensors", full)
        code, error = failed([*arguments, "--output", str(run)], capsys)
    assert code == 1
    assert "no space left on the disk" in error
    assert "resume the run" in error
    assert main(["--resume", str(run)]) == 0
    assert content(run) == content(whole)
    assert rows_of(run) == rows_of(whole)


def data_of(**changes: Any) -> TaskData:
    clips = (Clip(Piece("a.wav", 0, 400), label="up", text="UP"),)
    values: dict[str, Any] = {
        "root": Path("corpus"),
        "train": clips,
        "valid": clips,
        "test": clips,
        "labels": ("no", "up"),
    }
    return TaskData(**values | changes)


@pytest.mark.parametrize(
    ("task", "changes", "problem"),
    [
        ("kws35", {"train": ()}, "corpus: no usable clips to train"),
        (
            "kws35",
            {"test": (Clip(Piece("b.wav", 7, 400), label="left"),)},
            r"b\.wav@7 \(test\): its label 'left' is not in the training set \(no, up\)",
        ),
        (
            "speaker",
            {"labels": tuple(f"id{n}" for n in range(20))},
            r"a\.wav \(train\): its label 'up' is not .* \(id0, .*, id7, \.\.\.\)",
        ),
        (
            "asr",
            {"valid": (Clip(Piece("b.wav", 0, 400), text=" "),)},
            r"b\.wav: its transcript is empty",
        ),
    ],
)
def test_clips_say_what_is_to_be_found(task: str, changes: dict[str, Any], problem: str) -> None:
    check(data_of(), recipe_of("kws35"))
    with pytest.raises(DataError, match=problem):
        check(data_of(**changes), recipe_of(task))


def test_every_recipe_loads_and_is_the_papers() -> None:
    assert tasks() == ("asr", "emotion", "kws12", "kws35", "slots", "speaker", "verification")
    assert sorted(path.stem for path in FOLDER.iterdir()) == list(tasks())
    for task in tasks():
        recipe = recipe_of(task)
        recipe.validate()
        assert recipe.transcribes == (recipe.metric in ("wer", "cer"))
        settings = from_mapping(TaskSettings, {"task": task}, "test")
        assert settings.recipe == recipe
        assert settings.step_plan().batch == recipe.batch
    batches = [recipe_of(task).batch for task in ("kws12", "slots", "emotion", "speaker", "asr")]
    assert batches == [32, 8, 4, 8, 6]  # Table 3


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("head: mean-linear\nmetric: accuracy\nbatches: 3\n", "unknown setting 'batches'; did you"),
        ("- a\n", "settings must be 'name: value' lines"),
        ("head: [", "is not YAML"),
    ],
)
def test_a_bad_recipe_file_is_named(tmp_path: Path, text: str, problem: str) -> None:
    (tmp_path / "own.yaml").write_text(text)
    with pytest.raises(UsageError, match=problem):
        recipe_of("kws12", tmp_path / "own.yaml")


def test_a_recipe_of_ones_own(tmp_path: Path) -> None:
    text = (FOLDER / "kws12.yaml").read_text().replace("batch: 32", "batch: 5")
    (tmp_path / "own.yaml").write_text(text)
    task = ["--task", "kws12", "--data", "words", "--checkpoint", "logmel"]
    own = ["--recipe", str(tmp_path / "own.yaml"), "--recipe.head-rate", "2e-3"]
    recipe = parsed(*task, *own).recipe
    assert (recipe.batch, recipe.head_rate, recipe.epochs) == (5, 0.002, 100)
    changed = parsed(*task, *own, "--recipe.beta1", "0.5", "--recipe.head-rate", "1e-5").recipe
    assert changed == dataclasses.replace(recipe, beta1=0.5, head_rate=1e-5)
    short = parsed(*task, "--epochs", "7", "--batch", "3").recipe
    assert short == dataclasses.replace(recipe_of("kws12"), epochs=7, batch=3)


@pytest.mark.parametrize(
    "changes",
    [
        {"batch": 0},
        {"epochs": 0},
        {"lstm_units": 0},
        {"backbone_rate": 0.0},
        {"clip_norm": -1.0},
        {"beta2": 1.0},
        {"anneal": 0.0},
        {"metric": "wer"},
        {"epsilon": float("nan")},
    ],
    ids=str,
)
def test_recipes_out_of_range_are_refused(changes: dict[str, Any]) -> None:
    recipe: TaskRecipe = dataclasses.replace(recipe_of("kws12"), **changes)
    with pytest.raises(UsageError):
        recipe.validate()


def test_words_of_the_corpus(words: Path) -> None:
    data = parsed("--task", "kws35", "--data", str(words), "--checkpoint", "logmel").read_data(1)
    assert data.labels == WORDS
    assert [len(data.train), len(data.valid), len(data.test)] == [16, 8, 8]
