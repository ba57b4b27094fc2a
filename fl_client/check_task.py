"""Checks a device's corpus and checkpoint for a task, in a process of its own.

The SuperNode's process stays without torch: `python -m fl_client.check_task TASK DATA SUBSET
CHECKPOINT`, the last two empty where there are none.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from common import command
from common.units import Names
from ssl_core.downstream.metrics import require_error_rates
from ssl_core.downstream.task_corpus import TRAIN, read_task
from ssl_core.downstream.task_recipe import recipe_of
from ssl_core.training import hf_checkpoint


def main(arguments: Sequence[str] | None = None) -> int:
    """Read the lists of clips and the checkpoint's config; returns the exit code.

    Raises:
        ShortwaveError: what a round would be refused for.
    """
    task, data, subset, checkpoint = arguments or sys.argv[1:]
    train = Names.parse(subset) or TRAIN
    recipe = recipe_of(task)
    if recipe.transcribes:
        require_error_rates()
    found = read_task(task, Path(data), recipe, seed=0, train=train, valid=(), test=())
    if checkpoint:
        hf_checkpoint.load_config(Path(checkpoint))
    clips = len({clip.name for clip in (*found.train, *found.valid, *found.test)})
    print(f"{task}: {clips} clips in {found.root}")
    return 0


if __name__ == "__main__":
    command.run(main)
