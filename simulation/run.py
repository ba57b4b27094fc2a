"""Simulate a federation on Ray: `python simulation/run.py --clients 100 --length 5s`."""

import argparse
import dataclasses
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from fl_client.environment import be_quiet

be_quiet()

import ray  # noqa: E402
from flwr.app import Context, RecordDict  # noqa: E402

from common import command  # noqa: E402
from common.errors import UsageError  # noqa: E402
from common.settings import add_options, from_mapping, from_texts, read_yaml  # noqa: E402
from common.units import format_bytes, format_seconds  # noqa: E402
from fl_client.federation_settings import FederationSettings  # noqa: E402
from fl_client.local_data import held_out  # noqa: E402
from fl_client.task_data import divide_pool, load_pool  # noqa: E402
from fl_client.task_training import Resident  # noqa: E402
from fl_server.server_app import app as server_app  # noqa: E402
from fl_server.server_app import open_run, stored_settings  # noqa: E402
from partitions.demo_corpus import demo_corpus  # noqa: E402
from partitions.manifest import Manifest, write_manifest  # noqa: E402
from partitions.prepared import prepare  # noqa: E402
from partitions.speakers import partition  # noqa: E402
from simulation.fleet import make_fleet  # noqa: E402
from simulation.ray_grid import RUN_ID, SERVER_NODE, RayGrid, start_ray  # noqa: E402
from simulation.report import write_report  # noqa: E402
from ssl_core.planning.step_plan import Plan  # noqa: E402
from ssl_core.training.checkpoint import latest  # noqa: E402
from ssl_core.training.crops import describe  # noqa: E402
from ssl_core.training.run_directory import RunDirectory  # noqa: E402
from ssl_core.wav2vec2.model import PretrainingModel  # noqa: E402

_NOT_HERE = ("min_clients", "wait", "deadline", "patience")


def parse(arguments: Sequence[str] | None) -> tuple[FederationSettings, int, str]:
    """The settings, the number of workers and the address of a Ray cluster.

    Options on the command line go before those of `--config`, which go before the defaults; with
    `--resume` the run's own settings take the place of the defaults.

    Raises:
        UsageError: an unknown setting or a bad value.
    """
    parser = command.Parser(
        prog="python simulation/run.py",
        description=__doc__,
        formatter_class=argparse.HelpFormatter,
    )
    parser.add_argument("--config", type=Path, help="YAML file of any of the options below")
    parser.add_argument(
        "--workers",
        type=command.argument(command.positive),
        help="processes that train clients, with --threads threads each; does not change the "
        "result (default: one for each CPU core, at most --clients-per-round)",
    )
    parser.add_argument(
        "--address", default="", help="Ray cluster to join (default: start Ray here)"
    )
    add_options(parser, FederationSettings, skip=_NOT_HERE)
    given = vars(parser.parse_args(arguments))
    config, workers, address = given.pop("config"), given.pop("workers"), given.pop("address")
    values = from_texts(FederationSettings, given)
    if config is not None:
        listed = {str(key).replace("-", "_"): value for key, value in read_yaml(config).items()}
        workers = workers or listed.pop("workers", None)
        address = address or listed.pop("address", "")
        from_mapping(FederationSettings, listed, str(config))
        values = listed | values
    if values.get("resume"):
        stored = dataclasses.asdict(stored_settings(Path(values["resume"])))
        values = stored | values
    settings = from_mapping(FederationSettings, values, "options")
    cores = os.cpu_count() or 1
    return settings, workers or min(cores, settings.clients_per_round), address


def main(arguments: Sequence[str] | None = None) -> int:
    """Simulate; returns the exit code."""
    settings, workers, address = parse(arguments)
    if settings.clients_per_round > settings.clients:
        raise UsageError(
            f"--clients-per-round {settings.clients_per_round} is more than the "
            f"{settings.clients} clients"
        )
    if settings.time_limit and not settings.fleet:
        raise UsageError("--time-limit is for the devices of a --fleet")
    return (_simulate_task if settings.task else _simulate_pretraining)(settings, workers, address)


def _simulate_pretraining(settings: FederationSettings, workers: int, address: str) -> int:
    root = Path(settings.data) if settings.data else demo_corpus()
    print(describe(root, not settings.data))
    manifest = prepare(root, settings.subsets, settings.seconds, progress=True)
    excluded = held_out(manifest, settings)
    how: Any = settings.partition
    parts = partition(manifest, settings.clients, how, settings.seed, excluded)
    _say_what_there_is(manifest, parts, excluded, settings)
    fleet = make_fleet(settings) if settings.fleet else None
    run = open_run(settings)
    file = run.path / "manifest.tsv"
    write_manifest(file, manifest)
    nodes = [
        {"manifest": str(file), **(fleet.node(number) if fleet else {})}
        for number in range(settings.clients)
    ]
    config, _ = settings.model_and_recipe()
    size = sum(p.numel() * 4 for p in PretrainingModel(config).parameters())
    plan = settings.resolved_plan()
    _simulate(settings, run, plan, nodes, size, workers, address)
    report = write_report(run, settings, manifest, parts, excluded, fleet)
    print(f"report: {report}")
    print(f"checkpoint: {latest(run.checkpoints)}")
    print(run.path)
    return 0


def _simulate_task(settings: FederationSettings, workers: int, address: str) -> int:
    if not settings.data:
        raise UsageError(f"--data: give the corpus of {settings.task}")
    recipe = settings.task_recipe()
    pool = load_pool(settings.task_settings())
    parts = divide_pool(
        pool, settings.clients, settings.partition, settings.seed, recipe.transcribes
    )
    for line in pool.skips:
        print(line)
    counts = sorted(len(part) for part in parts)
    print(
        f"{settings.task}: {len(pool.clips)} clips, {len(pool.labels)} "
        f"{'symbols' if recipe.transcribes else 'classes'}; {len(parts)} clients with "
        f"{counts[0]} to {counts[-1]} clips each, of which they keep a share of "
        f"{settings.own_test:g} to be tested on"
    )
    size = _say_what_is_shared(settings, len(pool.labels))
    run = open_run(settings)
    nodes: list[dict[str, Any]] = [{} for _ in parts]
    plan = settings.task_plan(recipe)
    _simulate(settings, run, plan, nodes, size, workers, address)
    print(f"checkpoint: {latest(run.checkpoints)}")
    print(run.path)
    return 0


def _say_what_is_shared(settings: FederationSettings, labels: int) -> int:
    """The bytes that are shared; the model is gone again when this returns."""
    own = Resident(settings, labels)
    size = sum(value.numel() * 4 for value in own.state_dict().values())
    print(
        f"{settings.method}: {len(own.parts.shared)} tensors are shared, {format_bytes(size)}; "
        f"{len(own.parts.personal)} are personal"
    )
    return size


def _simulate(
    settings: FederationSettings,
    run: RunDirectory,
    plan: Plan,
    nodes: list[dict[str, Any]],
    size: int,
    workers: int,
    address: str,
) -> None:
    """Run the rounds that are left on Ray.

    Args:
        settings: of the run.
        run: its directory.
        plan: how this machine takes a step.
        nodes: what is particular to each client's node config.
        size: bytes of the weights that are shared.
        workers: processes.
        address: of a Ray cluster, or empty.
    """
    done = latest(run.checkpoints)
    run_config: dict[str, Any] = {
        name.replace("_", "-"): value
        for name, value in dataclasses.asdict(settings).items()
        if name not in ("output", "resume")
    } | {"resume": str(run.path)}
    configs: list[dict[str, Any]] = [
        {
            "partition-id": number,
            "num-partitions": settings.clients,
            "simulated": True,
            "state": str(run.path / "clients"),
            **node,
        }
        for number, node in enumerate(nodes)
    ]
    server = {"simulated": True, "manifest": str(nodes[0].get("manifest", ""))}
    try:
        gpus = start_ray(
            workers, address=address, weights_bytes=size, gpu=plan.device.startswith("cuda")
        )
        grid = RayGrid(run_config, configs, workers, gpus)
        context = Context(RUN_ID, SERVER_NODE, server, RecordDict(), dict(run_config))
        if done is None or not done.name.endswith(f"{settings.rounds:05d}"):
            print(
                f"{settings.rounds} rounds of {settings.clients_per_round} clients, "
                f"{settings.local_updates} updates each, on {workers} workers ({plan.precision}, "
                f"{plan.device}); run directory {run.path}",
                flush=True,
            )
        server_app(grid, context)
    finally:
        ray.shutdown()


def _say_what_there_is(
    manifest: Manifest,
    parts: tuple[tuple[int, ...], ...],
    excluded: tuple[str, ...],
    settings: FederationSettings,
) -> None:
    for line in manifest.describe_skips():
        print(line)
    print(
        f"{len(manifest.sequences)} sequences of about {settings.length} from "
        f"{len(manifest.speakers)} speakers, {format_seconds(manifest.seconds)}; "
        f"remainder not used: {format_seconds(manifest.remainder_seconds)}"
    )
    crops = [len(part) for part in parts]
    print(
        f"{len(parts)} clients with {min(crops)} to {max(crops)} crops each; "
        f"{len(excluded)} speakers held out for evaluation"
    )
    few = sum(count < settings.batch for count in crops)
    if few:
        print(
            f"{few} clients have fewer crops than a batch of {settings.batch}: theirs are repeated "
            "in it (each counts once in the average)"
        )


if __name__ == "__main__":
    command.run(main)
