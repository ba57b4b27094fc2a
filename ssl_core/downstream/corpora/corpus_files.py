"""Finding and reading the files of a corpus: folders, audio headers, lists and tables."""

import csv
import io
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from common.errors import DataError
from common.progress import track
from partitions.audio import samples_of
from partitions.skips import Skips, describe_skips
from ssl_core.downstream.clips import Clip, TaskData, Trial

_SHOWN = 5


def headers(root: Path, paths: Iterable[str], progress: bool = False) -> dict[str, int | str]:
    """Read the audio headers of files.

    Args:
        root: corpus root.
        paths: relative to it.
        progress: show a progress bar on stderr if that is a terminal.

    Returns:
        By path, the samples at 16 kHz, or the reason to skip the file (`samples_of`).
    """
    chosen = tuple(dict.fromkeys(paths))
    with ThreadPoolExecutor(max_workers=4) as pool:
        found = pool.map(lambda path: samples_of(root / path), chosen)
        bar = track(chosen, len(chosen), "Reading headers", progress)
        return dict(zip(bar, found, strict=True))


def lengths(
    root: Path, paths: Iterable[str], skips: Skips, progress: bool = False
) -> dict[str, int]:
    """Samples at 16 kHz of every usable file, by path.

    Args:
        root: corpus root.
        paths: relative to it.
        skips: counts the unusable files.
        progress: show a progress bar on stderr if that is a terminal.
    """
    usable = {}
    for path, found in headers(root, paths, progress).items():
        if isinstance(found, str):
            skips.add(found, path)
        else:
            usable[path] = found
    return usable


def names(folder: Path) -> list[str]:
    """Sorted names in a folder, without hidden ones; empty if the folder cannot be read."""
    try:
        return sorted(name for name in os.listdir(folder) if not name.startswith("."))
    except OSError:
        return []


def folders(folder: Path) -> list[str]:
    """Sorted names of the subfolders of a folder, without hidden ones."""
    return [name for name in names(folder) if (folder / name).is_dir()]


def check_folder(root: Path, corpus: str) -> None:
    """Check that the corpus root is a folder with something in it.

    Raises:
        DataError: missing, a file, or empty.
    """
    if not root.exists():
        raise DataError(f"no such folder: {root}; give the folder that holds {corpus}")
    if not root.is_dir():
        raise DataError(f"{root} is not a folder; give the folder that holds {corpus}")
    if not names(root):
        raise DataError(f"nothing in {root}; unpack {corpus} there")


def other_layout(root: Path, corpus: str, layout: str) -> DataError:
    """The error for a folder that does not have the layout of a corpus.

    Args:
        root: the folder.
        corpus: name of the corpus.
        layout: what was expected there.
    """
    there = names(root)
    shown = ", ".join(there[:_SHOWN]) + (", ..." if len(there) > _SHOWN else "")
    return DataError(
        f"{root} is not in the layout of {corpus}: expected {layout} there, found {shown}; "
        f"give the folder that {corpus} was unpacked to"
    )


def lines_of(path: Path, advice: str) -> Iterator[tuple[int, str]]:
    """Yield line number, from 1, and text of the lines of a file that are not blank.

    Raises:
        DataError: missing, unreadable or not UTF-8; the message ends with `advice`.
    """
    for number, line in enumerate(_text(path, advice).split("\n"), start=1):
        if line.strip():
            yield number, line.rstrip("\r")


def rows_of(
    path: Path, columns: tuple[str, ...], advice: str
) -> Iterator[tuple[int, dict[str, str]]]:
    """Yield the number of its last line and the values by column of every row of a CSV file.

    Args:
        path: of a CSV file with a header.
        columns: required columns.
        advice: what to do about a bad file; ends every error message.

    Raises:
        DataError: missing, unreadable or not UTF-8, or a required column is missing from the
            header or from a row.
    """
    reader = csv.DictReader(io.StringIO(_text(path, advice), newline=""))
    try:
        there = tuple(reader.fieldnames or ())
        for column in columns:
            if column not in there:
                raise DataError(
                    f"{path}: no column '{column}' (found {', '.join(there)}); {advice}"
                )
        for row in reader:
            if any(row[column] is None for column in columns):
                raise DataError(
                    f"{path}:{reader.line_num}: fewer columns than the header; {advice}"
                )
            yield reader.line_num, {column: row[column] or "" for column in there}
    except csv.Error as error:
        raise DataError(f"{path}:{reader.line_num}: not CSV ({error}); {advice}") from None


def _text(path: Path, advice: str) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise DataError(f"no {path.name} in {path.parent}; {advice}") from None
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}; {advice}") from None
    except UnicodeDecodeError:
        raise DataError(f"{path}: not UTF-8 text; {advice}") from None


def task_data(
    root: Path,
    train: Iterable[Clip],
    valid: Iterable[Clip],
    test: Iterable[Clip],
    labels: tuple[str, ...],
    skips: Skips,
    trials: tuple[Trial, ...] = (),
) -> TaskData:
    """Make a `TaskData` and check that every split has a clip.

    Args:
        root: corpus root.
        train: clips to train on.
        valid: clips to validate on.
        test: clips to test on.
        labels: as `TaskData.labels`.
        skips: files that were skipped.
        trials: of verification.

    Raises:
        DataError: a split without clips; the message lists what was skipped.
    """
    data = TaskData(
        root, tuple(train), tuple(valid), tuple(test), labels, trials, skips.counts, skips.examples
    )
    for split, clips in (("train", data.train), ("valid", data.valid), ("test", data.test)):
        if not clips:
            skipped = "; ".join(["", *describe_skips(skips.counts, skips.examples)])
            raise DataError(f"no clip to {_PURPOSE[split]} in {root}{skipped}; unpack it again")
    return data


_PURPOSE = {"train": "train on", "valid": "validate on", "test": "test on"}
