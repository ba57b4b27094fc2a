"""Checks a device's corpus and checkpoint for a task, in a process of its own.

The SuperNode's process stays without torch: `python -m fl_client.check_task TASK DATA SUBSET
CHECKPOINT`, the last two empty where there are none.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from common import command
from ssl_core.downstream.task_settings import TaskSettings
from ssl_core.training import hf_checkpoint as hf


def main(arguments: Sequence[str] | None = None) -> int:
    """Read the lists of clips and the checkpoint's config; returns the exit code.

    Raises:
        ShortwaveError: what a round would be refused for.
    """
    task, data, subset, checkpoint = arguments or sys.argv[1:]
    settings = TaskSettings(
        task=task, data=data, train=subset or "train-clean-100", valid="", test=""
    )
    found = settings.read_data(settings.task_recipe())
    if checkpoint:
        hf.load_config(Path(checkpoint))
    clips = len({clip.name for clip in (*found.train, *found.valid, *found.test)})
    print(f"{task}: {clips} clips in {found.root}")
    return 0


if __name__ == "__main__":
    command.run(main)
