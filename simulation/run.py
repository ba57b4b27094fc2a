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

from fl_client.local_data import held_out  # noqa: E402
from fl_client.settings import FederationSettings  # noqa: E402
from fl_server.server_app import app as server_app  # noqa: E402
from fl_server.server_app import open_run, stored_settings  # noqa: E402
from partitions import command  # noqa: E402
from partitions.demo_corpus import demo_corpus  # noqa: E402
from partitions.errors import UsageError  # noqa: E402
from partitions.manifest import Manifest, prepare, write_manifest  # noqa: E402
from partitions.settings import (  # noqa: E402
    add_options,
    from_mapping,
    from_texts,
    read_yaml,
)
from partitions.speakers import partition  # noqa: E402
from partitions.units import format_seconds  # noqa: E402
from simulation.fleet import make_fleet  # noqa: E402
from simulation.ray_grid import RUN_ID, SERVER_NODE, RayGrid, start_ray  # noqa: E402
from simulation.report import write_report  # noqa: E402
from ssl_core.checkpoint import latest  # noqa: E402
from ssl_core.crops import describe  # noqa: E402
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
    root = Path(settings.data) if settings.data else demo_corpus()
    print(describe(root, not settings.data))
    manifest = prepare(root, settings.subsets, settings.seconds, progress=True)
    excluded = held_out(manifest, settings)
    parts = partition(manifest, settings.clients, settings.partition, settings.seed, excluded)
    _say_what_there_is(manifest, parts, excluded, settings)
    if settings.clients_per_round > settings.clients:
        raise UsageError(
            f"--clients-per-round {settings.clients_per_round} is more than the "
            f"{settings.clients} clients"
        )
    if settings.time_limit and not settings.fleet:
        raise UsageError("--time-limit is for the devices of a --fleet")
    fleet = make_fleet(settings) if settings.fleet else None
    run = open_run(settings)
    done = latest(run.checkpoints)
    file = run.path / "manifest.tsv"
    write_manifest(file, manifest)
    run_config: dict[str, Any] = {
        name.replace("_", "-"): value
        for name, value in dataclasses.asdict(settings).items()
        if name not in ("output", "resume")
    } | {"resume": str(run.path)}
    nodes: list[dict[str, Any]] = [
        {
            "partition-id": number,
            "num-partitions": settings.clients,
            "manifest": str(file),
            "simulated": True,
            "state": str(run.path / "clients"),
            **(fleet.node(number) if fleet else {}),
        }
        for number in range(settings.clients)
    ]
    plan = settings.resolved_plan()
    config, _ = settings.model_and_recipe()
    size = sum(p.numel() * 4 for p in PretrainingModel(config).parameters())
    try:
        gpus = start_ray(
            workers, address=address, weights_bytes=size, gpu=plan.device.startswith("cuda")
        )
        grid = RayGrid(run_config, nodes, workers, gpus)
        context = Context(
            RUN_ID, SERVER_NODE, {"manifest": str(file)}, RecordDict(), dict(run_config)
        )
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
    report = write_report(run, settings, manifest, parts, excluded, fleet)
    print(f"report: {report}")
    print(f"checkpoint: {latest(run.checkpoints)}")
    print(run.path)
    return 0


def _say_what_there_is(
    manifest: Manifest,
    parts: tuple[tuple[int, ...], ...],
    excluded: tuple[str, ...],
    settings: FederationSettings,
) -> None:
    for line in manifest.describe_skips():
        print(f"left out: {line}")
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
