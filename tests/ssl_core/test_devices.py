"""Device profiles, packaged and a user's own, and this machine read live from cgroup files."""

import dataclasses
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from rich.console import Console

from common.errors import DataError, UsageError
from common.units import Size, format_bytes
from ssl_core.plan import main
from ssl_core.planning.device import DeviceProfile
from ssl_core.planning.device_profiles import find_profile, known_profiles, read_profiles
from ssl_core.planning.device_report import device_table
from ssl_core.planning.this_machine import this_machine

MIB = 2**20
OLDER = ("v100-16gb", "v100-32gb", "t4")
CARDS = (
    "a100-40gb", "a100-80gb", "h100-80gb", "h200", "l4", "l40s", "a10g", "rtx3090", "rtx4090",
    "rtx5090",
)  # fmt: skip
LONG = "a-device-with-a-name-that-is-longer-than-a-line-of-a-terminal-" * 2
OWN = """
desk:
  description: a computer
  accelerator: cpu
  memory: 8GB
  system: 1GiB
  supernode: 100MiB
  clientapp: 500MiB
  cores: 4
  precisions: [fp32, bf16]
"""


@pytest.fixture
def own(tmp_path: Path) -> Path:
    path = tmp_path / "own.yaml"
    path.write_text(OWN)
    return path


def test_the_packaged_profiles_are_those_promised() -> None:
    assert set(known_profiles()) == {
        "rpi4", "rpi4-2gb", "rpi4-4gb", "rpi5-8gb", "rpi5-16gb", "jetson-xavier-nx",
        "jetson-xavier-agx", "rtx2080ti", "jetson-orin-nano", "jetson-orin-nx", "jetson-orin-agx",
        "phone-4gb", *OLDER, *CARDS,
    }  # fmt: skip


@pytest.mark.parametrize("profile", known_profiles().values(), ids=lambda profile: profile.name)
def test_every_packaged_figure_says_where_it_is_from(profile: DeviceProfile) -> None:
    room = "system" if profile.tensor_fraction is None else "tensor_fraction"
    optional = {n for n in ("timed_as", "software", "capability") if getattr(profile, n)}
    optional |= set() if profile.triton else {"triton"}
    assert set(profile.sources) == optional | {
        "memory",
        room,
        "supernode",
        "clientapp",
        "cores",
        "precisions",
    }
    parts = (profile.system_bytes, profile.supernode, profile.clientapp, profile.training_bytes)
    assert sum(parts) == profile.memory
    assert all(part >= 0 for part in parts)


def test_what_is_left_for_training() -> None:
    rpi4 = find_profile("rpi4")
    assert rpi4.process_bytes == (7811 - 450 - 190) * MIB
    assert rpi4.training_bytes == (7811 - 450 - 190 - 570) * MIB
    board = find_profile("jetson-xavier-nx")
    assert board.training_bytes == int(0.615 * 7771 * MIB)
    assert board.process_bytes == board.training_bytes + 1873 * MIB
    assert find_profile("rtx2080ti").training_bytes == (11018 - 870) * MIB


def test_a_discrete_gpu_leaves_all_but_the_cuda_context_for_training() -> None:
    gib = {"a100-40gb": 39.5, "a100-80gb": 79.25, "h100-80gb": 79.1, "h200": 139.8}
    gib |= {"rtx3090": 23.68, "rtx4090": 23.64, "rtx5090": 31.36, "l40s": 44.42}
    gib |= {"v100-16gb": 15.78, "v100-32gb": 31.74, "t4": 14.56}
    gib |= {"l4": 22.0, "a10g": 22.0}  # assumed
    assert set(gib) == {*OLDER, *CARDS}
    for name, total in gib.items():
        card = find_profile(name)
        assert (card.accelerator, card.shared, card.timed_as) == ("cuda", False, "")
        assert ("bf16" in card.precisions) == (name in CARDS) == ((card.capability or 0) >= 8)
        assert card.memory == int(1024 * total) * MIB
        assert card.training_bytes == card.memory - 700 * MIB


def test_only_jetsons_have_limits_of_software() -> None:
    limited = {name for name, profile in known_profiles().items() if profile.software}
    assert limited == {name for name in known_profiles() if name.startswith("jetson-")}
    for name in ("jetson-xavier-nx", "jetson-xavier-agx"):
        profile = find_profile(name)
        assert profile.accelerator == "cuda"  # as in the paper's Table 2
        for fact in ("does not reach the GPU", "JetPack 5", "Python 3.8", "torch 2.1;", "its CPU"):
            assert fact in profile.software
    for name in ("jetson-orin-nano", "jetson-orin-nx", "jetson-orin-agx"):
        software = find_profile(name).software
        for fact in ("untested", "JetPack 6", "Python 3.10", "JetPack 7.2", "sm_87", "the CPU"):
            assert fact in software


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("rpi5", "'rpi5-8gb' or 'rpi5-16gb'"),
        ("rpi", "'rpi4', 'rpi4-4gb', 'rpi4-2gb', 'rpi5-8gb' or 'rpi5-16gb'"),
        ("jetson-orin", "'jetson-orin-nano', 'jetson-orin-nx' or 'jetson-orin-agx'"),
        ("Jetson_Xavier", "'jetson-xavier-nx' or 'jetson-xavier-agx'"),
        ("a100", "'a100-40gb' or 'a100-80gb'"),
        ("RPI4", "'rpi4'"),
        ("rtx-2080ti", "'rtx2080ti'"),
        ("RTX 4090", "'rtx4090'"),
        ("2080ti", "'rtx2080ti'"),
        ("orin-nx", "'jetson-orin-nx'"),
        ("rpi44", "'rpi4-4gb'"),
        ("jetson-xavier-nz", "'jetson-xavier-nx'"),
    ],
)
def test_the_nearest_names_are_told(name: str, nearest: str) -> None:
    with pytest.raises(UsageError) as caught:
        find_profile(name)
    assert f"no device '{name}'; did you mean {nearest}? (known: auto, rpi4," in str(caught.value)


def test_a_name_may_leave_out_the_memory_if_there_is_one_such_device() -> None:
    assert find_profile("h100").name == "h100-80gb"


@pytest.mark.parametrize("name", ["zx81", "--"])
def test_a_name_like_no_other_has_no_nearest(name: str) -> None:
    with pytest.raises(UsageError, match=rf"^no device '{name}' \(known: auto, "):
        find_profile(name)


def shown(profile: DeviceProfile) -> set[str]:
    """What the list must show of a device in full, each in one piece."""
    return {
        profile.name,
        format_bytes(profile.memory),
        format_bytes(profile.training_bytes),
        ", ".join(profile.precisions),
    }


def test_the_list_fits_80_columns() -> None:
    profiles = known_profiles().values()
    file = io.StringIO()
    Console(file=file, width=80, force_terminal=True, no_color=True).print(
        device_table([*profiles])
    )
    lines = file.getvalue().splitlines()
    assert len(lines) >= len(profiles) + 2
    for profile in profiles:
        (line,) = (each for each in lines if f"{profile.name} " in each)
        assert all(part in line for part in shown(profile)), line


def test_a_name_wider_than_the_terminal_is_folded() -> None:
    file = io.StringIO()
    profile = dataclasses.replace(find_profile("h200"), name=LONG)
    Console(file=file, width=80).print(device_table([profile]))
    head, _, *lines = file.getvalue().splitlines()
    assert max(map(len, lines)) <= 80
    assert "".join(line[: head.index("computes on")].strip() for line in lines) == LONG


def test_the_list_in_a_pipe_shows_everything(own: Path) -> None:
    own.write_text(OWN.replace("desk:", f"{LONG}:"))
    command = [sys.executable, "-m", "ssl_core.plan", "--list", "--devices", str(own)]
    printed = subprocess.run(
        command, env=os.environ | {"COLUMNS": "80"}, capture_output=True, text=True, check=True
    ).stdout
    assert "…" not in printed
    for profile in known_profiles(own).values():
        (line,) = (each for each in printed.splitlines() if each.startswith(f"{profile.name} "))
        assert all(part in line for part in shown(profile)), line
    assert "limits of software, see --device NAME: jetson-xavier-nx, " in printed


def test_the_plan_for_a_jetson_says_which_software_reaches_its_gpu(
    capsys: pytest.CaptureFixture[str],
) -> None:
    tiny = ["--model", "tiny", "--length", "1s", "--batch", "1"]
    xavier = find_profile("jetson-xavier-nx")
    assert main(["--device", "jetson-xavier-nx", *tiny]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert f"software: {xavier.software}" in lines
    assert (
        "memory 7.59 GiB: system 929 MiB, SuperNode 190 MiB, ClientApp 1.83 GiB, for training "
        "4.67 GiB" in lines
    )
    assert main(["--device", "jetson-xavier-nx", *tiny, "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)["profile"]
    assert shown["software"] == xavier.software
    assert "forums.developer.nvidia.com" in shown["sources"]["software"]
    assert main(["--device", "h100-80gb", *tiny]) == 0
    printed = capsys.readouterr().out
    assert "memory 79.10 GiB: ClientApp 700 MiB, for training 78.42 GiB\n" in printed
    assert "1 x 1s in bf16" in printed
    assert "software" not in printed


def test_devices_of_a_users_own(own: Path) -> None:
    profile = find_profile("desk", own)
    assert profile.training_bytes == 8 * 10**9 - (1024 + 600) * MIB
    assert profile.precisions == ("fp32", "bf16")
    assert "rpi4" in known_profiles(own)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("memory: 8GB", "memory: -8GB", "desk: --memory: '-8GB' is not a size"),
        ("memory: 8GB", "memory: 0", "memory and cores must be above zero"),
        ("  memory: 8GB\n", "", "desk: the following arguments are required: memory"),
        ("  system: 1GiB\n", "", "give one of system and tensor_fraction"),
        ("system: 1GiB", "system:", "give one of system and tensor_fraction"),
        ("cores: 4", "cores: 0", "memory and cores must be above zero"),
        ("cores: 4", "cores: four", "desk: --cores: 'four' is not a whole number"),
        ("memory: 8GB", "memroy: 8GB", "desk: unknown setting 'memroy'; did you mean 'memory'?"),
        ("accelerator: cpu", "accelerator: tpu", "'tpu' is not one of cpu, cuda"),
        ("[fp32, bf16]", "[fp64]", "'fp64' is not one of fp32, tf32, bf16, fp16"),
        ("[fp32, bf16]", "[bf16]", "precisions must contain fp32"),
        ("system: 1GiB", "system: lots", "desk: --system: 'lots' is not a size"),
        ("system: 1GiB", "tensor_fraction: 0.5", "tensor_fraction, of a memory that a GPU shares"),
        ("system: 1GiB", "tensor_fraction: 2", "must be between 0 and 1, not 2.0"),
        ("cores: 4", "cores: 4\n  shared: true", "shared is for a GPU"),
        ("memory: 8GB", "memory: 1GB", "nothing is left for training after 1.59 GiB"),
        (
            "cores: 4",
            "cores: 4\n  sources: rumour",
            "desk: --sources: 'rumour' is not a mapping",
        ),
    ],
)
def test_impossible_profiles_are_refused(own: Path, old: str, new: str, message: str) -> None:
    own.write_text(OWN.replace(old, new))
    with pytest.raises(UsageError) as caught:
        read_profiles(own)
    assert message in str(caught.value)
    assert str(own) in str(caught.value)


def test_files_that_hold_no_devices_are_refused(own: Path) -> None:
    own.write_text("desk: 8GB\n")
    with pytest.raises(UsageError, match="a mapping of figures"):
        read_profiles(own)
    own.write_text(OWN.replace("desk:", "auto:"))
    with pytest.raises(UsageError, match="'auto' is this machine"):
        known_profiles(own)
    with pytest.raises(UsageError, match="cannot read"):
        read_profiles(own.parent / "missing.yaml")


def test_a_negative_figure_is_refused_in_a_profile_made_by_hand() -> None:
    profile = dataclasses.replace(find_profile("rpi4"), supernode=Size(-1))
    with pytest.raises(UsageError, match="supernode must not be below zero"):
        profile.validate()


class Machine:
    """A machine with 8 GiB available and 600 MiB in this process, and a tree of cgroups."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def join(self, *lines: str) -> None:
        """Say which cgroups this process is in."""
        self.write("proc/self/cgroup", "".join(line + "\n" for line in lines))

    def write(self, path: str, text: object) -> Path:
        """Write a file below the root."""
        file = self.root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{text}\n")
        return file

    def room(self) -> int:
        """What this process may take above what it holds, in MiB."""
        return (this_machine(self.root).process_bytes - 600 * MIB) // MIB


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    memory, process = SimpleNamespace(available=8192 * MIB), SimpleNamespace(rss=600 * MIB)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    monkeypatch.setattr(psutil, "Process", lambda: SimpleNamespace(memory_info=lambda: process))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    return Machine(tmp_path)


def test_without_cgroups_available_memory_counts(machine: Machine) -> None:
    profile = this_machine(machine.root)
    assert profile.process_bytes == (8192 + 600) * MIB
    assert profile.training_bytes == 8192 * MIB
    assert (profile.name, profile.accelerator, profile.shared) == ("auto", "cpu", False)


def test_version_2_limits_up_to_the_root(machine: Machine) -> None:
    machine.join("0::/jobs/one")
    machine.write("sys/fs/cgroup/jobs/one/memory.max", "max")
    machine.write("sys/fs/cgroup/jobs/one/memory.current", 700 * MIB)
    assert machine.room() == 8192
    machine.write("sys/fs/cgroup/jobs/memory.max", 4096 * MIB)
    machine.write("sys/fs/cgroup/jobs/memory.current", 1000 * MIB)
    assert machine.room() == 3096
    machine.write("sys/fs/cgroup/jobs/memory.stat", f"anon 5\ninactive_file {250 * MIB}")
    assert machine.room() == 3346
    machine.write("sys/fs/cgroup/jobs/one/memory.max", 2048 * MIB)
    assert machine.room() == 1348
    assert "jobs/one" in this_machine(machine.root).sources["memory"]


def test_version_1_limit(machine: Machine) -> None:
    machine.join("5:cpu:/", "4:memory:/jobs/one", "0::/")
    folder = "sys/fs/cgroup/memory/jobs/one"
    machine.write(f"{folder}/memory.limit_in_bytes", 9223372036854771712)
    machine.write(f"{folder}/memory.usage_in_bytes", 700 * MIB)
    assert machine.room() == 8192
    machine.write(f"{folder}/memory.limit_in_bytes", 3000 * MIB)
    machine.write(f"{folder}/memory.stat", f"inactive_file 1\ntotal_inactive_file {100 * MIB}")
    assert machine.room() == 2400


def test_in_a_container_the_mount_is_the_cgroup(machine: Machine) -> None:
    machine.join("4:memory:/docker/0123")
    machine.write("sys/fs/cgroup/memory/memory.limit_in_bytes", 2000 * MIB)
    machine.write("sys/fs/cgroup/memory/memory.usage_in_bytes", 650 * MIB)
    assert machine.room() == 1350


def test_a_cgroup_file_that_cannot_be_read_is_named(machine: Machine) -> None:
    machine.join("0::/jobs")
    limit = machine.write("sys/fs/cgroup/jobs/memory.max", "lots")
    machine.write("sys/fs/cgroup/jobs/memory.current", 0)
    with pytest.raises(DataError, match=r"jobs/memory.max does not hold a number .*'lots'"):
        this_machine(machine.root)
    limit.write_text(str(4096 * MIB))
    (machine.root / "sys/fs/cgroup/jobs/memory.current").unlink()
    with pytest.raises(DataError, match=r"cannot read .*jobs/memory.current"):
        this_machine(machine.root)


def test_a_gpu_with_memory_of_its_own(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu(monkeypatch, free=6000 * MIB, reserved=500 * MIB, shared=False)
    profile = this_machine(machine.root)
    assert (profile.accelerator, profile.shared) == ("cuda", False)
    assert profile.training_bytes == profile.process_bytes == 6500 * MIB
    assert profile.precisions == ("fp32", "fp16")


def test_a_gpu_that_shares_the_machines_memory(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu(monkeypatch, free=6000 * MIB, reserved=0, shared=True)
    profile = this_machine(machine.root)
    assert (profile.accelerator, profile.shared) == ("cuda", True)
    assert profile.training_bytes == 6000 * MIB
    machine.join("0::/jobs")
    machine.write("sys/fs/cgroup/jobs/memory.max", 3000 * MIB)
    machine.write("sys/fs/cgroup/jobs/memory.current", 700 * MIB)
    assert this_machine(machine.root).training_bytes == 2300 * MIB


def gpu(monkeypatch: pytest.MonkeyPatch, free: int, reserved: int, shared: bool) -> None:
    """Pretend that torch sees a GPU."""
    properties = SimpleNamespace(is_integrated=shared)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: False)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (free, 2 * free))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: reserved)


def test_this_machine_as_it_is() -> None:
    profile = find_profile("auto")
    assert 0 < profile.training_bytes < 2**50
