"""`simulation/run.py --task` as a user runs it: results, determinism, Ctrl-C and resume, bad input.

The same is tested without Ray, and in more ways, in `tests/fl_server/test_task_federation.py`.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from tone_words import WORDS, write_backbone, write_words
from transformers import Wav2Vec2Model

ROOT = Path(__file__).parents[2]
RUN = [sys.executable, str(ROOT / "simulation" / "run.py")]
SMALL = [
    "--task", "kws35", "--method", "fedper", "--share", "lora", "--lora-rank", "2", "--clients",
    "3", "--clients-per-round", "3", "--local-updates", "2", "--batch", "4", "--rounds", "4",
    "--recipe.head-rate", "0.05", "--recipe.final-rate", "0.02", "--recipe.backbone-rate", "0.01",
    "--seed", "7", "--workers", "1",
]  # fmt: skip


class Simulator:
    """Runs the command with a corpus and a backbone."""

    def __init__(self, folder: Path) -> None:
        self.data = write_words(folder / "words")
        self.backbone = write_backbone(folder / "backbone")
        self.folder = folder

    def command(self, *options: str) -> list[str]:
        given = ["--data", str(self.data), "--checkpoint", str(self.backbone)]
        return [*RUN, *SMALL, *given, *options]

    def environment(self, name: str) -> dict[str, str]:
        """With a cache of the run's own."""
        return {**os.environ, "XDG_CACHE_HOME": str(self.folder / f"{name}-cache")}

    def run(self, name: str, *options: str) -> "subprocess.CompletedProcess[str]":
        """A whole run in a directory of this name."""
        return self.call(name, self.command("--output", str(self.folder / name), *options))

    def resume(self, name: str, *options: str) -> "subprocess.CompletedProcess[str]":
        return self.call(name, [*RUN, "--resume", str(self.folder / name), *options])

    def call(self, name: str, command: list[str]) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            command, capture_output=True, text=True, env=self.environment(name), timeout=300,
            check=False,
        )  # fmt: skip


@pytest.fixture(scope="module")
def simulator(tmp_path_factory: pytest.TempPathFactory) -> Simulator:
    return Simulator(tmp_path_factory.mktemp("simulation"))


@pytest.fixture(scope="module")
def whole(simulator: Simulator) -> "subprocess.CompletedProcess[str]":
    done = simulator.run("whole")
    assert done.returncode == 0, done.stderr
    return done


def files_of(folder: Path) -> dict[str, bytes]:
    """All files below a folder, without the name of the run that clients keep theirs under."""
    found = {path.relative_to(folder): path for path in folder.rglob("*") if path.is_file()}
    return {
        "/".join(part for part in name.parts if len(part) != 32): path.read_bytes()
        for name, path in found.items()
    }


def report_of(run: Path) -> dict[str, Any]:
    report: dict[str, Any] = json.loads((run / "personal.json").read_text(encoding="utf-8"))
    return report


def assert_same_results(one: Path, other: Path) -> None:
    for name in ("checkpoints", "clients", "model"):
        files = files_of(one / name)
        assert files
        assert files_of(other / name) == files, name
    assert report_of(one) == report_of(other)


@pytest.mark.slow
def test_a_run_leaves_all_it_promises(
    simulator: Simulator, whole: "subprocess.CompletedProcess[str]"
) -> None:
    run = simulator.folder / "whole"
    assert whole.stdout.strip().splitlines()[-1] == str(run)
    assert "kws35: 48 clips, 4 classes; 3 clients with 16 to 16 clips each" in whole.stdout
    assert "fedper: 8 tensors are shared" in whole.stdout
    assert "; 2 are personal" in whole.stdout
    assert whole.stderr.count("| clients' own clips: accuracy") == 4
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert all([client["key"] for client in row["clients"]] == [0, 1, 2] for row in rows)
    assert rows[-1]["loss"] < rows[0]["loss"]
    config = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    assert (config["task"], config["method"], config["share"]) == ("kws35", "fedper", "lora")

    report = report_of(run)
    scores = [entry["score"] for entry in report["by_client"].values()]
    assert len(scores) == 3
    assert report["mean"] == pytest.approx(sum(scores) / 3, abs=1e-12)
    assert f"accuracy {100 * report['mean']:.2f} %" in whole.stderr
    assert (run / "personal.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == [
        "round-00003",
        "round-00004",
    ]
    shared = load_file(run / "checkpoints" / "round-00004" / "weights.safetensors")
    assert len(shared) == 8
    assert all(".lora_" in name for name in shared)
    model, info = Wav2Vec2Model.from_pretrained(run / "model", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert all(torch.isfinite(value).all() for value in model.state_dict().values())
    for client in range(3):
        (head,) = (run / "clients").glob(f"*/{client}/personal-00003.safetensors")
        assert load_file(head)["head.linear.weight"].shape == (len(WORDS), 16)


@pytest.mark.slow
@pytest.mark.usefixtures("whole")
def test_any_number_of_workers_gives_the_same_bytes(simulator: Simulator) -> None:
    done = simulator.run("two", "--workers", "2")
    assert done.returncode == 0, done.stderr
    assert_same_results(simulator.folder / "whole", simulator.folder / "two")


@pytest.mark.slow
@pytest.mark.usefixtures("whole")
def test_sigterm_leaves_a_run_that_goes_on_to_the_same_bytes(simulator: Simulator) -> None:
    run = simulator.folder / "stopped"
    process = subprocess.Popen(
        simulator.command("--output", str(run)),
        env=simulator.environment("stopped"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        wait_for((run / "checkpoints" / "round-00001").exists, process)
        os.killpg(process.pid, signal.SIGTERM)
        _, stderr = process.communicate(timeout=100)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    assert process.returncode == 143, stderr
    assert f"--resume {run}" in stderr
    assert "Traceback" not in stderr
    assert not (run / "checkpoints" / "round-00004").exists()
    resumed = simulator.resume("stopped", "--workers", "2")
    assert resumed.returncode == 0, resumed.stderr
    assert "going on with" in resumed.stderr
    assert_same_results(simulator.folder / "whole", run)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4]


def wait_for(happens: Callable[[], bool], process: "subprocess.Popen[str]") -> None:
    end = time.monotonic() + 120
    while not happens():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.02)


WRONG = {
    "unknown task": (["--task", "kws53"], 2, "did you mean 'kws35'"),
    "unknown method": (
        ["--method", "fedpre"], 2, "'fedpre' is not one of fedavg, fedper, fedrep, local",
    ),
    "unknown share": (["--share", "head"], 2, "'head' is not one of backbone, layers, lora, none"),
    "unknown setting of the recipe": (
        ["--recipe.head-rat", "1"], 2, "did you mean 'recipe.head-rate'",
    ),
    "not a setting": (["--recipe", "fast"], 2, "--recipe: cannot read fast"),
    "nothing to share": (["--share", "none"], 2, "fedper keeps the head on the device"),
    "too many layers": (
        ["--share", "layers", "--shared-layers", "9"], 2, "shared-layers must be from 1 to 2",
    ),
    "a high rank": (["--lora-rank", "16"], 2, "lora-rank must be from 1 to 15"),
    "no backbone": (["--checkpoint", "logmel"], 2, "logmel has no backbone to train"),
    "no such checkpoint": (["--checkpoint", "{tmp}/none"], 1, "{tmp}/none"),
    "no checkpoint": (["--checkpoint", ""], 2, "a task needs a checkpoint"),
    "no data": (["--data", ""], 2, "--data: give the corpus of kws35"),
    "another corpus": (["--data", "{tmp}/empty"], 1, "unpack Speech Commands v2 there"),
    "too many clients": (["--clients", "25"], 2, "48 clips are too few for 25 clients"),
    "more in a round than clients": (["--clients-per-round", "4"], 2, "more than the 3 clients"),
    "labels without classes": (
        ["--task", "asr", "--partition", "labels", "--data", "{tmp}/speech", "--subset", "train-a"],
        2, "partition labels is for tasks with classes",
    ),
    "labels without a task": (
        ["--task", "", "--partition", "labels"], 2, "'labels' is not one of speaker, iid, skewed",
    ),
    "a fleet": (["--fleet", "rpi4:3"], 2, "unknown setting 'fleet'"),
    "own test": (["--own-test", "1.5"], 2, "own-test is a fraction of clips between 0 and 1"),
    "output not empty": (["--output", "{tmp}/full"], 2, "not empty"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_wrong_input_is_one_clear_line(
    name: str,
    simulator: Simulator,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from simulation import ray_run

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("it is refused before anything is started")

    monkeypatch.setattr(ray_run, "prepare_own_ray", never)
    (tmp_path / "empty").mkdir()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "a").write_text("x")
    speech = tmp_path / "speech" / "train-a" / "1" / "1"
    speech.mkdir(parents=True)
    for number in range(8):
        clip = f"{WORDS[0]}/aa00c1e7_nohash_0.wav"
        (speech / f"1-1-{number:04d}.wav").write_bytes((simulator.data / clip).read_bytes())
    lines = [f"1-1-{number:04d} SECRET WORDS" for number in range(8)]
    (speech / "1-1.trans.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    options, code, text = WRONG[name]
    output = ["--output", str(tmp_path / "run")]
    arguments = simulator.command(*output, *(part.format(tmp=tmp_path) for part in options))
    assert_refused(arguments[len(RUN) :], code, text.format(tmp=tmp_path), capsys)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("option", "value", "reason"),
    [
        ("--method", "fedrep", "method was 'fedper' there and is 'fedrep' now"),
        ("--share", "layers", "share was 'lora' there and is 'layers' now"),
        ("--rounds", "5", "rounds was 4 there and is 5 now"),
    ],
)
def test_a_run_does_not_go_on_with_other_settings(
    option: str,
    value: str,
    reason: str,
    simulator: Simulator,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from fl_server.server_app import open_federation
    from simulation.simulate import parse_settings

    output = ["--output", str(tmp_path / "run")]
    settings, _ = parse_settings(simulator.command(*output)[len(RUN) :])
    open_federation(settings)
    assert_refused(["--resume", str(tmp_path / "run"), option, value], 2, reason, capsys)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["config.yaml"]


def assert_refused(
    arguments: list[str], code: int, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """With one line and an exit code."""
    from common import command
    from simulation.simulate import main

    with pytest.raises(SystemExit) as stopped:
        command.run(lambda _: main(arguments))
    said = capsys.readouterr().err
    assert stopped.value.code == code, said
    assert text in said
    assert "Traceback" not in said
    assert len(said.strip().splitlines()) == 1
