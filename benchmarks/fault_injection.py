"""The faults: what each one prepares, and what it does to a running federation."""

import contextlib
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil

from benchmarks.bad_updates import POISONS, write_double
from benchmarks.fault_lab import read_log
from benchmarks.fault_outcome import Outcome
from benchmarks.fault_trial import TRAIN, UP, TimeUp, Trial
from benchmarks.poison import KINDS
from benchmarks.small_disk import fill, small_disk
from benchmarks.tcp_proxy import Proxy


def kill_client_app(trial: Trial) -> None:
    """SIGKILL of a ClientApp, as by an OOM killer."""
    trial.client_app().kill()


def kill_node(trial: Trial) -> None:
    """SIGKILL of a SuperNode, with all it started (a power cut) or alone; it is restarted."""
    trial.round_begins(trial.at, 8)
    below = psutil.Process(trial.node.pid).children(recursive=True)
    trial.node.kill()
    trial.node.wait()
    if trial.rng.random() < 0.5:
        for process in below:
            with contextlib.suppress(psutil.Error):
                process.kill()
    trial.sleep(trial.rng.uniform(2, 6))
    trial.lab.start_node(trial.victim)
    _note_orphans(trial, below)


def kill_link(trial: Trial) -> None:
    """SIGKILL of the SuperLink, which is restarted, with its database or without one."""
    trial.round_begins(trial.at, 10)
    lab = trial.lab
    assert lab.link is not None
    below = psutil.Process(lab.link.pid).children(recursive=True)
    lab.link.kill()
    lab.link.wait()
    trial.wait(trial.ended, "flwr run ends", 15)
    psutil.wait_procs(below, timeout=10)  # Flower ends what the SuperLink started.
    _note_orphans(trial, below)
    for _ in range(3):
        before = read_log(lab.link_log).count(UP)
        lab.start_link()
        link = lab.link
        trial.wait(
            lambda: read_log(lab.link_log).count(UP) > before or link.poll() is not None,  # noqa: B023
            "the SuperLink is up again",
        )
        if link.poll() is None:
            break
    trial.resume()


def kill_server_app(trial: Trial) -> None:
    """SIGKILL of the ServerApp."""
    trial.round_begins(trial.at, 10)
    for process in trial.lab.started_by(trial.lab.link, "flwr-serverapp"):
        process.kill()
    trial.wait(trial.ended, "flwr run ends", 5)  # it may not notice for a minute
    if not trial.whole():
        trial.resume()


def fill_client_disk(trial: Trial) -> None:
    """No space for a client's state, for about a round."""
    trial.round_begins(trial.at, 3)
    disk = trial.lab.folder / "state" / f"node-{trial.victim}"
    filler = fill(disk, trial.rng.choice((0, 2**12, 2**20)))
    log = trial.lab.node_log(trial.victim)
    trial.wait(
        lambda: trial.ended() or read_log(log).count(TRAIN) > trial.at + 1,
        "a round",
        trial.deadline,
    )
    trial.sleep(trial.rng.uniform(0, 8))
    filler.unlink()


def fill_server_disk(trial: Trial) -> None:
    """No space in the run directory; freed when the run has failed."""
    trial.round_begins(trial.at, 6)
    filler = fill(trial.output, trial.rng.choice((0, 2**12, 2**20)))
    trial.wait(trial.ended, "the run fails")
    filler.unlink()
    if "no space left" not in trial.stream():
        trial.outcome.notes.append("the run failed without saying that the disk is full")


def cut_network(trial: Trial) -> None:
    """Connections of a node are reset during an upload, then refused for some seconds."""
    (proxy,) = trial.lab.proxies
    trial.round_begins(trial.at)
    size = 300_000 if trial.encoding == "int8" else 1_500_000
    proxy.cut_after(trial.rng.randrange(20_000, size), trial.rng.uniform(2, 8))
    if not trial.wait(proxy.was_cut.is_set, "an upload", 60):
        trial.outcome.notes.append("cut while nothing was being sent")
        proxy.cut()


def hang(trial: Trial) -> None:
    """A ClientApp, or a whole device, hangs for longer than the deadline."""
    app = trial.client_app()
    node = psutil.Process(trial.node.pid)
    whole = trial.rng.random() < 0.5
    stopped = [node, *node.children(recursive=True)] if whole else [app]
    trial.outcome.notes.append("all of the device hangs" if whole else "the ClientApp hangs")
    for process in stopped:
        with contextlib.suppress(psutil.Error):
            process.suspend()
    trial.sleep(trial.deadline + trial.rng.uniform(3, 10))
    for process in stopped:
        with contextlib.suppress(psutil.Error):
            process.resume()


def send_bad_updates(trial: Trial) -> None:
    """Nothing: the client's double sends them, see `bad_updates`."""


def _note_orphans(trial: Trial, below: list[Any]) -> None:
    psutil.wait_procs(below, timeout=10)
    for process in below:
        with contextlib.suppress(psutil.Error):
            name = " ".join(Path(word).name for word in process.cmdline()[1:2])
            trial.outcome.notes.append(f"{name} outlives its parent by 10 s")


FAULTS: dict[str, Callable[[Trial], None]] = {
    "clientapp": kill_client_app,
    "supernode": kill_node,
    "superlink": kill_link,
    "superlink_memory": kill_link,
    "serverapp": kill_server_app,
    "disk_client": fill_client_disk,
    "disk_server": fill_server_disk,
    "network": cut_network,
    "poisoned": send_bad_updates,
    "truncated": send_bad_updates,
    "replayed": send_bad_updates,
    "hang": hang,
    **dict.fromkeys(KINDS, send_bad_updates),
}


def _mount_state(trial: Trial) -> None:
    path = trial.lab.folder / "state" / f"node-{trial.victim}"
    trial.stack.enter_context(small_disk(path, 64))


def _mount_output(trial: Trial) -> None:
    trial.stack.enter_context(small_disk(trial.output, 192))


def _add_proxy(trial: Trial) -> None:
    proxy = Proxy(trial.lab.port)
    trial.lab.proxies.append(proxy)
    trial.lab.ways[trial.victim] = proxy.port


def _add_double(trial: Trial) -> None:
    folder = trial.lab.folder / "double"
    rounds = range(trial.rounds) if trial.fault in KINDS else [trial.at]
    write_double(folder, trial.fault, trial.lab.folder, rounds, trial.rng.choice(POISONS))
    trial.lab.doubles[trial.victim] = folder


PREPARE: dict[str, Callable[[Trial], None]] = {
    "disk_client": _mount_state,
    "disk_server": _mount_output,
    "network": _add_proxy,
    **dict.fromkeys(("poisoned", "truncated", "replayed", *KINDS), _add_double),
}


@contextlib.contextmanager
def _uninterrupted() -> Iterator[None]:
    """Delay Ctrl-C and SIGTERM until the end, so that no process is left behind."""
    caught: list[int] = []
    asked = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(one, lambda number, frame: caught.append(number)) for one in asked]
    try:
        yield
    finally:
        for one, handler in zip(asked, before, strict=True):
            signal.signal(one, handler)
    if caught:
        raise KeyboardInterrupt


def take(trial: Trial) -> Outcome:
    """Take a run from start to end; afterwards none of its processes is left."""
    try:
        PREPARE.get(trial.fault, lambda trial: None)(trial)
        trial.stack.callback(trial.lab.end)
        try:
            trial.start()
            FAULTS[trial.fault](trial)
            trial.finish()
        except (TimeUp, psutil.Error) as error:
            trial.outcome.notes.append(str(error))
        trial.judge()
    finally:
        with _uninterrupted():
            trial.stack.close()
        trial.outcome.seconds = round(time.monotonic() - trial.started, 1)
    return trial.outcome
