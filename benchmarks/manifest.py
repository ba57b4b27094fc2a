"""What a corpus of LibriSpeech's size takes before a sample is decoded: time and memory.

The corpus is synthetic: silent FLAC files of 2 to 21 s, each a name (a hard link) for one of a few
files, or with `--copies` a file of its own. All lie in the page cache, so that no disk is waited
for. Files count as settled at once, so that a second start finds what the first one remembered.
Each start is a process of its own. Memory is what it holds above its imports, without the pages of
files, which processes share, and without freed memory that malloc keeps, which a training step
returns (`ssl_core.planning.allocator`). A crop's microseconds are the best of five means, as other
programs may run; processor seconds are those of all threads.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import soundfile

FILES, SPEAKERS, CHAPTERS = 281_241, 2_338, 5_466
"""Of train-clean-100, train-clean-360 and train-other-500 (Panayotov et al., 2015; README.TXT)."""
LINKED = 64
"""Files with names of their own; ext4 takes 65,000 names a file."""
PROJECT = Path(__file__).resolve().parent.parent

START = """
import ctypes, json, sys, time
from pathlib import Path
import partitions.fingerprints as fingerprints
from partitions.prepared import prepare
from partitions.speakers import held_out_speakers, select
from ssl_core.training.crops import Crops
root, length, positions = Path(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3])
fingerprints.SETTLED = -1.0

def held(kind):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(kind)) / 1024

before = held("RssAnon"), held("RssFile")
began, worked = time.perf_counter(), time.process_time()
manifest = prepare(root, (), length)
scanned, worked = time.perf_counter() - began, time.process_time() - worked
peak = held("VmHWM")
began = time.perf_counter()
excluded = held_out_speakers(manifest, 0.05, 0)
crops = Crops(manifest, select(manifest, set(manifest.speakers) - set(excluded)), 16_000, 0)
divided = time.perf_counter() - began
crops._entry(0)
ctypes.CDLL(None).malloc_trim(0)
anonymous, shared = held("RssAnon"), held("RssFile")
best = float("inf")
for part in range(5):
    began = time.perf_counter()
    for position in range(part * positions, (part + 1) * positions):
        crops._entry(1 + 97 * position)
    best = min(best, (time.perf_counter() - began) / positions)
print(json.dumps({
    "scan_seconds": round(scanned, 2),
    "scan_processor_seconds": round(worked, 2),
    "divide_seconds": round(divided, 2),
    "manifest_mib": round(anonymous - before[0], 1),
    "shared_mib": round(shared - before[1], 1),
    "peak_mib": round(peak - sum(before), 1),
    "crop_microseconds": round(best * 1e6, 1),
    "sequences": len(manifest.sequences),
    "hours": round(manifest.seconds / 3600, 1),
}))
"""


def main() -> None:
    """Measure starts at some lengths, by this code and by that of another revision."""
    parser = argparse.ArgumentParser(description=str(__doc__))
    parser.add_argument("--files", type=int, default=FILES, help="files (default: 281,241)")
    parser.add_argument("--lengths", type=float, nargs="+", default=[1.0, 5.0], help="in seconds")
    parser.add_argument("--copies", action="store_true", help="a file of its own for each name")
    parser.add_argument("--before", default="", help="a git revision to compare with")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="shortwave-manifest-") as name:
        folder = Path(name)
        make_corpus(folder / "corpus", options.files, options.copies)
        trees = {"now": PROJECT}
        if options.before:
            trees = {"before": _old_tree(folder / "tree", options.before)} | trees
        result: dict[str, Any] = {"files": options.files, "copies": options.copies}
        for when, tree in trees.items():
            for length in options.lengths:
                for start in ("first", "again"):
                    found = _start(tree, folder, when, length)
                    result[f"{when} {length:g}s {start}"] = found
                    print(when, f"{length:g}s", start, json.dumps(found), flush=True)
    print(json.dumps(result))


def make_corpus(root: Path, files: int, copies: bool) -> None:
    """Make the synthetic corpus.

    Args:
        root: folder to make.
        files: how many audio files.
        copies: a file of its own for each name, in place of hard links.
    """
    root.mkdir(parents=True)
    lengths = np.random.default_rng(0).uniform(2.0, 21.2, LINKED)
    made = []
    for number, seconds in enumerate(lengths):
        made.append(root / f"{number}.flac")
        soundfile.write(made[-1], np.zeros(int(seconds * 16_000), np.int16), 16_000)
    for number, path in enumerate(_paths(root, files)):
        source = made[number % LINKED]
        if copies:
            shutil.copyfile(source, path)
        else:
            os.link(source, path)
    for path in made:
        path.unlink()


def _paths(root: Path, files: int) -> Iterator[Path]:
    """The names of the files, in folders that are made."""
    chapters = max(1, files * CHAPTERS // FILES)
    speakers = max(1, files * SPEAKERS // FILES)
    for chapter in range(chapters):
        speaker = 1 + chapter % speakers
        folder = root / "train-other-500" / str(speaker) / str(100_000 + chapter)
        folder.mkdir(parents=True)
        for number in range(chapter * files // chapters, (chapter + 1) * files // chapters):
            name = f"{speaker}-{100_000 + chapter}-{number - chapter * files // chapters:04}.flac"
            yield folder / name


def _old_tree(folder: Path, revision: str) -> Path:
    """The code of a revision."""
    folder.mkdir()
    command = ["git", "-C", str(PROJECT), "archive", revision]
    archive = subprocess.run(command, check=True, capture_output=True).stdout
    subprocess.run(["tar", "-x", "-C", str(folder)], check=True, input=archive)
    return folder


def _start(tree: Path, folder: Path, when: str, length: float) -> dict[str, Any]:
    """Start a process with the code of a tree; what it measured."""
    positions = "2" if when == "before" else "2000"
    arguments = [sys.executable, "-c", START, str(folder / "corpus"), str(length), positions]
    environment = os.environ | {"XDG_CACHE_HOME": str(folder / when), "PYTHONPATH": str(tree)}
    done = subprocess.run(arguments, cwd=tree, env=environment, stdout=subprocess.PIPE, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


if __name__ == "__main__":
    main()
