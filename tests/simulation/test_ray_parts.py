"""The parts of the simulation's plumbing that need no running Ray."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from common.cores import usable_cores
from simulation.shipped_state import apply_change, changed_state, read_state, unpack_state

ROOT = Path(__file__).parents[2]


def write(root: Path, name: str, text: str) -> None:
    path = root / "sys/fs/cgroup" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


@pytest.mark.parametrize(
    ("membership", "files", "cores"),
    [
        ("", {}, 4),
        ("0::/job\n", {"job/cpu.max": "max 100000"}, 4),
        ("0::/job\n", {"job/cpu.max": "150000 100000"}, 2),
        ("0::/job\n", {"job/cpu.max": "50000 100000"}, 1),
        ("0::/job/part\n", {"job/cpu.max": "100000 100000", "job/part/cpu.max": "max 1"}, 1),
        (
            "4:cpu,cpuacct:/job\n",
            {"cpu/job/cpu.cfs_quota_us": "300000", "cpu/job/cpu.cfs_period_us": "100000"},
            3,
        ),
        (
            "4:cpu,cpuacct:/job\n",
            {"cpu/job/cpu.cfs_quota_us": "-1", "cpu/job/cpu.cfs_period_us": "100000"},
            4,
        ),
        # Inside a container the kernel names the host's path, which is not there.
        ("0::/docker/abc\n", {"cpu.max": "200000 100000"}, 2),
    ],
)
def test_usable_cores_follow_affinity_and_quota(
    membership: str,
    files: dict[str, str],
    cores: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(4)))
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text(membership)
    for name, text in files.items():
        write(tmp_path, name, text)
    assert usable_cores(tmp_path) == cores


def test_a_process_bound_to_one_core_may_use_one(tmp_path: Path) -> None:
    os_code = "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))}); "
    code = os_code + "from common.cores import usable_cores; print(usable_cores())"
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert found.stdout == "1\n"


def test_rays_environment_is_the_runs_own() -> None:
    code = (
        "import json, os; from simulation.ray_environment import prepare_own_ray as prepare\n"
        "prepare(); first = dict(os.environ); prepare(); assert dict(os.environ) == first\n"
        "print(json.dumps({k: v for k, v in first.items() if k.startswith('RAY_')}))"
    )
    strange = {
        "RAY_ADDRESS": "10.0.0.1:6379", "RAY_AUTH_TOKEN": "known", "RAY_AUTH_MODE": "disabled",
        "RAY_AUTH_TOKEN_PATH": "/known", "RAY_worker_niceness": "5",
    }  # fmt: skip
    tokens = set()
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, env=os.environ | strange, capture_output=True,
            text=True, check=True,
        )  # fmt: skip
        found = json.loads(done.stdout)
        assert not {"RAY_ADDRESS", "RAY_AUTH_TOKEN_PATH"} & found.keys()
        assert found["RAY_AUTH_MODE"] == "token"
        assert len(found["RAY_AUTH_TOKEN"]) == 64
        assert found["RAY_worker_niceness"] == "5"  # the user's
        assert found["RAY_memory_monitor_refresh_ms"] == "0"
        tokens.add(found["RAY_AUTH_TOKEN"])
    assert len(tokens) == 2


def test_a_ray_without_a_token_is_refused() -> None:
    code = (
        "import sys; sys.modules['ray'] = sys\n"
        "from simulation.ray_environment import prepare_own_ray; prepare_own_ray()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert "Ray was imported before the simulation set its token" in done.stderr


@pytest.mark.parametrize(
    ("gpus", "workers", "each"),
    [(1, 1, 1.0), (1, 3, 0.3333), (2, 3, 0.5), (8, 2, 1.0), (8, 9, 0.5), (3, 7, 0.3333)],
)
def test_gpus_are_shared_so_that_every_worker_has_a_place(
    gpus: int, workers: int, each: float
) -> None:
    from simulation.ray_runtime import gpus_of_a_worker

    found = gpus_of_a_worker(gpus, workers)
    assert found == each
    assert gpus * int(1 / found + 1e-9) >= workers  # Ray gives a part of one GPU, never of two


def test_an_error_of_ray_is_told_in_one_line() -> None:
    import ray

    from simulation.ray_runtime import one_line

    class Died(ray.exceptions.RayActorError):
        def __str__(self) -> str:
            return text

    text = "The actor died because of an error raised in its creation task, ray::Worker\n  File\n"
    text += "ModuleNotFoundError: No module named 'flwr'\n"
    assert one_line(Died()) == "ModuleNotFoundError: No module named 'flwr'"
    text = "The actor died unexpectedly before finishing this task.\n\tclass_name: Worker\n"
    assert one_line(Died()) == "its process has ended, as when memory runs out"
    assert one_line(ValueError("first\nlast  ")) == "last"
    assert one_line(ray.exceptions.RaySystemError(OSError("full"))).endswith("full")


@pytest.mark.parametrize("address", ["127.0.0.1:1", "nowhere.invalid:6379", "[::1]:1"])
def test_a_cluster_that_is_not_there_is_named_at_once(address: str) -> None:
    from simulation.ray_runtime import RayFailed, RayRuntime

    runtime = RayRuntime(workers=1, most=1, address=address, weights_bytes=0, gpu=False)
    with pytest.raises(RayFailed, match=f"Ray cannot join the cluster {re.escape(address)}: "):
        runtime.start()


def test_workers_on_a_gpu_that_is_not_there_are_refused() -> None:
    from simulation.ray_runtime import RayFailed, gpus_of_a_worker

    with pytest.raises(RayFailed, match="--device cpu"):
        gpus_of_a_worker(0, 2)


def test_a_clients_state_travels_to_another_machine_and_back(tmp_path: Path) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    for name, content in {"a": b"old", "b": b"stays", "c": b"goes"}.items():
        path = here / "run" / "3" / f"{name}-00001.safetensors"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    (here / "run" / "4").mkdir()
    (here / "run" / "4" / "x").write_bytes(b"another client's")
    files = read_state(here, 3)
    assert sorted(files) == [f"run/3/{name}-00001.safetensors" for name in "abc"]
    unpack_state(files, there)
    own = there / "run" / "3"
    (own / "a-00001.safetensors").write_bytes(b"new")
    (own / "c-00001.safetensors").unlink()
    (own / "d-00002.safetensors").write_bytes(b"made")
    change = changed_state(files, there, 3)
    assert {name: bytes(content) for name, content in change.written.items()} == {
        "run/3/a-00001.safetensors": b"new",
        "run/3/d-00002.safetensors": b"made",
    }
    apply_change(change, here, 3)
    found = {path.name[0]: path.read_bytes() for path in (here / "run" / "3").iterdir()}
    assert found == {"a": b"new", "b": b"stays", "d": b"made"}
    assert (here / "run" / "4" / "x").read_bytes() == b"another client's"


def test_a_client_without_state_brings_none(tmp_path: Path) -> None:
    assert read_state(tmp_path / "none", 0) == {}
    change = changed_state({}, tmp_path / "none", 0)
    apply_change(change, tmp_path / "there", 0)
    assert not change.written
    assert not list(tmp_path.rglob("*.safetensors"))
