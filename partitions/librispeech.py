"""Finds the utterances of LibriSpeech subsets on disk, with lengths and transcripts."""

import contextlib
import os
import re
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from common.command import nearest
from common.errors import DataError, UsageError
from common.progress import track
from partitions.audio import samples_of
from partitions.columns import Integers, Names, compact
from partitions.manifest import FORBIDDEN, natural_order, path_problem
from partitions.sampling import SAMPLE_RATE
from partitions.skips import Skips, describe_skips

LAYOUT = "subset/speaker/chapter/speaker-chapter-number.flac"
"""Path of an utterance in LibriSpeech (its README.TXT); `.wav` is accepted as well."""

_SUFFIXES = (".flac", ".wav")
_SUBSET_NAME = re.compile(r"(train|dev|test)-.+")


@dataclass(frozen=True)
class Utterance:
    """One audio file of one speaker."""

    path: str
    """Posix path relative to the corpus root."""
    subset: str
    speaker: str
    chapter: str
    samples: int
    """Length in samples at 16 kHz, whatever the file's own rate."""
    transcript: str | None
    """The words in upper case, or None if the chapter has no transcript of the utterance."""

    @property
    def seconds(self) -> float:
        """Length in seconds."""
        return self.samples / SAMPLE_RATE


@dataclass(frozen=True)
class Recordings:
    """The usable files of some subsets in columns, without transcripts."""

    root: Path
    paths: Names
    """Relative to the corpus root."""
    speakers: tuple[str, ...]
    speaker: Integers
    """Of each file, index into `speakers`, `[file]`."""
    samples: Integers
    """Length of each file at 16 kHz, `[file]`."""
    skips: Mapping[str, int]
    skipped_examples: Mapping[str, tuple[str, ...]]


@dataclass(frozen=True)
class Corpus:
    """The utterances of some subsets, ordered by subset, speaker, chapter and number."""

    root: Path
    """The folder with the subsets."""
    utterances: tuple[Utterance, ...]
    subsets: tuple[str, ...] = ()
    skips: dict[str, int] = field(default_factory=dict)
    """Number of skipped files by reason."""
    skipped_examples: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """The first few skipped paths by reason."""

    @property
    def speakers(self) -> tuple[str, ...]:
        """Speakers with at least one utterance, sorted."""
        return tuple(sorted({each.speaker for each in self.utterances}, key=natural_order))

    @property
    def seconds(self) -> float:
        """Seconds of audio in all utterances."""
        return sum(utterance.samples for utterance in self.utterances) / SAMPLE_RATE

    @property
    def without_transcript(self) -> int:
        """Number of utterances without a transcript."""
        return sum(utterance.transcript is None for utterance in self.utterances)

    def describe_skips(self) -> list[str]:
        """One line for each reason, with the count and the first few skipped paths."""
        return describe_skips(self.skips, self.skipped_examples)

    def recordings(self) -> Recordings:
        """The utterances in columns."""
        speakers: dict[str, int] = {}
        found = [speakers.setdefault(each.speaker, len(speakers)) for each in self.utterances]
        return Recordings(
            self.root,
            Names.of(each.path for each in self.utterances),
            tuple(speakers),
            compact(found),
            compact([each.samples for each in self.utterances]),
            self.skips,
            self.skipped_examples,
        )


@dataclass(frozen=True)
class Listing:
    """The audio files of some subsets, not opened."""

    root: Path
    subsets: tuple[str, ...]
    files: Names
    """Posix paths relative to the corpus root, in order."""
    skips: dict[str, int]
    skipped_examples: dict[str, tuple[str, ...]]


def find_utterances(root: Path, subsets: tuple[str, ...] = (), progress: bool = False) -> Corpus:
    """Find the utterances of a corpus in LibriSpeech's layout; only file headers are read.

    A file with an unreadable header or without audio is counted in `skips`.

    Args:
        root: the folder with the subsets, its parent (with `LibriSpeech/` in it), or one subset.
        subsets: names such as `train-clean-100`; if empty, every `train-*`, or else all subsets.
        progress: show a progress bar on stderr if that is a terminal.

    Raises:
        DataError: no such folder, another layout, or no usable audio.
        UsageError: an unknown subset; the nearest known one is named.
    """
    listing = list_audio(root, subsets)
    skips = Skips(dict(listing.skips), dict(listing.skipped_examples))
    transcripts: dict[str, dict[str, str]] = {}
    utterances = []
    with ThreadPoolExecutor(max_workers=4) as pool:
        found = pool.map(lambda path: samples_of(listing.root / path), listing.files)
        for path, result in zip(
            track(listing.files, len(listing.files), "Reading headers", progress),
            found,
            strict=True,
        ):
            if isinstance(result, str):
                skips.add(result, path)
                continue
            folder, _, name = path.rpartition("/")
            if folder not in transcripts:
                transcripts[folder] = _read_transcripts(listing.root / folder)
            subset, speaker, chapter = folder.split("/")
            words = transcripts[folder].get(name.rpartition(".")[0])
            utterances.append(Utterance(path, subset, speaker, chapter, result, words))
    if not utterances:
        reasons = "; ".join(describe_skips(skips.counts, skips.examples))
        raise DataError(f"no usable audio in {listing.root}: {reasons}; download the subset again")
    return Corpus(listing.root, tuple(utterances), listing.subsets, skips.counts, skips.examples)


def list_audio(root: Path, subsets: tuple[str, ...] = ()) -> Listing:
    """List the audio files of a corpus; opens none of them.

    The arguments and errors are those of `find_utterances`.
    """
    folder, present = _locate(root)
    for subset in subsets:
        if subset not in present:
            raise UsageError(
                f"no subset '{subset}' in {folder}{nearest(subset, present)} "
                f"(present: {', '.join(present)})"
            )
    training = tuple(name for name in present if name.startswith("train-"))
    chosen = tuple(dict.fromkeys(subsets)) or training or present
    skips = Skips({}, {})
    ordered = sorted(chosen, key=natural_order)
    found = Names.of(path for subset in ordered for path in _files_of(folder, subset, skips))
    if not len(found):
        skipped = "; ".join(["", *describe_skips(skips.counts, skips.examples)])
        raise DataError(
            f"empty corpus: no audio in {', '.join(chosen)} of {folder}{skipped}; expected "
            f"{LAYOUT} there; download or unpack the subset again"
        )
    return Listing(folder, chosen, found, skips.counts, skips.examples)


def corpus_folder(root: Path) -> Path:
    """The folder with the subsets, wherever `root` points in a corpus (see `find_utterances`)."""
    return _locate(root)[0]


def _locate(root: Path) -> tuple[Path, tuple[str, ...]]:
    """The folder with the subsets, and their names in order."""
    if not root.exists():
        raise DataError(f"no such folder: {root}; give the folder that holds LibriSpeech's subsets")
    if not root.is_dir():
        raise DataError(f"{root} is not a folder; give the folder that holds LibriSpeech's subsets")
    root = root.resolve()
    for folder in (root, root / "LibriSpeech"):
        present = tuple(name for name in _folders(folder) if _is_subset(folder / name))
        if present:
            return folder, present
    if _is_subset(root):
        return root.parent, (root.name,)
    there = sorted(os.listdir(root))
    shown = ", ".join(there[:5]) + (", ..." if len(there) > 5 else "")
    if not there:
        raise DataError(f"empty corpus: nothing in {root}; expected {LAYOUT} there")
    raise DataError(
        f"{root} is not in LibriSpeech's layout: expected {LAYOUT} there, found {shown}; give the "
        f"folder that holds subsets such as train-clean-100"
    )


def _folders(folder: Path) -> list[str]:
    """Names of the folders in a folder, in order; empty if it cannot be read."""
    try:
        with os.scandir(folder) as entries:
            names = [e.name for e in entries if not e.name.startswith(".") and e.is_dir()]
    except OSError:
        return []
    return sorted(names, key=natural_order)


def _is_subset(folder: Path) -> bool:
    """Whether a folder is a subset, judged by its name or the folders in it."""
    if _SUBSET_NAME.fullmatch(folder.name):
        return True
    for speaker in _folders(folder):
        for chapter in _folders(folder / speaker):
            if speaker.isdigit() and chapter.isdigit():
                return True
            start = f"{speaker}-{chapter}-"
            with contextlib.suppress(OSError):
                if any(n.startswith(start) for n in os.listdir(folder / speaker / chapter)):
                    return True
    return False


def _files_of(root: Path, subset: str, skips: Skips) -> Iterator[str]:
    """Paths of the audio files of one subset in order."""
    for speaker in _folders(root / subset):
        for chapter in _folders(root / subset / speaker):
            folder = f"{subset}/{speaker}/{chapter}"
            start = f"{speaker}-{chapter}-"
            audio = [
                name
                for name in os.listdir(root / folder)
                if name.lower().endswith(_SUFFIXES) and not name.startswith(".")
            ]
            audio.sort(key=lambda name: natural_order(name[: name.rfind(".")].removeprefix(start)))
            unwritable = path_problem(folder) is not None
            for name in audio:
                path = f"{folder}/{name}"
                if unwritable or FORBIDDEN.search(name):
                    skips.add("name that cannot be written in a manifest", path)
                elif not name.startswith(start):
                    skips.add("name not speaker-chapter-number", path)
                else:
                    yield path


def _read_transcripts(folder: Path) -> dict[str, str]:
    """Transcripts of one chapter by utterance name; empty if the file is missing."""
    name = f"{folder.parent.name}-{folder.name}.trans.txt"
    try:
        text = (folder / name).read_text(encoding="utf-8-sig", errors="replace")
    except OSError:
        return {}
    pairs = (line.split(maxsplit=1) for line in text.split("\n"))
    return {pair[0]: pair[1].strip() for pair in pairs if len(pair) == 2}
