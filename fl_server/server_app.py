"""Flower's ServerApp: opens the run directory, runs the rounds, evaluates and saves after each."""

import dataclasses
import functools
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
from flwr.app import Context
from flwr.serverapp import Grid, ServerApp
from rich.console import Console

from common.command import describe_os_error
from common.errors import Interrupted, ShortwaveError, UsageError
from common.progress import bar_of
from common.settings import from_mapping, read_yaml
from fl_client.federation_settings import FederationSettings
from fl_server.broadcast import PREFIX
from fl_server.fine_tuning_job import FineTuning
from fl_server.job import Job, describe_round
from fl_server.pretraining_job import Pretraining
from fl_server.roster import Roster
from fl_server.rounds import Federation, state_of
from fl_server.server_optimizer import ServerOptimizer
from fl_server.status import Status
from ssl_core.downstream.task_model import LOGMEL, RANDOM
from ssl_core.training import checkpoint
from ssl_core.training.crops import describe
from ssl_core.training.run_directory import CONFIG, RunDirectory

app = ServerApp()

_FREE = {"output", "resume", "keep", "wait", "min_clients", "deadline", "patience"}
"""Settings that may change when a run is resumed."""


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run a federation; all results are in its run directory."""
    if context.node_config.get("simulated"):
        # simulation/ prints the data, the errors and where the results are.
        manifest = str(context.node_config.get("manifest", ""))
        serve(grid, FederationSettings.from_run_config(context.run_config), manifest)
        return
    try:
        settings = FederationSettings.from_run_config(context.run_config)
        check_paths(settings)
        if settings.fleet or settings.time_limit:
            raise UsageError("fleet and time-limit are for simulated devices; real ones plan here")
        if settings.eval_crops and settings.held_out and not settings.task:
            data = describe(Path(settings.data), not settings.data)
            print(f"evaluation on held-out speakers; {data}", flush=True)
        path = serve(grid, settings)
        print(f"run directory: {path}", flush=True)
    except (ShortwaveError, OSError) as error:
        if not os.environ.get("SHORTWAVE_TRACEBACK"):
            # Flower prints the traceback of any error raised here; its last line suffices.
            sys.tracebacklimit = 0
        text = describe_os_error(error) if isinstance(error, OSError) else str(error)
        print(f"error: {text}", flush=True)
        raise


def check_paths(settings: FederationSettings) -> None:
    """Refuse relative paths: SuperLink, devices and user each have their own working directory.

    Raises:
        UsageError: a path of the run config is not absolute.
    """
    for name in ("data", "checkpoint", "output", "resume"):
        value = getattr(settings, name)
        named = name == "checkpoint" and settings.task and value in (RANDOM, LOGMEL)
        if value and not named and not os.path.isabs(value):
            raise UsageError(
                f"run config: {name}='{value}' is not an absolute path, and this app runs where "
                f"flower-superlink was started ({Path.cwd()}), not where `flwr run` was"
            )


def open_run(settings: FederationSettings) -> RunDirectory:
    """Create the run directory, or reopen that of `resume` if its settings are the same.

    Raises:
        UsageError: the directory is not empty, not a run, or a run with other settings.
    """
    if not settings.resume:
        stamp = time.strftime("%Y%m%d-%H%M%S")
        path = Path(settings.output or f"runs/{stamp}-{settings.model}-{settings.length}")
        return RunDirectory.create(path.resolve(), settings.as_config())
    run = RunDirectory.reopen(Path(settings.resume).resolve())
    stored = stored_settings(run.path)
    for field in dataclasses.fields(settings):
        given, kept = getattr(settings, field.name), getattr(stored, field.name)
        if field.name not in _FREE and given != kept:
            name = field.name.replace("_", "-")
            raise UsageError(f"--resume {run.path}: {name} was {kept!r} there and is {given!r} now")
    return run


def stored_settings(path: Path) -> FederationSettings:
    """The settings that a run was started with.

    Raises:
        UsageError: the directory is not a run.
    """
    RunDirectory.reopen(path)
    return from_mapping(FederationSettings, read_yaml(path / CONFIG), str(path / CONFIG))


def job_of(settings: FederationSettings, manifest: str) -> Job:
    """The job of a run; `manifest` is a file of the recut corpus, or empty.

    Raises:
        ShortwaveError: the settings or the data cannot be used.
    """
    return FineTuning(settings) if settings.task else Pretraining(settings, manifest)


def serve(grid: Grid, settings: FederationSettings, manifest: str = "") -> Path:
    """Run the remaining rounds and return the run directory.

    Args:
        grid: connects to the clients.
        settings: of the run.
        manifest: an existing file of the recut corpus, or empty.

    Raises:
        Interrupted: stopped by the user; the run can be resumed.
    """
    console = Console(stderr=True)

    def say(text: str, style: str | None = None) -> None:
        """Print a line as it is: text from a client must not be read as markup."""
        console.print(text, style=style, highlight=False, markup=False, soft_wrap=True)

    job = job_of(settings, manifest)  # before the run directory, as it checks the data
    run = open_run(settings)
    run.lock()
    saved = checkpoint.latest(run.checkpoints)
    state: dict[str, Any] = {"next_round": 0}
    sent: dict[str, torch.Tensor] = {}
    optimizer = ServerOptimizer(
        settings.server_optimizer, settings.server_rate, settings.server_momentum
    )
    if saved is not None:
        state, tensors = job.restore(saved)
        sent = {name: value for name, value in tensors.items() if name.startswith(PREFIX)}
        optimizer.state = {name: value for name, value in tensors.items() if name not in sent}
    else:
        job.start()
    first = int(state["next_round"])
    if saved is not None:
        say(f"going on with {run.path} at round {first + 1} of {settings.rounds}")
    if settings.resume:
        run.rewind(first + 1)
    checkpoint.prune(run.checkpoints, settings.keep)
    roster = Roster(grid, settings, say)
    clients = roster.gather()
    status = Status(run.path, settings.rounds)
    federation = Federation(job.weights, optimizer, settings, run.identity(), job.backbone)
    federation.broadcast.load(sent, state.get("held", {}))
    federation.folded = {int(key): number for key, number in state.get("folded", {}).items()}
    try:
        with bar_of(console) as progress:
            bar = progress.add_task("clients", total=(settings.rounds - first) * min(
                settings.clients_per_round, len(clients)))  # fmt: skip
            status.advance = functools.partial(progress.advance, bar)
            for number in range(first, settings.rounds):
                clients = clients if number == first else roster.refresh()
                result = federation.round(grid, clients, number, status)
                started = time.monotonic()
                # Log before saving: a round that is logged but not saved is taken again, and its
                # row replaced.
                values = job.row(result) | job.evaluate()
                run.log(number + 1, values | {"evaluate_seconds": time.monotonic() - started})
                state = state_of(number, settings, federation)
                tensors = optimizer.state | federation.broadcast.state()
                job.save(run.checkpoints / f"round-{number + 1:05d}", state, tensors)
                checkpoint.prune(run.checkpoints, settings.keep)
                say(describe_round(job, result, values, settings))
                for failure in result.failures:
                    say(f"  {failure}")
                warning = job.warning(result)
                if warning:
                    say(warning, "yellow")
        for line in job.finish(federation, grid, clients, run):
            say(line)
    except KeyboardInterrupt:
        raise Interrupted(f"interrupted; go on with --resume {run.path}") from None
    finally:
        run.close()
    rows = run.metrics()
    if rows:
        job.plot(rows, run.path / "curves.png")
    return run.path
