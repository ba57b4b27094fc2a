"""Fine-tuning a task: `python -m ssl_core.finetune --task kws12 --data DIR --checkpoint DIR`.

`--batch` and `--epochs` are short for `--recipe.batch` and `--recipe.epochs`.
"""

from collections.abc import Sequence

from common.process_environment import restart

if __name__ == "__main__":
    restart()

from rich.console import Console

from common import command
from common.errors import Interrupted
from common.options import settings_parser
from common.settings import parse
from common.stop import Stop
from ssl_core.downstream import results
from ssl_core.downstream.clip_loader import check
from ssl_core.downstream.decoding import beam_search, greedy
from ssl_core.downstream.finetune_run import finetune, over_folds
from ssl_core.downstream.finetune_settings import FinetuneSettings
from ssl_core.downstream.task_model import LOGMEL, RANDOM, TaskModel, load_upstream
from ssl_core.downstream.task_record import task_record
from ssl_core.planning.processor import use_threads
from ssl_core.training.run_directory import RunDirectory, open_run

SHORT = {"--frozen": "--backbone=frozen", "--unfrozen": "--backbone=unfrozen"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Fine-tune; returns the exit code."""
    parser = settings_parser(
        FinetuneSettings, prog="python -m ssl_core.finetune", description=__doc__, short=SHORT
    )
    settings, _ = parse(FinetuneSettings, parser, arguments)
    use_threads(settings.threads)
    runs = [(fold, settings.read_data(fold)) for fold in settings.folds()]
    for _, data in runs:
        check(data, settings.recipe)
    for line in runs[0][1].describe_skips():
        print(line)
    upstream = load_upstream(settings.checkpoint, settings.model, settings.seed)
    if upstream.note:
        print(upstream.note)
    labels = runs[0][1].labels
    decode = greedy(labels)
    if settings.beam:
        decode = beam_search(
            labels, settings.beam, str(settings.words or ""), str(settings.ngram or "")
        )
    name = f"{settings.task}-{settings.backbone}"
    first = runs[0][1]  # the clips of other folds are the same
    record = task_record(
        first.root,
        {"train": first.train, "valid": first.valid, "test": first.test},
        labels,
        backbone=upstream.digest("frames"),
        trials=first.trials,
    )
    places = ("data",) if settings.checkpoint in (RANDOM, LOGMEL) else ("data", "checkpoint")
    free = ("output", "resume", "keep", "cache")
    directory = open_run(settings, name, free, record, places)
    directory.lock()
    print(f"run directory {directory.path}", flush=True)
    found = []
    try:
        with Stop() as stop:
            for number, (fold, data) in enumerate(runs):
                if number:
                    upstream = load_upstream(settings.checkpoint, settings.model, settings.seed)
                labels = data.labels
                model = TaskModel.new(upstream, settings.recipe, len(labels), settings.seed)
                place = directory
                if len(runs) > 1:
                    print(f"fold {fold} of {len(runs)}", flush=True)
                    place = RunDirectory(directory.path / f"fold-{fold}")
                    place.path.mkdir(exist_ok=True)
                found.append(finetune(settings, model, data, place, decode, stop))
    except Interrupted as stopped:
        raise Interrupted(f"{stopped}; go on with --resume {directory.path}") from None
    finally:
        directory.close()
    if len(runs) > 1:
        scores = over_folds(found, settings.recipe.metric)
        results.write_result(directory.path, scores)
        results.show_result(Console(), f"{settings.task}, all folds", scores)
    print(directory.path)
    return 0


if __name__ == "__main__":
    command.run(main)
