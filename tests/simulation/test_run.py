"""`simulation/run.py` as a user runs it: results, determinism, kill and resume, bad input."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest
import soundfile
import torch
import yaml
from listeners import listeners, refuses

ROOT = Path(__file__).parents[2]
RUN = [sys.executable, str(ROOT / "simulation" / "run.py")]
SMALL = [
    "--model", "tiny", "--architecture.num-hidden-layers", "1", "--length", "1s", "--clients", "4",
    "--clients-per-round", "3", "--local-updates", "2", "--batch", "2", "--eval-crops", "4",
    "--seed", "7", "--workers", "1",
]  # fmt: skip


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    return {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache")}


@pytest.fixture
def simulate(
    corpus: Path, environment: dict[str, str]
) -> Callable[..., subprocess.CompletedProcess[str]]:
    def run(*options: str, data: Path | None = corpus) -> subprocess.CompletedProcess[str]:
        chosen = ["--data", str(data)] if data else []
        return subprocess.run(
            [*RUN, *chosen, *options],
            capture_output=True,
            text=True,
            env=environment,
            timeout=300,
            check=False,
        )

    return run


def content(run: Path) -> dict[str, bytes]:
    """Every file of the newest checkpoint."""
    newest = max((run / "checkpoints").glob("round-*"))
    return {path.name: path.read_bytes() for path in newest.iterdir()}


Simulate = Callable[..., subprocess.CompletedProcess[str]]


@contextlib.contextmanager
def _cluster(environment: dict[str, str]) -> Iterator[str]:
    """The address of a Ray cluster of two raylets, started elsewhere without this project."""
    process = subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name("ray_cluster.py"))], env=environment, cwd="/",
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    with process:
        assert process.stdout is not None
        yield process.stdout.readline().strip()
        process.communicate(timeout=60)


@pytest.mark.slow
def test_a_run_leaves_all_it_promises_and_a_cluster_gives_the_same_bytes(
    simulate: Simulate, environment: dict[str, str], tmp_path: Path
) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    kept = ["--rounds", "3", "--keep-optimizer-state", "true"]
    first = simulate(*SMALL, *kept, "--output", str(one))
    assert first.returncode == 0, first.stderr
    assert first.stdout.strip().splitlines()[-1] == str(one)
    assert first.stderr.count("| held out:") == 3
    environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "5" * 64}
    with _cluster(environment) as address:
        second = simulate(
            *SMALL, *kept, "--workers", "2", "--address", address, "--output", str(two)
        )
    assert second.returncode == 0, second.stderr
    assert "on 2 workers" in second.stdout
    assert content(one) == content(two)

    rows = [json.loads(line) for line in (one / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert all(len(row["clients"]) == 3 for row in rows)
    assert all(row["crops"] == 3 * 2 * 2 for row in rows)
    size = 4 * sum(
        value.numel() for value in _weights(one / "checkpoints" / "round-00003").values()
    )
    assert size * 3 < rows[0]["bytes_sent"] < size * 3 * 1.1
    assert yaml.safe_load((one / "config.yaml").read_text())["clients-per-round"] == 3
    assert list((one / "tensorboard").glob("events*"))
    for name in ("report.md", "curves.png", "clients.png", "data.png", "manifest.tsv"):
        assert (one / name).stat().st_size > 100, name
    assert sorted(path.name for path in (one / "checkpoints").iterdir()) == [
        "round-00002",
        "round-00003",
    ]


def _weights(directory: Path) -> dict[str, torch.Tensor]:
    from transformers import Wav2Vec2ForPreTraining

    model, info = Wav2Vec2ForPreTraining.from_pretrained(directory, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    return dict(model.named_parameters())


def _descendant(process: "subprocess.Popen[str]", word: str) -> psutil.Process:
    """The process of a run whose command line has this word."""
    found = {each: each.cmdline()[:2] for each in _descendants(process)}
    fitting = [each for each, words in found.items() if any(word in text for text in words)]
    assert fitting, "\n".join(f"{each.pid} {each.ppid()} {words}" for each, words in found.items())
    return fitting[0]


def _descendants(process: "subprocess.Popen[str]") -> list[psutil.Process]:
    return psutil.Process(process.pid).children(recursive=True)


def _faulty_run(command: list[str], environment: dict[str, str], output: Path) -> str:
    """Run while a worker, then the raylet is killed; what the run printed.

    The driver or the workers are suspended meanwhile, so that the run cannot end first. Nobody
    without the run's own token may use the ports that Ray listens on, whatever the environment.
    """
    narrow = output.parent / ("long" * 20)
    narrow.mkdir()
    strange = {"TMPDIR": str(narrow), "RAY_ADDRESS": "127.0.0.1:1", "RAY_AUTH_TOKEN": "f" * 32}
    process = subprocess.Popen(
        [*command, "--output", str(output)], env=environment | strange, text=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
    )  # fmt: skip

    def wait_for(name: str) -> psutil.Process:
        for _ in _until(lambda: (output / "checkpoints" / name).exists()):
            assert process.poll() is None, process.communicate()[1]
        return _descendant(process, "simulate.py")

    with process:
        try:
            driver = wait_for("round-00001")
            driver.suspend()
            others = _descendants(process)
            found = listeners(each for each in others if each != driver)
            assert len(found) > 3
            assert not [each for each in found if not refuses(*each)]
            workers = [each for each in others if each.name().startswith("ray::Worker")]
            assert len(workers) == 2
            for worker in workers:
                worker.suspend()
            driver.resume()
            assert [refuses(*each) for each in listeners([driver])] == [True]
            workers[0].kill()
            workers[1].resume()
            driver = wait_for("round-00002")
            driver.suspend()
            others += _descendants(process)
            _descendant(process, "raylet/raylet").kill()
            driver.resume()
            printed = process.communicate(timeout=300)[1]
        finally:
            process.kill()
    assert process.returncode == 0, printed
    assert not psutil.wait_procs(others, timeout=10)[1], "processes were left behind"
    return printed


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["fedavg", "fedadam"])
def test_whatever_process_is_killed_the_run_ends_with_the_same_bytes(
    simulate: Simulate, corpus: Path, environment: dict[str, str], tmp_path: Path, optimizer: str
) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    options = [*SMALL, "--rounds", "5", "--server-optimizer", optimizer]
    if optimizer == "fedavg":
        printed = _faulty_run(
            [*RUN, "--data", str(corpus), *options, "--workers", "2"], environment, whole
        )
        assert printed.count("no client is to blame: starting again") == 1
        assert printed.count("clients failed") == 0
    else:
        done = simulate(*options, "--output", str(whole))
        assert done.returncode == 0, done.stderr
    process = subprocess.Popen(
        [*RUN, "--data", str(corpus), *options, "--output", str(killed)],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        for _ in _until(lambda: (killed / "checkpoints" / "round-00002").exists()):
            assert process.poll() is None
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert not (killed / "checkpoints" / "round-00005").exists()
    resumed = simulate("--resume", str(killed), data=None)
    assert resumed.returncode == 0, resumed.stderr
    assert "going on with" in resumed.stderr
    assert content(killed) == content(whole)
    lines = (killed / "metrics.jsonl").read_text().splitlines()
    steps = [json.loads(line)["step"] for line in lines]
    assert steps == [1, 2, 3, 4, 5]


def _until(condition: Callable[[], bool], seconds: float = 120) -> Iterator[None]:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        yield
        time.sleep(0.02)


@pytest.mark.slow
def test_ctrl_c_leaves_a_run_that_can_go_on(
    corpus: Path, environment: dict[str, str], tmp_path: Path
) -> None:
    output = tmp_path / "run"
    process = subprocess.Popen(
        [*RUN, "--data", str(corpus), *SMALL, "--rounds", "200", "--output", str(output)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    for _ in _until(lambda: (output / "checkpoints" / "round-00001").exists()):
        assert process.poll() is None
    os.killpg(process.pid, signal.SIGINT)
    _, stderr = process.communicate(timeout=200)
    assert process.returncode == 130, stderr
    assert f"--resume {output}" in stderr
    assert "Traceback" not in stderr
    assert not list((output / "checkpoints").glob(".*"))


@pytest.mark.slow
def test_bad_audio_is_skipped_and_counted(simulate: Simulate, corpus: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad"
    for source in sorted(corpus.rglob("*.flac")):
        target = bad / source.relative_to(corpus)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(source.read_bytes())
    files = sorted(bad.rglob("*.flac"))
    files[0].write_bytes(b"")
    files[2].write_bytes(files[2].read_bytes()[:9000])
    soundfile.write(files[4], np.zeros(4 * 16_000), 16_000)
    stereo = 0.1 * np.random.default_rng(1).standard_normal((4 * 44_100, 2))
    soundfile.write(files[6], stereo, 44_100)
    broken = np.full(4 * 16_000, np.nan, dtype=np.float32)
    files[8].unlink()
    soundfile.write(files[8].with_suffix(".wav"), broken, 16_000, subtype="FLOAT")
    done = simulate(
        *SMALL, "--rounds", "4", "--clients-per-round", "4", "--output", str(tmp_path / "run"),
        data=bad,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "skipped, empty: 1 (" in done.stdout
    rows = [
        json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    for reason in ("truncated", "silent", "not_finite"):
        assert sum(row[f"skipped_{reason}"] for row in rows) > 0, reason
    assert "crops skipped" in done.stderr


@pytest.mark.slow
def test_no_space_left_is_one_clear_line_and_leaves_no_half_checkpoint(
    corpus: Path, environment: dict[str, str], tmp_path: Path
) -> None:
    if os.geteuid() != 0:
        pytest.skip("mounting a small file system needs root")
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", str(small)], check=False
    )
    if mounted.returncode:
        pytest.skip("a small file system cannot be mounted here")
    try:
        output = small / "run"
        done = subprocess.run(
            [*RUN, "--data", str(corpus), *SMALL, "--rounds", "6", "--keep", "6", "--output",
             str(output)],
            env=environment, capture_output=True, text=True, timeout=300, check=False,
        )  # fmt: skip
        assert done.returncode == 1, done.stderr
        assert "no space left" in done.stderr
        assert "Traceback" not in done.stderr
        left = sorted(path.name for path in (output / "checkpoints").iterdir())
        assert left
        assert all(name.startswith("round-") for name in left)
        for name in left:
            _weights(output / "checkpoints" / name)
    finally:
        subprocess.run(["umount", "--lazy", str(small)], check=True)


def tree(path: Path) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    return path


WRONG = {
    "no such folder": (["--data", "{tmp}/nowhere"], 1, "nowhere"),
    "an empty folder": (["--data", "{tmp}/empty"], 1, "empty"),
    "not the layout": (["--data", "{tmp}/flat"], 1, "LibriSpeech"),
    "more clients than crops": (["--data", "{corpus}", "--clients", "5000"], 2, "at most 42"),
    "more in a round than clients": (
        ["--data", "{corpus}", "--clients", "2", "--clients-per-round", "3"],
        2,
        "3 is more than",
    ),
    "length zero": (["--length", "0s"], 2, "above zero"),
    "length nonsense": (["--length", "long"], 2, "not a length"),
    "length too short": (["--length", "0.1s"], 2, "too short"),
    "unknown option": (["--lenght", "5s"], 2, "did you mean 'length'"),
    "unknown model": (["--model", "bas"], 2, "did you mean 'base'"),
    "not a number": (["--rounds", "many"], 2, "whole number"),
    "no rounds": (["--rounds", "0"], 2, "at least 1"),
    "unknown setting": (["--recipe.learning-rat", "1"], 2, "did you mean 'recipe.learning-rate'"),
    "unknown section": (["--recip.learning-rate", "1"], 2, "did you mean 'recipe.learning-rate'"),
    "unknown YAML key": (["--config", "{tmp}/key.yaml"], 2, "did you mean 'rounds'"),
    "not YAML": (["--config", "{tmp}/broken.yaml"], 2, "not YAML"),
    "YAML list": (["--config", "{tmp}/list.yaml"], 2, "name: value"),
    "YAML type": (["--config", "{tmp}/type.yaml"], 2, "rounds"),
    "no such YAML": (["--config", "{tmp}/none.yaml"], 2, "none.yaml"),
    "output not empty": (["--data", "{corpus}", "--output", "{tmp}/full"], 2, "not empty"),
    "resume nothing": (["--resume", "{tmp}/empty"], 2, "no run"),
    "no such device": (["--device", "tpu"], 2, "not a torch device"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_wrong_input_is_one_clear_line(
    name: str,
    corpus: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from common import command
    from simulation.simulate import main

    (tmp_path / "empty").mkdir()
    tree(tmp_path / "flat").joinpath("a.flac").write_bytes(b"x")
    tree(tmp_path / "full").joinpath("a").write_text("x")
    (tmp_path / "key.yaml").write_text("round: 3\n")
    (tmp_path / "broken.yaml").write_text("rounds: [3\n")
    (tmp_path / "list.yaml").write_text("- rounds\n")
    (tmp_path / "type.yaml").write_text("rounds: many\n")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    options, code, text = WRONG[name]
    arguments = [option.format(tmp=tmp_path, corpus=corpus) for option in options]
    if "--data" not in arguments:
        arguments += ["--data", str(corpus)]
    if "--clients" not in arguments:
        arguments += ["--clients", "4"]
    if "--length" not in arguments:
        arguments += ["--length", "1s"]
    if name.startswith("resume"):
        arguments = arguments[:2]
    with pytest.raises(SystemExit) as stopped:
        command.run(lambda _: main(arguments))
    output = capsys.readouterr()
    assert stopped.value.code == code, output.err
    assert text in output.err
    assert "Traceback" not in output.err
    assert len(output.err.strip().splitlines()) == 1
