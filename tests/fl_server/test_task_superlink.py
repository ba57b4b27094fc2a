"""A task over a real SuperLink with two genuine SuperNodes, and what a device refuses at once."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from safetensors.torch import load_file
from tone_words import WORDS, write_backbone, write_words
from transformers import Wav2Vec2Model

from benchmarks.flower_processes import ROOT, FlowerProcesses, free_port, wait_until

SETTINGS = (
    "task='kws35' method='fedper' share='lora' lora-rank=2 rounds=2 clients-per-round=2 "
    "min-clients=2 local-updates=2 batch=4 seed=5 "
    "recipe.head-rate=0.05 recipe.final-rate=0.02 recipe.backbone-rate=0.01"
)


class Lab(NamedTuple):
    """A SuperLink with two devices."""

    processes: FlowerProcesses
    devices: list["subprocess.Popen[bytes]"]
    folder: Path
    data: Path
    backbone: Path

    def log(self, number: int) -> str:
        return (self.folder / f"device-{number}.log").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_words(tmp_path_factory.mktemp("words"))


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Iterator[Lab]:
    folder = tmp_path_factory.mktemp("lab")
    backbone = write_backbone(folder / "backbone")
    here = write_backbone(folder / "copy")
    processes = FlowerProcesses(folder / "home", XDG_CACHE_HOME=str(folder / "cache"))
    port = free_port()
    (processes.home / "config.toml").write_text(
        f'[superlink.lab]\naddress = "127.0.0.1:{port}"\ninsecure = true\n', encoding="utf-8"
    )
    try:
        link = processes.start("flower-superlink", "--insecure", "--port", str(port))
        wait_until(
            lambda: link.poll() is None and b"Uvicorn running" in processes.log.read_bytes(),
            "the SuperLink is up",
        )
        devices = [
            processes.start(
                sys.executable, "-m", "fl_client", "--task", "kws35", "--data", str(data),
                "--partition", f"{number}/2", "--superlink", f"127.0.0.1:{port}",
                "--state", str(folder / f"state-{number}"), *own,
                log=folder / f"device-{number}.log",
            )
            for number, own in enumerate(([], ["--checkpoint", str(here)]))
        ]  # fmt: skip
        yield Lab(processes, devices, folder, data, backbone)
    finally:
        processes.end()


@pytest.fixture(scope="module")
def output(lab: Lab) -> Path:
    """The directory of a finished run."""
    folder = lab.folder / "run"
    result = lab.processes.run(
        "flwr", "run", ".", "lab", "--stream", "-c",
        f"{SETTINGS} checkpoint='{lab.backbone}' data='{lab.data}' output='{folder}'",
        timeout=300,
    )  # fmt: skip
    assert f"run directory: {folder}" in result.stdout, result.stdout
    assert "fedper, 2 clients on their own clips: accuracy" in result.stdout
    return folder


@pytest.mark.slow
@pytest.mark.timeout(500)
def test_it_ends_with_a_report_a_model_and_both_rounds(output: Path) -> None:
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2]
    for row in rows:
        assert [client["key"] for client in row["clients"]] == [0, 1]
        assert (row["cohort"], row["failures"], row["applied"]) == (2, 0, 4)
    report: dict[str, Any] = json.loads((output / "personal.json").read_text(encoding="utf-8"))
    scores = [entry["score"] for entry in report["by_client"].values()]
    assert set(report["by_client"]) == {"0", "1"}
    assert report["mean"] == pytest.approx(sum(scores) / 2, abs=1e-12)
    assert report["failures"] == []
    assert (output / "personal.png").read_bytes().startswith(b"\x89PNG")
    shared = load_file(output / "checkpoints" / "round-00002" / "weights.safetensors")
    assert len(shared) == 8
    assert all(".lora_" in name for name in shared)
    _, info = Wav2Vec2Model.from_pretrained(output / "model", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]


@pytest.mark.slow
@pytest.mark.timeout(500)
def test_each_device_keeps_its_head(lab: Lab, output: Path) -> None:
    run = (output / "identity").read_text(encoding="utf-8").strip()
    heads = []
    for number, device in enumerate(lab.devices):
        assert device.poll() is None
        log = lab.log(number)
        assert log.startswith("kws35: 48 clips in ")
        assert log.count("Receiving: train message") == 2
        assert log.count("Receiving: evaluate message") == 1
        assert "Traceback" not in log
        folder = lab.folder / f"state-{number}" / run / str(number)
        assert sorted(path.name for path in folder.iterdir()) == [
            "personal-00000.safetensors",
            "personal-00001.safetensors",
            "split.json",
        ]
        heads.append(load_file(folder / "personal-00001.safetensors")["head.linear.weight"])
    assert heads[0].shape == heads[1].shape == (len(WORDS), 16)
    assert not heads[0].equal(heads[1])
    assert not list(output.rglob("personal-*"))


@pytest.mark.slow
@pytest.mark.timeout(500)
def test_ray_gives_the_same(lab: Lab, output: Path) -> None:
    """The same round loop and ClientApp, whatever carries the messages."""
    options = [
        part
        for name, value in {
            "task": "kws35", "method": "fedper", "share": "lora", "lora-rank": "2",
            "rounds": "2", "clients": "2", "clients-per-round": "2", "local-updates": "2",
            "batch": "4", "seed": "5", "workers": "1", "data": str(lab.data),
            "recipe.head-rate": "0.05", "recipe.final-rate": "0.02", "recipe.backbone-rate": "0.01",
            "checkpoint": str(lab.backbone), "output": str(lab.folder / "ray"),
        }.items()
        for part in ("--" + name, value)
    ]  # fmt: skip
    simulated = lab.processes.run(sys.executable, "simulation/run.py", *options, timeout=200)
    assert simulated.returncode == 0, simulated.stdout
    for name in ("checkpoints/round-00002/weights.safetensors", "model/model.safetensors"):
        assert (output / name).read_bytes() == (lab.folder / "ray" / name).read_bytes()
    one, other = (
        json.loads((run / "personal.json").read_text(encoding="utf-8"))
        for run in (output, lab.folder / "ray")
    )
    assert one == other


WRONG = {
    "another corpus": (["--task", "kws35", "--data", "{tmp}"], 1, "Speech Commands v2: expected"),
    "a corpus without noise": (["--task", "kws12", "--data", "{data}"], 1, "ask for 35 words"),
    "unknown task": (["--task", "kws36", "--data", "{data}"], 2, "did you mean 'kws35'"),
    "a checkpoint without a task": (
        ["--checkpoint", "{tmp}", "--data", "{data}"], 2, "--checkpoint is for a --task",
    ),
    "no checkpoint there": (
        ["--task", "kws35", "--data", "{data}", "--checkpoint", "{tmp}/none"], 1, "{tmp}/none",
    ),
    "a task's corpus without a task": (["--data", "{data}"], 1, "not in LibriSpeech's layout"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_a_device_refuses_at_once_what_a_round_would_be_refused_for(
    name: str, data: Path, tmp_path: Path
) -> None:
    (tmp_path / "a.wav").write_bytes(b"x")
    options, code, text = WRONG[name]
    done = subprocess.run(
        [sys.executable, "-m", "fl_client", *(o.format(tmp=tmp_path, data=data) for o in options)],
        cwd=ROOT, capture_output=True, text=True, timeout=100, check=False,
    )  # fmt: skip
    assert done.returncode == code, done.stderr
    assert text.format(tmp=tmp_path, data=data) in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert done.stdout == ""
