"""Simulate a federation on Ray: `python simulation/run.py --clients 100 --length 5s`.

With `--task NAME` the clients fine-tune that task; `--task NAME --help` lists its settings.
"""

import argparse
import dataclasses
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import simulation.supervisor  # noqa: F401, ends this process with its parent
from fl_client.environment import be_quiet

be_quiet()

try:
    found = importlib.util.find_spec("ray")  # it is imported later, see `prepare_own_ray`
except ImportError:
    found = None
if found is None:
    needed = "simulations need Ray: pip install ray, or install the extra `simulation`"
    print(f"error: {needed}", file=sys.stderr)
    sys.exit(2)
from jsonargparse.typing import PositiveInt  # noqa: E402

from common import command  # noqa: E402
from common.errors import UsageError  # noqa: E402
from common.options import settings_parser  # noqa: E402
from common.settings import parse, read_yaml  # noqa: E402
from common.units import format_bytes, format_seconds  # noqa: E402
from fl_client.federation_settings import (  # noqa: E402
    PretrainingFederation,
    RunSettings,
    TaskFederation,
    federation_kind,
)
from fl_client.local_data import held_out  # noqa: E402
from fl_client.task_data import divide_pool, load_pool  # noqa: E402
from fl_client.task_training import Resident  # noqa: E402
from fl_server.server_app import open_federation  # noqa: E402
from partitions.corpus_record import CORPUS, CorpusRecord, difference, record_of  # noqa: E402
from partitions.demo_corpus import demo_corpus  # noqa: E402
from partitions.manifest import Manifest  # noqa: E402
from partitions.manifest_text import read_manifest, write_manifest  # noqa: E402
from partitions.prepared import prepare  # noqa: E402
from partitions.sequences import Indices  # noqa: E402
from partitions.speakers import partition  # noqa: E402
from simulation.fleet import make_fleet  # noqa: E402
from simulation.ray_run import Processes, run_on_ray  # noqa: E402
from simulation.report import write_report  # noqa: E402
from ssl_core.downstream.task_record import task_record  # noqa: E402
from ssl_core.training.checkpoint import latest  # noqa: E402
from ssl_core.training.crops import describe  # noqa: E402
from ssl_core.training.pretraining_work import PretrainingWork  # noqa: E402
from ssl_core.training.stored_settings import CONFIG  # noqa: E402

MANIFEST = "manifest.tsv"
"""The recut corpus in a run directory."""
_PLACES = ("data", "subset")
"""Settings that may change when a run is resumed, if the corpus is the same."""


def parse_settings(arguments: Sequence[str] | None) -> tuple[RunSettings, Processes]:
    """Read the command line.

    Options on the command line override those of `--config`, which override the defaults; with
    `--resume` the defaults are the settings of that run.

    Returns:
        The settings of the run, and the processes that do not change its result.

    Raises:
        UsageError: values that do not fit together.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    kind: Any = federation_kind(_task(words))
    parser = settings_parser(kind, prog="python simulation/run.py", description=__doc__)
    parser.add_argument(
        "--workers",
        type=PositiveInt | None,
        default=None,
        help="processes that train clients, with --threads threads each; does not change the "
        "result; by default one per CPU core that may be used, at most --clients-per-round",
    )
    parser.add_argument(
        "--address",
        type=str,
        default="",
        help="address of a Ray cluster to join; by default Ray starts here",
    )
    settings, others = parse(kind, parser, words)
    settings = dataclasses.replace(settings, threads=settings.threads or 1)
    return settings, Processes(others.get("workers"), others.get("address", ""), words)


def _task(words: Sequence[str]) -> str:
    """The task that the command line, its YAML file or the run to resume names; may be empty."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in ("--task", "--config", "--resume"):
        first.add_argument(name, default="")
    given, _ = first.parse_known_args(words)
    files = [given.config, given.resume and Path(given.resume) / CONFIG]
    found = [Path(file) for file in files if file and Path(file).is_file()]
    return given.task or next((str(read_yaml(f).get("task") or "") for f in found), "")


def main(arguments: Sequence[str] | None = None) -> int:
    """Simulate a federation; returns the exit code."""
    settings, processes = parse_settings(arguments)
    if settings.clients_per_round > settings.clients:
        raise UsageError(
            f"--clients-per-round {settings.clients_per_round} is more than the "
            f"{settings.clients} clients"
        )
    if isinstance(settings, TaskFederation):
        return _simulate_task(settings, processes)
    if settings.time_limit and not settings.fleet:
        raise UsageError("--time-limit needs a --fleet: it limits an update on its devices")
    return _simulate_pretraining(settings, processes)


def _simulate_pretraining(settings: PretrainingFederation, processes: Processes) -> int:
    root = settings.data or demo_corpus()
    print(describe(root, settings.data is None))
    manifest = prepare(root, settings.subset, settings.length, progress=True)
    excluded = held_out(manifest, settings)
    parts = partition(manifest, settings.clients, settings.partition, settings.seed, excluded)
    _print_data(manifest, parts, excluded, settings)
    fleet = make_fleet(settings) if settings.fleet else None
    record = record_of(manifest, excluded, parts)
    _adopt(settings.resume, manifest, record)
    run = open_federation(settings, record, _PLACES)
    file = run.path / MANIFEST
    if not file.exists():  # a resumed run keeps its own
        write_manifest(file, manifest)
    nodes = [
        {"manifest": str(file), **(fleet.node(number) if fleet else {})}
        for number in range(settings.clients)
    ]
    work = PretrainingWork(architecture=settings.architecture, recipe=settings.recipe)
    run_on_ray(settings, run, nodes, 4 * work.trained_parameters(), processes)
    report = write_report(run, settings, manifest, parts, excluded, fleet)
    print(f"report: {report}")
    print(f"checkpoint: {latest(run.checkpoints)}")
    print(run.path)
    return 0


def _adopt(resumed: Path | None, manifest: Manifest, record: CorpusRecord) -> None:
    """Write the record of a run that began without one, if its corpus is that of its manifest.

    Raises:
        UsageError: the corpus has changed.
    """
    if resumed is None or (resumed / CORPUS).exists() or not (resumed / MANIFEST).exists():
        return
    changes = difference(read_manifest(resumed / MANIFEST, manifest.root), manifest)
    if changes:
        raise UsageError(
            f"--resume {resumed}: its corpus is not the one of its {MANIFEST}: {changes}. Put it "
            "back as it was, or name its place by --data, or begin another run"
        )
    record.write(resumed)


def _simulate_task(settings: TaskFederation, processes: Processes) -> int:
    recipe = settings.recipe
    pool = load_pool(settings.task, settings.corpus(), recipe, settings.seed, settings.subsets)
    parts = divide_pool(
        pool, settings.clients, settings.partition, settings.seed, recipe.transcribes
    )
    for line in pool.skips:
        print(line)
    counts = sorted(len(part) for part in parts)
    print(
        f"{settings.task}: {len(pool.clips)} clips, {len(pool.labels)} "
        f"{'symbols' if recipe.transcribes else 'classes'}; {len(parts)} clients with "
        f"{counts[0]} to {counts[-1]} clips each; they test on a fraction of "
        f"{settings.own_test:g} of them"
    )
    size, backbone = _print_shared(settings, len(pool.labels))
    clips = {f"client {number}": part for number, part in enumerate(parts)}
    record = task_record(pool.root, clips, pool.labels, backbone=backbone)
    run = open_federation(settings, record, _PLACES)
    nodes: list[dict[str, Any]] = [{} for _ in parts]
    run_on_ray(settings, run, nodes, size, processes)
    print(f"checkpoint: {latest(run.checkpoints)}")
    print(run.path)
    return 0


def _print_shared(settings: TaskFederation, labels: int) -> tuple[int, str]:
    """Print what is shared; its bytes and the backbone's digest. The model is freed on return."""
    own = Resident(settings, labels)
    size = sum(value.numel() * 4 for value in own.state_dict().values())
    print(
        f"{settings.method}: {len(own.parts.shared)} tensors are shared, {format_bytes(size)}; "
        f"{len(own.parts.personal)} are personal"
    )
    return size, own.backbone


def _print_data(
    manifest: Manifest,
    parts: tuple[Indices, ...],
    excluded: tuple[str, ...],
    settings: PretrainingFederation,
) -> None:
    for line in manifest.describe_skips():
        print(line)
    print(
        f"{len(manifest.sequences)} sequences of about {settings.length} from "
        f"{len(manifest.speakers)} speakers, {format_seconds(manifest.seconds)}; "
        f"unused remainder: {format_seconds(manifest.remainder_seconds)}"
    )
    crops = [len(part) for part in parts]
    print(
        f"{len(parts)} clients with {min(crops)} to {max(crops)} crops each; "
        f"{len(excluded)} speakers held out for evaluation"
    )
    few = sum(count < settings.batch for count in crops)
    if few:
        print(
            f"{few} clients have fewer crops than a batch of {settings.batch} and repeat them "
            "(each counts once in the average)"
        )


if __name__ == "__main__":
    command.run(main)
