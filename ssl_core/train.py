"""Centralised pretraining: `python -m ssl_core.train --length 5s --data DIR`."""

from collections.abc import Sequence

from common.process_environment import restart

if __name__ == "__main__":
    restart()


from common import command
from common.options import settings_parser
from common.settings import parse
from common.units import format_seconds
from partitions.corpus_record import record_of
from partitions.demo_corpus import demo_corpus
from partitions.prepared import prepare
from ssl_core.planning.processor import use_threads
from ssl_core.training import checkpoint
from ssl_core.training.central import CentralRun, CentralSettings, divide
from ssl_core.training.crops import describe
from ssl_core.training.run_directory import open_run


def main(arguments: Sequence[str] | None = None) -> int:
    """Pretrain; returns the exit code."""
    parser = settings_parser(CentralSettings, prog="python -m ssl_core.train", description=__doc__)
    settings, _ = parse(CentralSettings, parser, arguments)
    plan = settings.step_plan()
    use_threads(plan.threads)
    root = settings.data or demo_corpus()
    print(describe(root, settings.data is None))
    manifest = prepare(root, settings.subset, settings.length, progress=True)
    for line in manifest.describe_skips():
        print(line)
    train, held, excluded = divide(manifest, settings, plan)
    print(
        f"{len(train.indices)} sequences of about {settings.length} to train on, "
        f"{len(excluded)} speakers held out"
    )
    name = f"central-{settings.model}-{settings.length}"
    record = record_of(manifest, excluded)
    places = ("data", "subset")
    run = open_run(settings, name, ("output", "resume", "keep"), record, places)
    run.lock()
    print(
        f"{settings.updates} updates of {plan.crops} crops, "
        f"{format_seconds(plan.crops * plan.length)} of audio each ({plan.precision}, "
        f"{plan.device}); run directory {run.path}",
        flush=True,
    )
    CentralRun(settings, plan, run, train, held).run()
    print(f"checkpoint: {checkpoint.latest(run.checkpoints)}")
    print(run.path)
    return 0


if __name__ == "__main__":
    command.run(main)
