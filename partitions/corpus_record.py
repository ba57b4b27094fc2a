"""The record of a run's corpus, with which a resumed run is compared: audio, labels and split."""

import dataclasses
import hashlib
import heapq
import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from common.atomic import replacing
from common.errors import DataError
from partitions.columns import chunks
from partitions.file_contents import digest_of, sorted_rows
from partitions.manifest import FORMAT_VERSION, Manifest, natural_order
from partitions.sequences import Indices

CORPUS = "corpus.json"
"""The record's file in a run directory."""

_VERSION = 1
_SHOWN = 3


@dataclass(frozen=True, kw_only=True)
class CorpusRecord:
    """What a run learns and is tested on; None is what it does not know and does not compare."""

    files: Mapping[str, str] | None = None
    """Content of each audio file by its path relative to the corpus root (`fingerprints`)."""
    speakers: tuple[str, ...] | None = None
    labels: tuple[str, ...] | None = None
    """Classes or symbols, in the order of the head's outputs."""
    clips: Mapping[str, str] | None = None
    """Of each labelled clip by name: split or client, speaker, and label or digest of its text. Of
    a trial, whether it is of one speaker."""
    held_out: tuple[str, ...] | None = None
    """Speakers kept for evaluation."""
    split: str | None = None
    """Digest of how the corpus is recut and divided."""
    backbone: str | None = None
    """Digest of the backbone that a task begins from."""

    def refusal(self, now: "CorpusRecord", options: str = "--data") -> str:
        """Why a run with this record cannot go on with another, and what to do; empty if it can.

        Args:
            now: record of the corpus as it is.
            options: of the command line that choose a corpus, for the message.
        """
        changed = self.changes(now)
        if changed:
            return (
                f"its corpus is not the one that the run began with: {changed}. Put it back as it "
                f"was, or name one with the same audio by {options}, or begin another run"
            )
        changes = [_changed_names("held-out speakers", self.held_out, now.held_out)]
        if None not in (self.split, now.split) and self.split != now.split:
            changes.append("other sequences or parts")
        if any(changes):
            return (
                "the corpus is the one that the run began with, but this version divides it "
                f"otherwise ({'; '.join(filter(None, changes))}): go on with the version that "
                "began the run"
            )
        if None not in (self.backbone, now.backbone) and self.backbone != now.backbone:
            return (
                "the weights of the checkpoint are not those that the run began from: name their "
                "place by --checkpoint, or begin another run"
            )
        return ""

    def changes(self, now: "CorpusRecord") -> str:
        """What has changed in the corpus, with counts and examples; empty if nothing."""
        found = [
            _changed_names("speakers", self.speakers, now.speakers),
            _changed_names("labels", self.labels, now.labels),
            _changed_entries("files", self.files, now.files),
        ]
        if not any(found):  # else most of them follow
            found = [_changed_entries("clips by label and split", self.clips, now.clips)]
        return "; ".join(filter(None, found))

    def completed(self, now: "CorpusRecord") -> "CorpusRecord":
        """The record, with what it lacks taken from another."""
        own = {name: value for name, value in vars(self).items() if value is not None}
        return dataclasses.replace(now, **own)

    def write(self, folder: Path) -> None:
        """Write the record into a run directory, atomically.

        Raises:
            OSError: the disk is full or the folder cannot be written.
        """
        with replacing(folder / CORPUS) as partial, open(partial, "w", encoding="utf-8") as stream:
            stream.writelines(self._text())

    def _text(self) -> Iterator[str]:
        """The record as JSON, in pieces: it has a line for each file."""
        known = {name: value for name, value in vars(self).items() if value is not None}
        digest = {} if self.files is None else {"digest": digest_of(self.files)}
        yield f'{{"version": {_VERSION}'
        for name, value in (digest | known).items():
            yield f',\n"{name}": '
            if isinstance(value, Mapping):
                yield "{"
                for number, (key, each) in enumerate(sorted_rows(value)):
                    comma = ",\n" if number else ""
                    yield f"{comma}{json.dumps(key)}: {json.dumps(each)}"
                yield "}"
            else:
                yield json.dumps(value, separators=(",\n", ": "))
        yield "}\n"

    @classmethod
    def read(cls, folder: Path) -> "CorpusRecord | None":
        """Read the record of a run directory; None if there is none.

        Raises:
            DataError: the file cannot be read, or is none that `write` wrote.
        """
        path = folder / CORPUS
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            if found["version"] != _VERSION:
                raise DataError(f"{path}: of another version of this software; go on with that")
            return cls(**{name: _checked(name, found.get(name)) for name in _KINDS})
        except FileNotFoundError:
            return None
        except OSError as error:
            raise DataError(f"cannot read {path}: {error.strerror}") from None
        except (ValueError, KeyError, TypeError):
            raise DataError(
                f"{path} is damaged: delete it if the corpus is sure to be the run's, which then "
                "goes on without a comparison"
            ) from None


_KINDS = {
    "files": dict, "clips": dict, "speakers": list, "labels": list, "held_out": list,
    "split": str, "backbone": str,
}  # fmt: skip
NOTHING = CorpusRecord()
"""Of a run that reads no corpus."""


def _checked(name: str, value: Any) -> Any:
    if value is None:
        return None
    inner = value.values() if isinstance(value, dict) else value
    if not isinstance(value, _KINDS[name]) or not all(isinstance(each, str) for each in inner):
        raise ValueError(name)
    return tuple(value) if isinstance(value, list) else value


def record_of(
    manifest: Manifest, held_out: Collection[str], parts: Sequence[Indices] = ()
) -> CorpusRecord:
    """The record of a pretraining corpus.

    Args:
        manifest: from `prepare`, which takes the fingerprints.
        held_out: speakers kept for evaluation.
        parts: of each simulated client, indices into the manifest's sequences, `[sequence]`.
    """
    digest = hashlib.blake2b(digest_size=16)
    heading = (FORMAT_VERSION, manifest.length, len(manifest.sequences), manifest.speaker_samples)
    digest.update(json.dumps(heading).encode())
    for part in parts:
        digest.update(np.asarray(len(part), dtype="<i8").tobytes())
        for each in chunks(len(part)):
            digest.update(part[each].astype("<i8").tobytes())
    return CorpusRecord(
        files=manifest.files or None,
        speakers=manifest.speakers,
        held_out=tuple(held_out),
        split=digest.hexdigest(),
    )


def difference(before: Manifest, now: Manifest) -> str:
    """How the sequences of two manifests differ; empty if they do not."""
    if before.sequences == now.sequences:
        return ""
    changes = [
        _changed_names("speakers", before.speakers, now.speakers),
        _changed_entries("files", _taken(before), _taken(now)),
    ]
    return "; ".join(filter(None, changes)) or "the same files in other sequences"


def _taken(manifest: Manifest) -> dict[str, str]:
    """Samples taken of each file, as text."""
    counts = map(str, manifest.sequences.samples_by_path().tolist())
    return dict(zip(manifest.sequences.paths, counts, strict=True))


def _changed_names(what: str, before: Sequence[str] | None, now: Sequence[str] | None) -> str:
    if before is None or now is None or tuple(before) == tuple(now):
        return ""
    found = _changed_entries(what, dict.fromkeys(before, ""), dict.fromkeys(now, ""))
    return found or f"{what} in another order"


def _changed_entries(
    what: str, before: Mapping[str, str] | None, now: Mapping[str, str] | None
) -> str:
    """What was added, removed and changed, with counts and the first names; empty if nothing."""
    if before is None or now is None or before == now:
        return ""
    kinds = {
        "added": now.keys() - before.keys(),
        "removed": before.keys() - now.keys(),
        "changed": {name for name in before.keys() & now.keys() if before[name] != now[name]},
    }
    shown = [f"{len(names)} {how} ({_some(names)})" for how, names in kinds.items() if names]
    return f"{what}: {', '.join(shown)}" if shown else ""


def _some(names: Collection[str]) -> str:
    """The first names, in order."""
    first = heapq.nsmallest(_SHOWN, names, key=natural_order)
    shown = [name if name.strip() and name.isprintable() else repr(name) for name in first]
    return ", ".join(shown) + (", ..." if len(names) > _SHOWN else "")
