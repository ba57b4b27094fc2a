"""Flower's ServerApp: opens the run directory, runs the rounds, evaluates and saves after each."""

import functools
import os
import sys
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp
from rich.console import Console

from common.command import describe_os_error
from common.errors import Interrupted, ShortwaveError, UsageError
from common.progress import bar_of
from fl_client.federation_settings import RunSettings, TaskFederation, from_run_config
from fl_server.fine_tuning_job import FineTuning
from fl_server.job import Job, describe_round
from fl_server.loss_guard import LossGuard
from fl_server.pretraining_job import Pretraining
from fl_server.roster import Roster
from fl_server.round_result import RoundResult
from fl_server.rounds import Federation
from fl_server.server_optimizer import ServerOptimizer
from fl_server.status import Status
from partitions.corpus_record import NOTHING, CorpusRecord
from ssl_core.downstream.task_model import LOGMEL, RANDOM
from ssl_core.planning.processor import use_threads
from ssl_core.training import checkpoint
from ssl_core.training.crops import describe
from ssl_core.training.divergence import Watch
from ssl_core.training.run_directory import RunDirectory, open_run

app = ServerApp()

_FREE = {
    "output", "resume", "keep", "wait", "min_clients", "deadline", "patience", "loss_margin",
    "undone_rounds",
}  # fmt: skip
"""Settings that may change when a run is resumed."""


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run a federation; all results are in its run directory."""
    if context.node_config.get("simulated"):
        # simulation/ prints the data, the errors and where the results are.
        manifest = str(context.node_config.get("manifest", ""))
        serve(grid, from_run_config(context.run_config), manifest)
        return
    try:
        settings = from_run_config(context.run_config)
        check_paths(settings)
        if not isinstance(settings, TaskFederation):
            if settings.fleet or settings.time_limit:
                raise UsageError(
                    "fleet and time-limit are for simulated devices; real ones plan here"
                )
            if settings.eval_crops and settings.held_out:
                data = describe(settings.data or Path(), settings.data is None)
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


def check_paths(settings: RunSettings) -> None:
    """Refuse relative paths: SuperLink, devices and user each have their own working directory.

    Raises:
        UsageError: a path of the run config is not absolute.
    """
    for name in ("data", "checkpoint", "output", "resume"):
        value = getattr(settings, name)
        named = isinstance(settings, TaskFederation) and value in (RANDOM, LOGMEL)
        if value and not named and not os.path.isabs(value):
            raise UsageError(
                f"run config: {name}='{value}' is not an absolute path, and this app runs where "
                f"flower-superlink was started ({Path.cwd()}), not where `flwr run` was"
            )


def open_federation(
    settings: RunSettings, record: CorpusRecord = NOTHING, places: Collection[str] = ("data",)
) -> RunDirectory:
    """Create the run directory, or reopen that of `resume` if settings and corpus are the same.

    Args:
        settings: of the run.
        record: of the corpus, as far as it is read here.
        places: see `open_run`.

    Raises:
        UsageError: the directory is not empty, not a run, or a run with other settings or another
            corpus.
    """
    if isinstance(settings, TaskFederation):
        what = settings.task
        if settings.checkpoint not in (RANDOM, LOGMEL):
            places = {*places, "checkpoint"}  # the record compares its weights
    else:
        what = str(settings.length)
    return open_run(settings, f"{settings.model}-{what}", _FREE, record, places)


def job_of(settings: RunSettings, manifest: str) -> Job:
    """The job of a run; `manifest` is a file of the recut corpus, or empty.

    Raises:
        ShortwaveError: the settings or the data cannot be used.
    """
    if isinstance(settings, TaskFederation):
        return FineTuning(settings)
    return Pretraining(settings, manifest)


def serve(grid: Grid, settings: RunSettings, manifest: str = "") -> Path:
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

    use_threads(0)
    job = job_of(settings, manifest)  # before the run directory, as it checks the data
    run = open_federation(settings, job.record)
    run.lock()
    try:
        optimizer = ServerOptimizer(
            settings.server_optimizer, settings.server_rate, settings.server_momentum
        )
        federation = Federation(
            job.weights, optimizer, settings, run.identity(), job.told, run.path
        )
        guard = LossGuard.of(settings)
        first = _start(job, federation, guard, run, say)
        if settings.resume:
            run.rewind(first + 1)
        checkpoint.prune(run.checkpoints, settings.keep)
        roster = Roster(grid, settings, say)
        clients = roster.gather()
        status = Status(run.path, settings.rounds)
        with bar_of(console) as progress:
            replies = (settings.rounds - first) * min(settings.clients_per_round, len(clients))
            bar = progress.add_task("clients", total=replies)
            status.advance = functools.partial(progress.advance, bar)
            for number in range(first, settings.rounds):
                clients = clients if number == first else roster.refresh()
                result = federation.round(grid, clients, number, status, guard.watches)
                row, harm = _log_and_save(job, federation, guard, run, result)
                say(describe_round(job, result, row, settings))
                for line in (*result.failures, *result.bounded):
                    say(f"  {line}")
                warning = job.warning(result)
                if harm:
                    say(f"round {number + 1} is undone: {harm}", "yellow")
                elif warning:
                    say(warning, "yellow")
                guard.require_progress(run.path)
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


def _start(
    job: Job,
    federation: Federation,
    guard: LossGuard,
    run: RunDirectory,
    say: Callable[[str], None],
) -> int:
    """Restore the newest checkpoint, if there is one; the round to take next."""
    saved = checkpoint.latest(run.checkpoints)
    first = 0
    if saved is None:
        for line in job.start():
            say(line)
    else:
        state, tensors = job.restore(saved)
        federation.restore(state, tensors)
        guard.restore(state)
        first = int(state["next_round"])
        say(f"going on with {run.path} at round {first + 1} of {federation.settings.rounds}")
    if guard.margin and not guard.kept:
        guard.kept = job.evaluate()
    return first


def _log_and_save(
    job: Job, federation: Federation, guard: LossGuard, run: RunDirectory, result: RoundResult
) -> tuple[dict[str, Any], str]:
    """Evaluate a round, undo it if it did harm, log and save it.

    It is logged first: a round that is logged but not saved is taken and logged again.

    Returns:
        The logged metrics, where the held-out ones are of the weights that are kept, and the harm.

    Raises:
        Diverged: the weights or the held-out loss are not finite.
    """
    started = time.monotonic()
    found = job.evaluate()
    harm = guard.check(found)
    if harm:
        federation.undo()
    row = job.row(result) | (guard.kept if harm else found) | {"undone": int(bool(harm))}
    run.log(result.number + 1, row | {"evaluate_seconds": time.monotonic() - started})
    watch = Watch(lambda: checkpoint.latest(run.checkpoints))
    watch.require_finite("held-out loss", row.get("held_out_loss", 0.0), row["updates_done"])
    path = run.checkpoints / f"round-{result.number + 1:05d}"
    job.save(path, federation.state(result.number) | guard.state(), federation.tensors())
    checkpoint.prune(run.checkpoints, federation.settings.keep)
    return row, harm
