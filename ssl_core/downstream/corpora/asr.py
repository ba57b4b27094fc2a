"""Speech recognition on LibriSpeech, with transcripts as characters.

torchaudio's reader fails on a chapter without transcripts; this one skips it.
"""

import unicodedata
from pathlib import Path

from common.errors import UsageError
from partitions.librispeech import Utterance, find_utterances
from partitions.manifest import Piece
from partitions.skips import Skips
from ssl_core.downstream.clips import Clip, TaskData
from ssl_core.downstream.corpora.corpus_files import task_data
from ssl_core.training.randomness import generator

LABELS = (" ", "'", *"ABCDEFGHIJKLMNOPQRSTUVWXYZ")
"""Symbols of a transcript, without the blank."""

VALID_FRACTION = 0.05
"""Fraction of the training utterances to validate on if no subset is given for that."""


def read(
    root: Path,
    train: tuple[str, ...],
    valid: tuple[str, ...],
    test: tuple[str, ...],
    seed: int = 0,
    progress: bool = False,
) -> TaskData:
    """List the utterances of LibriSpeech subsets that have a transcript.

    Args:
        root: the folder that holds the subsets, its parent with `LibriSpeech/`, or one subset.
        train: names of subsets, such as `train-clean-100`.
        valid: names of subsets, such as `dev-clean`; if empty, a random `VALID_FRACTION` of the
            training utterances, at least one, whose speakers are then also in `train`.
        test: names of subsets, such as `test-clean`; if empty, the clips of `valid`.
        seed: for choosing the utterances to validate on.
        progress: show a progress bar on stderr if that is a terminal.

    Transcripts are upper case in the symbols of `LABELS`; punctuation becomes a space. `skips`
    counts unreadable and empty files, and utterances with no transcript or with other symbols in
    it.

    Raises:
        UsageError: a missing subset, a subset in two splits, or no subset to train on.
        DataError: wrong layout, or a split without any transcript.
    """
    _check(train, valid, test)
    corpus = find_utterances(root, (*train, *valid, *test), progress)
    skips = Skips(dict(corpus.skips), dict(corpus.skipped_examples))
    clips: dict[str, list[Clip]] = {}
    for utterance in corpus.utterances:
        clip = _clip(utterance, skips)
        if clip is not None:
            clips.setdefault(utterance.subset, []).append(clip)
    training, validation, tests = (
        [clip for subset in sorted(set(subsets)) for clip in clips.get(subset, [])]
        for subsets in (train, valid, test)
    )
    if not valid and len(training) > 1:
        count = max(1, round(VALID_FRACTION * len(training)))
        order = generator(seed, "transcripts to validate on").permutation(len(training))
        drawn = {int(index) for index in order[:count]}
        validation = [clip for index, clip in enumerate(training) if index in drawn]
        training = [clip for index, clip in enumerate(training) if index not in drawn]
    return task_data(
        corpus.root, training, validation, tests if test else validation, LABELS, skips
    )


def normalised(transcript: str) -> str | None:
    """A transcript in the symbols of `LABELS`, or None if it has others, such as digits."""
    letters = []
    for letter in transcript.replace("\N{RIGHT SINGLE QUOTATION MARK}", "'").upper():
        mark = letter != "'" and unicodedata.category(letter).startswith("P")
        letters.append(" " if mark else letter)
    text = " ".join("".join(letters).split())
    return text if set(text) <= set(LABELS) else None


def _check(train: tuple[str, ...], valid: tuple[str, ...], test: tuple[str, ...]) -> None:
    if not train:
        raise UsageError("no subset to train on: name one, such as train-clean-100")
    for first, second in ((train, valid), (train, test), (valid, test)):
        both = sorted(set(first) & set(second))
        if both:
            raise UsageError(f"subset '{both[0]}' is in two splits: give it to one of them")


def _clip(utterance: Utterance, skips: Skips) -> Clip | None:
    """The clip of an utterance; None, and counted in `skips`, without a usable transcript."""
    if utterance.transcript is None:
        skips.add("no transcript", utterance.path)
        return None
    text = normalised(utterance.transcript)
    if text is None:
        skips.add("other symbols in the transcript", utterance.path)
    elif not text:
        skips.add("empty transcript", utterance.path)
    else:
        piece = Piece(utterance.path, 0, utterance.samples)
        return Clip(piece, utterance.speaker, text=text)
    return None
