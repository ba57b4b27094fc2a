"""A real SuperLink, two genuine SuperNodes on loopback and `flwr run`, from end to end."""

import json
import os
import signal
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import psutil
import pytest
import torch
import yaml
from transformers import Wav2Vec2ForPreTraining

from benchmarks.flower_processes import ROOT, FlowerProcesses, free_port, wait_until, write_tones

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
SETTINGS = {
    "model": "tiny", "rounds": "2", "clients-per-round": "2", "local-updates": "1", "batch": "2",
    "eval-crops": "8", "seed": "5",
}  # fmt: skip


class Lab(NamedTuple):
    """A SuperLink with two devices."""

    processes: FlowerProcesses
    devices: list["subprocess.Popen[bytes]"]
    logs: list[Path]
    data: Path

    def run(self, **settings: str) -> "subprocess.CompletedProcess[str]":
        texts = {"model", "data", "output"}
        chosen = SETTINGS | {"data": str(self.data)} | settings
        given = " ".join(
            f"{name}='{value}'" if name in texts else f"{name}={value}"
            for name, value in chosen.items()
        )
        return self.processes.run("flwr", "run", ".", "lab", "--stream", "-c", given)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Real speech where it lies beside the checkout, else six speakers with 24 s of tones each."""
    real = ROOT.parent / "shared" / "data" / "LibriSpeech"
    if real.is_dir():
        return real.resolve()
    return write_tones(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Iterator[Lab]:
    folder = tmp_path_factory.mktemp("lab")
    # A proxy that refuses: nothing on this machine may go through it.
    processes = FlowerProcesses(
        folder / "home",
        XDG_CACHE_HOME=str(folder / "cache"),
        XDG_STATE_HOME=str(folder / "state"),
        http_proxy=f"http://127.0.0.1:{free_port()}",
    )
    port = free_port()
    (processes.home / "config.toml").write_text(
        f'[superlink.lab]\naddress = "127.0.0.1:{port}"\ninsecure = true\n', encoding="utf-8"
    )
    logs = [folder / f"device-{number}.log" for number in range(2)]
    try:
        link = processes.start("flower-superlink", "--insecure", "--port", str(port))
        wait_until(
            lambda: link.poll() is None and b"Uvicorn running" in processes.log.read_bytes(),
            "the SuperLink is up",
        )
        devices = [
            processes.start(
                "env", "-u", "no_proxy", "-u", "NO_PROXY",
                sys.executable, "-m", "fl_client", "--device", "rpi4", "--data", str(data),
                "--partition", f"{number}/2", "--superlink", f"127.0.0.1:{port}", log=logs[number],
            )
            for number in range(2)
        ]  # fmt: skip
        yield Lab(processes, devices, logs, data)
    finally:
        processes.end()


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("output") / "run"


@pytest.fixture(scope="module")
def finished(lab: Lab, output: Path) -> "subprocess.CompletedProcess[str]":
    result = lab.run(output=str(output))
    assert f"run directory: {output}" in result.stdout, result.stdout
    return result


@pytest.mark.usefixtures("finished")
def test_two_devices_train_and_the_run_directory_is_complete(output: Path, data: Path) -> None:
    config = yaml.safe_load((output / "config.yaml").read_text(encoding="utf-8"))
    assert (config["model"], config["rounds"], config["data"]) == ("tiny", 2, str(data))
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2]
    for row in rows:
        assert [client["key"] for client in row["clients"]] == [0, 1]
        assert (row["cohort"], row["failures"], row["applied"]) == (2, 0, 2)
        assert row["samples"] == 2 * 2 * 5 * 16_000
        assert 0 < row["held_out_loss"] < 10
    for number in (1, 2):
        model, info = Wav2Vec2ForPreTraining.from_pretrained(
            output / "checkpoints" / f"round-0000{number}", output_loading_info=True
        )
        assert not info["missing_keys"]
        assert not info["unexpected_keys"]
        assert all(torch.isfinite(value).all() for value in model.state_dict().values())


@pytest.mark.usefixtures("finished")
def test_the_devices_answered_as_supernodes(lab: Lab) -> None:
    for device, log in zip(lab.devices, lab.logs, strict=True):
        text = log.read_text(encoding="utf-8")
        assert device.poll() is None
        assert "SuperNode ID:" in text
        assert text.count("Receiving: train message") == 2
        assert "Traceback" not in text


@pytest.mark.usefixtures("finished")
def test_ray_and_superlink_give_the_same_model(lab: Lab, output: Path, tmp_path: Path) -> None:
    """The same round loop and ClientApp, so the same bytes, whatever carries the messages."""
    options = [part for name, value in SETTINGS.items() for part in ("--" + name, value)]
    simulated = lab.processes.run(
        sys.executable, "simulation/run.py", "--clients", "2", "--workers", "1",
        "--data", str(lab.data), "--output", str(tmp_path / "run"), *options,
    )  # fmt: skip
    assert simulated.returncode == 0, simulated.stdout
    for number in (1, 2):
        file = Path("checkpoints", f"round-0000{number}", "model.safetensors")
        assert (output / file).read_bytes() == (tmp_path / "run" / file).read_bytes()


@pytest.mark.usefixtures("finished")
def test_an_error_is_one_line_in_the_stream(lab: Lab) -> None:
    failed = lab.run(output="runs/relative")
    lines = [line for line in failed.stdout.splitlines() if line.startswith("error: ")]
    assert lines == [
        "error: run config: output='runs/relative' is not an absolute path, and this app runs "
        f"where flower-superlink was started ({ROOT}), not where `flwr run` was"
    ], failed.stdout
    assert "  File " not in failed.stdout


@pytest.mark.usefixtures("finished")
def test_an_interrupt_ends_a_device_and_all_that_it_started(lab: Lab) -> None:
    for device, log in zip(lab.devices, lab.logs, strict=True):
        family = psutil.Process(device.pid).children(recursive=True)
        assert family
        os.killpg(device.pid, signal.SIGINT)  # as a terminal does at Ctrl-C
        assert device.wait(60) == 130
        _, left = psutil.wait_procs(family, timeout=30)
        assert not left
        text = log.read_text(encoding="utf-8")
        assert "SuperNode terminated gracefully" in text
        assert "Traceback" not in text


def test_the_app_bundle_is_small_and_holds_nothing_but_the_source(tmp_path: Path) -> None:
    processes = FlowerProcesses(tmp_path / "home")
    built = subprocess.run(
        ["flwr", "build", "--app", str(ROOT)],
        cwd=tmp_path,
        env=processes.environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert built.returncode == 0, built.stdout + built.stderr
    (bundle,) = tmp_path.glob("*.fab")
    assert bundle.stat().st_size < 10 * 2**20
    names = set(zipfile.ZipFile(bundle).namelist())
    assert {"pyproject.toml", "fl_client/client_app.py", "fl_server/server_app.py"} <= names
    rooms = [f"ssl_core/{room}" for room in ("wav2vec2", "planning", "training", "downstream")]
    source = {"ssl_core/__init__.py"} | {
        str(file.relative_to(ROOT))
        for folder in ("common", "partitions", *rooms, "fl_client", "fl_server")
        for pattern in ("*.py", "*.yaml")
        for file in (ROOT / folder).rglob(pattern)
    }
    assert source <= names
    others = names - source - {"pyproject.toml", ".info/CONTENT"}
    assert others <= {"LICENSE", "README.md"}, others
