"""A device works with the base dependencies alone: none of the extras is imported."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
EXTRAS = (
    "ray", "transformers", "torchaudio", "matplotlib", "tensorboard", "jiwer", "espeakng_loader",
    "flashlight",
)  # fmt: skip
BLOCKED = f"""
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {EXTRAS}:
            raise ModuleNotFoundError("No module named " + name)
sys.meta_path.insert(0, Blocked())
"""


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """An environment without the extras."""
    (tmp_path / "sitecustomize.py").write_text(BLOCKED, encoding="utf-8")
    path = f"{tmp_path}{os.pathsep}{ROOT}"
    return os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}


def run(environment: dict[str, str], *words: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, *words], capture_output=True, text=True, env=environment, cwd=ROOT
    )


def test_the_extras_are_blocked(environment: dict[str, str]) -> None:
    for name in EXTRAS:
        assert "ModuleNotFoundError" in run(environment, "-c", f"import {name}").stderr


@pytest.mark.slow
def test_a_device_pretrains_without_the_extras(
    environment: dict[str, str], corpus: Path, tmp_path: Path
) -> None:
    done = run(
        environment, "-m", "ssl_core.train", "--data", str(corpus), "--model", "tiny", "--length",
        "1s", "--batch", "2", "--updates", "1", "--eval-crops", "0", "--output",
        str(tmp_path / "run"),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "checkpoints" / "update-0000001").is_dir()
    assert not (tmp_path / "run" / "curves.png").exists()
    assert "no figures are drawn: matplotlib is missing" in done.stderr
    assert "no TensorBoard events" in done.stderr


@pytest.mark.parametrize(
    "module",
    [
        "fl_client", "fl_server", "partitions", "ssl_core.plan", "ssl_core.profile",
        "ssl_core.train", "ssl_core.finetune", "ssl_core.download",
    ],
)  # fmt: skip
def test_commands_start_without_the_extras(environment: dict[str, str], module: str) -> None:
    done = run(environment, "-m", module, "--help")
    assert done.returncode == 0, done.stderr


def test_apps_start_without_the_extras(environment: dict[str, str]) -> None:
    done = run(environment, "-c", "import fl_client.client_app, fl_server.server_app")
    assert done.returncode == 0, done.stderr


def test_a_command_that_needs_an_extra_names_it(environment: dict[str, str]) -> None:
    done = run(environment, "simulation/run.py", "--clients", "2")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.strip() == (
        "error: simulations need Ray: pip install ray, or install the extra `simulation`"
    )
    code = "from ssl_core.downstream.metrics import word_error_rate as w; w(['a'], ['b'])"
    assert "tasks that transcribe need jiwer" in run(environment, "-c", code).stderr
