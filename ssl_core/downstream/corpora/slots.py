"""Slot filling on Timers and Such v1.0: transcripts with tags around the values of slots.

A tag is a single symbol, since CTC predicts symbols. Each slot has its own opening tag, from U+E000
in the sorted order of slot names; all slots have the closing tag U+E0FF. These are in Unicode's
private use area, so no transcript contains them. The recipe's `cer` scores tagged transcripts
(`downstream/metrics.py`).
"""

import ast
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from common.errors import DataError
from partitions.manifest import Piece, path_problem
from partitions.skips import Skips
from ssl_core.downstream.clips import Clip, TaskData
from ssl_core.downstream.corpora.corpus_files import (
    check_folder,
    lengths,
    other_layout,
    rows_of,
    task_data,
)
from ssl_core.downstream.corpora.spoken_numbers import forms

CORPUS = "Timers and Such v1.0"
LAYOUT = "{train,dev,test}-{real,synth}.csv with path, speakerId, transcription and semantics"
FIRST_TAG = "\ue000"
"""Opening tag of the first slot in sorted order; the others follow."""

CLOSE = "\ue0ff"
"""Closing tag of every slot."""

Value = str | int | float

_TAG = re.compile(f"[{FIRST_TAG}-{CLOSE}]")
_NUMBER = re.compile(r"-?[0-9]{1,15}(\.[0-9]{1,15})?")


@dataclass(frozen=True)
class _Row:
    path: str
    speaker: str
    transcript: str | None
    """None if the corpus has no transcripts."""
    slots: Mapping[str, Value]


def read(root: Path, progress: bool = False) -> TaskData:
    """List the clips of Timers and Such with their tagged transcripts.

    Train is `train-real` and `train-synth`, valid is `dev-real` (`dev-synth` if that is missing),
    test is `test-real`. If the tables have no column transcription, as in the coffee orders, a
    text is only the tagged values in the sorted order of their slots, and `train-synth` is not
    needed. The intent is not a slot and is not transcribed.

    Args:
        root: the folder of the tables; their paths are relative to it.
        progress: show a progress bar on stderr if that is a terminal.

    `labels` are the sorted symbols of the training texts; validation and test texts may have
    others. `skips` counts clips that are missing, unreadable or empty, or have an empty text.

    Raises:
        DataError: wrong layout, a missing table, or an invalid row.
    """
    tables = _tables(root)
    skips = Skips({}, {})
    tags = _tags(_names(tables))
    rows = {row.path: row for table in tables.values() for row in table}
    usable = lengths(root, rows, skips, progress)
    splits: dict[str, list[Clip]] = {"train": [], "valid": [], "test": []}
    for split, table in tables.items():
        for row in table:
            if row.path not in usable:
                continue
            text = _tagged(row, tags)
            if text and (row.transcript is None or row.transcript.strip()):
                piece = Piece(row.path, 0, usable[row.path])
                splits[split].append(Clip(piece, row.speaker, text=text))
            else:
                skips.add("empty transcript", row.path)
    labels = tuple(sorted({symbol for clip in splits["train"] for symbol in clip.text}))
    return task_data(root, splits["train"], splits["valid"], splits["test"], labels, skips)


def slot_names(root: Path) -> tuple[str, ...]:
    """Slot names of a corpus in sorted order, which is that of their opening tags.

    Raises:
        DataError: as `read`.
    """
    return _names(_tables(root))


def readable(text: str, slots: Sequence[str] = ()) -> str:
    """A tagged text with readable tags: `<number1>five</> plus ...`.

    Without slot names (`slot_names`), slots are numbered: `<0>five</> plus ...`.
    """
    shown = []
    for symbol in text:
        number = ord(symbol) - ord(FIRST_TAG)
        if symbol == CLOSE:
            shown.append("</>")
        elif 0 <= number < _most_slots():
            shown.append(f"<{slots[number] if number < len(slots) else number}>")
        else:
            shown.append(symbol)
    return "".join(shown)


def tag(transcript: str, slots: Mapping[str, Value], tags: Mapping[str, str]) -> str:
    """Tag the value of every slot in a transcript; append values that are not found in it.

    A value is found if its words, or any form of a number (`spoken_numbers.forms`), occur as
    whole words, in any case, joined by hyphens or spaces. Longer forms are matched first, and
    matches do not overlap. Numbers are appended in words.

    Args:
        transcript: without tags.
        slots: values by slot name.
        tags: opening tags by slot name.
    """
    text = " ".join(transcript.split())
    ways = {slot: _ways(value) for slot, value in slots.items()}
    wanted = [(slot, way) for slot, each in ways.items() for way in each]
    found: dict[str, tuple[int, int]] = {}
    for slot, way in sorted(wanted, key=lambda pair: -len(pair[1])):
        if slot in found:
            continue
        for first, last in _places(way, text):
            if all(last <= start or end <= first for start, end in found.values()):
                found[slot] = (first, last)
                break
    pieces, position = [], 0
    for slot, (first, last) in sorted(found.items(), key=lambda item: item[1]):
        pieces += [text[position:first], tags[slot], text[first:last], CLOSE]
        position = last
    pieces.append(text[position:])
    for slot in slots:
        if slot not in found:
            way = ways[slot][0].upper() if text.isupper() else ways[slot][0]
            pieces.append(f" {tags[slot]}{way}{CLOSE}")
    return "".join(pieces).strip()


def _tables(root: Path) -> dict[str, list[_Row]]:
    """Rows by split."""
    check_folder(root, CORPUS)
    train = root / "train-real.csv"
    if not train.is_file():
        raise other_layout(root, CORPUS, LAYOUT)
    development = root / "dev-real.csv"
    if not development.is_file() and (root / "dev-synth.csv").is_file():
        development = root / "dev-synth.csv"
    tables = {"train": _rows(train), "valid": _rows(development)}
    if tables["train"] and tables["train"][0].transcript is not None:
        tables["train"] += _rows(root / "train-synth.csv")
    tables["test"] = _rows(root / "test-real.csv")
    split_of: dict[str, str] = {}
    for split, rows in tables.items():
        for row in rows:
            if split_of.setdefault(row.path, split) != split:
                raise DataError(
                    f"{row.path} is in the tables of two splits in {root}; unpack {CORPUS} again"
                )
    return tables


def _rows(table: Path) -> list[_Row]:
    rows = []
    for number, row in rows_of(table, ("path", "semantics"), f"unpack {CORPUS} again"):
        where = f"{table}:{number}"
        problem = path_problem(row["path"])
        transcript = row.get("transcription")
        if problem is None and _TAG.search(f"{transcript} {row['semantics']}"):
            problem = "a symbol between U+E000 and U+E0FF, which are reserved for tags"
        if problem:
            raise DataError(f"{where}: {problem}; correct that row")
        slots = _slots(row["semantics"], where)
        rows.append(_Row(row["path"], row.get("speakerId", ""), transcript, slots))
    return rows


def _slots(semantics: str, where: str) -> dict[str, Value]:
    """Values by slot name, from a JSON or Python literal; some releases have `|` for commas."""
    found: object = None
    for text in (semantics, semantics.replace("|", ",")):
        for parse in (json.loads, ast.literal_eval):
            try:
                found = parse(text.strip())
                break
            except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
                continue
        if found is not None:
            break
    slots = found.get("slots") if isinstance(found, dict) else None
    if not isinstance(slots, dict):
        raise DataError(
            f"{where}: semantics is not a dictionary with 'slots' ({semantics[:60]!r}); "
            f"correct that row"
        )
    values: dict[str, Value] = {}
    for name, value in slots.items():
        if value is None or (isinstance(value, str) and not value.strip()):
            continue
        finite = isinstance(value, int | float) and math.isfinite(value)
        if not isinstance(name, str) or not name or not (finite or isinstance(value, str)):
            raise DataError(
                f"{where}: slot {name!r} is {value!r}, neither text nor a finite number; "
                f"correct that row"
            )
        values[name] = value
    return values


def _names(tables: Mapping[str, Iterable[_Row]]) -> tuple[str, ...]:
    return tuple(sorted({slot for rows in tables.values() for row in rows for slot in row.slots}))


def _tags(slots: Sequence[str]) -> dict[str, str]:
    """Opening tags by slot name; `slots` is sorted."""
    if len(slots) > _most_slots():
        raise DataError(f"{len(slots)} slots, but there are only {_most_slots()} tags")
    return {slot: chr(ord(FIRST_TAG) + number) for number, slot in enumerate(slots)}


def _most_slots() -> int:
    return ord(CLOSE) - ord(FIRST_TAG)


def _tagged(row: _Row, tags: Mapping[str, str]) -> str:
    if row.transcript is not None:
        return tag(row.transcript, row.slots, tags)
    return tag("", {slot: row.slots[slot] for slot in sorted(row.slots)}, tags)


def _ways(value: Value) -> tuple[str, ...]:
    """Forms of a value in a transcript, the usual one first."""
    if isinstance(value, bool):
        return (str(value),)
    if isinstance(value, str):
        words = " ".join(value.split())
        if not _NUMBER.fullmatch(words):
            return (words,)
        value = float(words) if "." in words else int(words)
    return forms(value)


def _places(way: str, text: str) -> Iterator[tuple[int, int]]:
    """Yield the spans where a form occurs as whole words: no letter or digit is cut off."""
    lower = text.lower()
    if len(lower) != len(text):
        # Some letters become two in lower case, which would shift the positions.
        lower = text
    for said in dict.fromkeys((lower, lower.replace("-", " "))):
        first = said.find(way.lower())
        while first >= 0:
            last = first + len(way)
            if _starts(said, first) and _ends(said, last):
                yield first, last
            first = said.find(way.lower(), first + 1)


def _starts(text: str, first: int) -> bool:
    before = text[first - 1 : first]
    return not (before.isalpha() if text[first].isalpha() else before and before in "0123456789.,")


def _ends(text: str, last: int) -> bool:
    after = text[last : last + 2]
    if text[last - 1].isdigit():
        return not (after[:1].isdigit() or (after[:1] in ".," and after[1:].isdigit()))
    return not after[:1].isalpha()
