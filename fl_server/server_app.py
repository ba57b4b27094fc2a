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

from fl_client.local_data import held_out, load_manifest
from fl_client.settings import FederationSettings
from fl_server.broadcast import PREFIX
from fl_server.optimizer import ServerOptimizer
from fl_server.rounds import Federation, Roster, RoundResult, state_of
from fl_server.status import Status
from partitions.command import describe_os_error
from partitions.errors import Interrupted, ShortwaveError, UsageError
from partitions.progress import bar_of
from partitions.settings import from_mapping, read_yaml
from partitions.speakers import select
from partitions.units import SAMPLE_RATE, format_bytes, format_seconds
from ssl_core import checkpoint, randomness
from ssl_core.collapse import CollapseAlarm
from ssl_core.crops import CropBatch, Crops, describe
from ssl_core.evaluation import Evaluation, evaluate
from ssl_core.figures import plot_curves
from ssl_core.run_directory import CONFIG, RunDirectory
from ssl_core.wav2vec2 import hf
from ssl_core.wav2vec2.model import PretrainingModel

app = ServerApp()

_OF_A_CLIENT = ("length", "batch", "micro_batch", "peak_bytes", "fallbacks")
_FREE = {"output", "resume", "keep", "wait", "min_clients", "deadline", "patience"}
"""Settings that may change when a run goes on; all others must stay."""


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run a federation; everything it makes is in its run directory."""
    manifest = str(context.node_config.get("manifest", ""))
    if manifest:  # simulation/ reports its data, its errors and where the results are
        serve(grid, FederationSettings.from_run_config(context.run_config), manifest)
        return
    try:
        settings = FederationSettings.from_run_config(context.run_config)
        check_paths(settings)
        if settings.fleet or settings.time_limit:
            raise UsageError("fleet and time-limit are for simulated devices; real ones plan here")
        if settings.eval_crops and settings.held_out:
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
        if value and not os.path.isabs(value):
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


class Evaluator:
    """The global model on the speakers that no client hears."""

    def __init__(
        self, model: PretrainingModel, settings: FederationSettings, manifest: str
    ) -> None:
        """Decode the held-out crops once.

        Raises:
            DataError: none of them is usable.
        """
        self.model, self.plan, self.seed = model, settings.resolved_plan(), settings.seed
        self.device = torch.device(self.plan.device)
        self.crops: CropBatch | None = None
        if not settings.held_out or not settings.eval_crops:
            return  # a server that does not evaluate needs no corpus
        corpus = load_manifest(settings.data, settings.subsets, settings.seconds, manifest)
        speakers = held_out(corpus, settings)
        if speakers:
            held = Crops(corpus, select(corpus, speakers), self.plan.samples, self.seed)
            self.crops = held.fixed(settings.eval_crops)

    def __call__(self, weights: dict[str, torch.Tensor]) -> Evaluation | None:
        """Evaluate weights; None when there is nothing held out."""
        if self.crops is None:
            return None
        model = self.model
        if self.device.type != "cpu":
            model = PretrainingModel(self.model.config)
            hf.load_into(model, weights, "the global model")
            model.to(self.device)
        return evaluate(
            model,
            self.crops,
            chunk=self.plan.chunk,
            device=self.device,
            seed=self.seed,
            precision=self.plan.precision,
        )


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

    config, _ = settings.model_and_recipe()
    with randomness.torch_seed(torch.device("cpu"), settings.seed, "weights"):
        model = PretrainingModel(config)
    evaluator = Evaluator(model, settings, manifest)  # before there is a run, as data may be wrong
    run = open_run(settings)
    run.lock()
    saved = checkpoint.latest(run.checkpoints)
    state: dict[str, Any] = {"next_round": 0}
    sent: dict[str, torch.Tensor] = {}
    optimizer = ServerOptimizer(
        settings.server_optimizer, settings.server_rate, settings.server_momentum
    )
    if saved is not None:
        loaded = checkpoint.load(saved)
        hf.load_into(model, loaded.weights, str(saved))
        state = loaded.state
        sent = {name: value for name, value in loaded.extra.items() if name.startswith(PREFIX)}
        optimizer.moments = {
            name: value for name, value in loaded.extra.items() if name not in sent
        }
    elif settings.checkpoint:
        path = Path(settings.checkpoint)
        hf.load_into(model, hf.load_weights(path), str(path))
    weights = dict(model.state_dict())  # shares the model's memory: one copy serves both
    first = int(state["next_round"])
    if saved is not None:
        say(f"going on with {run.path} at round {first + 1} of {settings.rounds}")
    if settings.resume:
        run.rewind(first + 1)
    checkpoint.prune(run.checkpoints, settings.keep)
    roster = Roster(grid, settings, say)
    clients = roster.gather()
    status = Status(run.path, settings.rounds)
    federation = Federation(weights, optimizer, settings, run.identity())
    federation.broadcast.load(sent, state.get("held", {}))
    federation.folded = {int(key): number for key, number in state.get("folded", {}).items()}
    alarm = CollapseAlarm(config)
    try:
        with bar_of(console) as progress:
            bar = progress.add_task("clients", total=(settings.rounds - first) * min(
                settings.clients_per_round, len(clients)))  # fmt: skip
            status.advance = functools.partial(progress.advance, bar)
            for number in range(first, settings.rounds):
                clients = clients if number == first else roster.refresh()
                result = federation.round(grid, clients, number, status)
                started = time.monotonic()
                held = evaluator(weights)
                # Metrics first: a round that is logged and not saved is taken and logged again.
                values = _row(result, held, settings)
                run.log(number + 1, values | {"evaluate_seconds": time.monotonic() - started})
                checkpoint.save(
                    run.checkpoints / f"round-{number + 1:05d}",
                    config,
                    weights,
                    state=state_of(number, settings, federation),
                    extra=optimizer.moments | federation.broadcast.state(),
                )
                checkpoint.prune(run.checkpoints, settings.keep)
                say(_line(result, held, settings))
                for failure in result.failures:
                    say(f"  {failure}")
                warning = alarm.check(
                    (number + 1) * settings.local_updates,
                    contrastive=result.metrics["contrastive"],
                    accuracy=result.metrics["accuracy"],
                    perplexity=result.metrics["perplexity"],
                )
                if warning:
                    say(warning, "yellow")
    except KeyboardInterrupt:
        raise Interrupted(f"interrupted; go on with --resume {run.path}") from None
    finally:
        run.close()
    rows = run.metrics()
    if rows:
        plot_curves(
            {"federated": rows},
            run.path / "curves.png",
            negatives=config.num_negatives,
            unit="global update",
        )
    return run.path


def _row(
    result: RoundResult, held: Evaluation | None, settings: FederationSettings
) -> dict[str, Any]:
    row: dict[str, Any] = {
        "updates_done": (result.number + 1) * settings.local_updates,
        **result.metrics,
    }
    if held is not None:
        row |= {
            "held_out_loss": held.loss,
            "held_out_accuracy": held.accuracy,
            "held_out_perplexity": held.perplexity,
        }
    row["clients"] = [
        {
            "key": int(client["key"]),
            "seconds": client["samples"] / SAMPLE_RATE,
            **{name: client[name] for name in _OF_A_CLIENT},
        }
        for client in result.clients
    ]
    return row


def _line(result: RoundResult, held: Evaluation | None, settings: FederationSettings) -> str:
    metrics = result.metrics
    text = (
        f"round {result.number + 1}/{settings.rounds}  "
        f"loss {metrics['contrastive']:.3f}  accuracy {metrics['accuracy']:.3f}  "
        f"perplexity {metrics['perplexity']:.0f}"
    )
    if held is not None:
        text += (
            f"  | held out: loss {held.loss:.3f}  accuracy {held.accuracy:.3f}  "
            f"perplexity {held.perplexity:.0f}"
        )
    skipped = sum(int(v) for k, v in metrics.items() if k.startswith("skipped_"))
    text += (
        f"  | {format_seconds(metrics['round_seconds'])}"
        f", sent {format_bytes(metrics['bytes_sent'])}"
        f", received {format_bytes(metrics['bytes_received'])}"
    )
    if skipped:
        text += f", {skipped} crops skipped"
    if result.failures:
        text += f", {len(result.failures)} of {int(metrics['cohort'])} clients failed"
    return text
