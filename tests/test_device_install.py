"""A device works with the base dependencies alone: none of the extras is imported."""

import importlib.metadata
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

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


def test_commands_and_apps_start_without_the_extras(environment: dict[str, str]) -> None:
    modules = (
        "fl_client.__main__", "fl_server.__main__", "partitions.__main__", "ssl_core.plan",
        "ssl_core.profile", "ssl_core.train", "ssl_core.finetune", "ssl_core.download",
        "fl_client.client_app", "fl_server.server_app",
    )  # fmt: skip
    done = run(environment, "-c", f"import {', '.join(modules)}")
    assert done.returncode == 0, done.stderr


def test_what_a_device_imports_is_among_its_dependencies() -> None:
    code = (
        "import importlib, sys\n"
        "from fl_client import warm_start\n"
        "for name in warm_start.SHARED + warm_start.IMPORTED: importlib.import_module(name)\n"
        "import fl_client.__main__, fl_client.client_app\n"
        "import fl_client.local_training, fl_client.task_training\n"
        "print(*{name.partition('.')[0] for name in sys.modules})"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True
    )
    owners = importlib.metadata.packages_distributions()
    used = {owner for name in done.stdout.split() for owner in owners.get(name, ())}
    names = {canonicalize_name(name) for name in used}
    assert {"flwr", "torch", "soundfile"} <= names
    # jsonargparse uses attrs, and torch tqdm, where something else has brought them.
    assert names - {"shortwave", "attrs", "tqdm"} <= _with_dependencies(_base()) | {
        "pip",
        "setuptools",
    }


def _base() -> list[Requirement]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return [Requirement(text) for text in project["dependencies"]]


def _with_dependencies(needed: list[Requirement]) -> set[str]:
    """Names of packages and, recursively, of what they need here."""
    found: set[str] = set()
    todo = [each for each in needed if each.marker is None or each.marker.evaluate()]
    while todo:
        requirement = todo.pop()
        name = canonicalize_name(requirement.name)
        if name in found:
            continue
        found.add(name)
        for text in importlib.metadata.requires(name) or ():
            further = Requirement(text)
            extras = [*requirement.extras, ""]
            if further.marker is None or any(
                further.marker.evaluate({"extra": extra}) for extra in extras
            ):
                todo.append(further)
    return found


def test_a_command_that_needs_an_extra_names_it(environment: dict[str, str]) -> None:
    done = run(environment, "simulation/run.py", "--clients", "2")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.strip() == (
        "error: simulations need Ray: pip install ray, or install the extra `simulation`"
    )
    code = "from ssl_core.downstream.metrics import word_error_rate as w; w(['a'], ['b'])"
    assert "tasks that transcribe need jiwer" in run(environment, "-c", code).stderr
