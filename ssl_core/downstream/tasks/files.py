"""What every reader of a corpus does with its files: finds them, counts what it leaves out."""

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
    """Samples at 16 kHz of every file, or why it cannot be used (`samples_of`), by path."""
    chosen = tuple(dict.fromkeys(paths))
    with ThreadPoolExecutor(max_workers=4) as pool:
        found = pool.map(lambda path: samples_of(root / path), chosen)
        bar = track(chosen, len(chosen), "Reading headers", progress)
        return dict(zip(bar, found, strict=True))


def lengths(
    root: Path, paths: Iterable[str], skips: Skips, progress: bool = False
) -> dict[str, int]:
    """Samples at 16 kHz of every usable file by path; the others are counted in `skips`."""
    usable = {}
    for path, found in headers(root, paths, progress).items():
        if isinstance(found, str):
            skips.add(found, path)
        else:
            usable[path] = found
    return usable


def names(folder: Path) -> list[str]:
    """What a folder holds, sorted, without hidden names; nothing where it cannot be read."""
    try:
        return sorted(name for name in os.listdir(folder) if not name.startswith("."))
    except OSError:
        return []


def folders(folder: Path) -> list[str]:
    """Names of the folders in a folder, sorted, without hidden ones."""
    return [name for name in names(folder) if (folder / name).is_dir()]


def check_folder(root: Path, corpus: str) -> None:
    """Make sure that a corpus may lie there.

    Raises:
        DataError: no such folder, a file, or an empty folder.
    """
    if not root.exists():
        raise DataError(f"no such folder: {root}; give the folder that holds {corpus}")
    if not root.is_dir():
        raise DataError(f"{root} is not a folder; give the folder that holds {corpus}")
    if not names(root):
        raise DataError(f"nothing in {root}; unpack {corpus} there")


def other_layout(root: Path, corpus: str, layout: str) -> DataError:
    """The error for a folder that holds something else than a corpus in its layout."""
    there = names(root)
    shown = ", ".join(there[:_SHOWN]) + (", ..." if len(there) > _SHOWN else "")
    return DataError(
        f"{root} is not in the layout of {corpus}: expected {layout} there, found {shown}; "
        f"give the folder that {corpus} was unpacked to"
    )


def lines_of(path: Path, advice: str) -> Iterator[tuple[int, str]]:
    """Number, from 1, and text of every line of a file that is not blank.

    Raises:
        DataError: missing, unreadable or not UTF-8; `advice` says what to do about it.
    """
    for number, line in enumerate(_text(path, advice).split("\n"), start=1):
        if line.strip():
            yield number, line.rstrip("\r")


def rows_of(
    path: Path, columns: tuple[str, ...], advice: str
) -> Iterator[tuple[int, dict[str, str]]]:
    """Number of the last line and contents by column of every row of a CSV file with a header.

    Raises:
        DataError: missing, unreadable or not UTF-8, one of `columns` is not in it, or a row that
            ends before them; `advice` says what to do about it.
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
                    f"{path}:{reader.line_num}: fewer columns than the first line has; {advice}"
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
    """Clips as a task sees them, every split with at least one.

    Raises:
        DataError: a split without clips; the message names the skipped files.
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
