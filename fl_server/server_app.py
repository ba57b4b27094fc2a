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
from fl_server.jobs import describe_round, job_of
from fl_server.rounds import Federation, Roster, state_of
from fl_server.server_optimizer import ServerOptimizer
from fl_server.status import Status
from ssl_core.downstream.task_model import LOGMEL, RANDOM
from ssl_core.training import checkpoint
from ssl_core.training.crops import describe
from ssl_core.training.run_directory import CONFIG, RunDirectory

app = ServerApp()

_FREE = {"output", "resume", "keep", "wait", "min_clients", "deadline", "patience"}
"""Settings that may change when a run goes on; all others must stay."""


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run a federation; everything it makes is in its run directory."""
    if context.node_config.get("simulated"):
        # simulation/ reports its data, its errors and where the results are
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
            # Flower prints the traceback of what comes out of here; its last line is what counts.
            sys.tracebacklimit = 0
        text = describe_os_error(error) if isinstance(error, OSError) else str(error)
        print(f"error: {text}", flush=True)
        raise


def check_paths(settings: FederationSettings) -> None:
    """Refuse relative paths: SuperLink, devices and user each stand in a folder of their own.

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
    """The run directory: a new one, or that of `resume` if its settings are the same.

    Raises:
        UsageError: not empty, not a run, or a run with other settings.
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
    """The settings a run was started with.

    Raises:
        UsageError: there is no run.
    """
    RunDirectory.reopen(path)
    return from_mapping(FederationSettings, read_yaml(path / CONFIG), str(path / CONFIG))


def serve(grid: Grid, settings: FederationSettings, manifest: str = "") -> Path:
    """Run all rounds that are left and return the run directory.

    Args:
        grid: a Flower Grid.
        settings: of the run.
        manifest: file of the recut corpus, if it has been made already.

    Raises:
        Interrupted: stopped by the user; the run can be resumed.
    """
    console = Console(stderr=True)

    def say(text: str, style: str | None = None) -> None:
        """Print a line as it is: a reason that a client gave must not be taken for markup."""
        console.print(text, style=style, highlight=False, markup=False, soft_wrap=True)

    job = job_of(settings, manifest)  # before there is a run, as data may be wrong
    run = open_run(settings)
    run.lock()
    saved = checkpoint.latest(run.checkpoints)
    state: dict[str, Any] = {"next_round": 0}
    sent: dict[str, torch.Tensor] = {}
    optimizer = ServerOptimizer(
        settings.server_optimizer, settings.server_rate, settings.server_momentum
    )
    if saved is not None:
        state, optimizer_state = job.restore(saved)
        sent = {name: value for name, value in optimizer_state.items() if name.startswith(PREFIX)}
        optimizer.moments = {
            name: value for name, value in optimizer_state.items() if name not in sent
        }
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
                # Metrics first: a round that is logged and not saved is taken and logged again.
                values = job.row(result) | job.evaluate()
                run.log(number + 1, values | {"evaluate_seconds": time.monotonic() - started})
                state = state_of(number, settings, federation)
                optimizer_state = optimizer.moments | federation.broadcast.state()
                job.save(run.checkpoints / f"round-{number + 1:05d}", state, optimizer_state)
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
