"""Emotion recognition on IEMOCAP or EmoDB: four emotions, cross-validated by pairs of speakers.

torchaudio's reader of IEMOCAP gives the actor who wore the sensors as the speaker, not the one who
speaks.
"""

import re
from collections.abc import Mapping
from pathlib import Path

from common.errors import DataError, UsageError
from partitions.manifest import Piece, natural_order, path_problem
from partitions.skips import Skips
from ssl_core.downstream.clips import Clip, TaskData
from ssl_core.downstream.corpora.corpus_files import (
    check_folder,
    folders,
    lengths,
    lines_of,
    names,
    other_layout,
    rows_of,
    task_data,
)

CORPUS = "IEMOCAP"
LAYOUT = (
    "Session1 to Session5 with dialog/EmoEvaluation/*.txt and sentences/wav/dialog/utterance.wav"
)
LABELS = ("ang", "hap", "neu", "sad")
"""Anger, happiness (with excitement), neutral, sadness."""

SESSIONS = 5

_SAME = {"exc": "hap"}
_UTTERANCE = re.compile(r"(Ses[0-9]+)[FM]_[A-Za-z0-9_]+_([FM])[A-Za-z0-9]+")
_COLUMNS = ("path", "emotion", "speaker")

Group = tuple[Clip, ...]


def read(root: Path, fold: int, seed: int = 0, progress: bool = False) -> TaskData:
    """List the clips of one fold of IEMOCAP, or of EmoDB in a table `labels.csv`.

    Args:
        root: the folder that holds `Session1` to `Session5`, or its parent with `IEMOCAP/` or
            `IEMOCAP_full_release/`; for EmoDB the folder of `labels.csv`, a table with the columns
            path, emotion and speaker.
        fold: from 1. Its two speakers are the test set: those of that session of IEMOCAP, or
            that pair of EmoDB's sorted speakers (an odd last speaker joins the last pair). The
            next session or pair, cyclically, is the validation set.
        seed: unused, as nothing is random.
        progress: show a progress bar on stderr if that is a terminal.

    Excited counts as happy. Clips with other emotions are skipped, which leaves 1085, 1023, 1151,
    1031 and 1241 clips in the five sessions. `skips` also counts missing, unreadable and empty
    clips.

    Raises:
        UsageError: no such fold.
        DataError: wrong layout, a session without clips, too few speakers for three groups, or
            an invalid line in a label file.
    """
    check_folder(root, CORPUS)
    skips = Skips({}, {})
    folder, groups = _groups(root, skips, progress)
    if not 1 <= fold <= len(groups):
        raise UsageError(f"no fold {fold} of {folder}: choose 1 to {len(groups)}")
    test, valid = fold - 1, fold % len(groups)
    train = [clip for n, group in enumerate(groups) if n not in (test, valid) for clip in group]
    lacking = [label for label in LABELS if label not in {clip.label for clip in train}]
    if lacking:
        raise DataError(
            f"fold {fold} of {folder} has no clip of '{lacking[0]}' to train on; unpack it again"
        )
    return task_data(folder, train, groups[valid], groups[test], LABELS, skips)


def count_folds(root: Path) -> int:
    """Number of folds of a corpus: 5 for IEMOCAP, one per pair of speakers for EmoDB.

    Raises:
        DataError: as `read`.
    """
    check_folder(root, CORPUS)
    return len(_groups(root, Skips({}, {}), False)[1])


def _groups(root: Path, skips: Skips, progress: bool) -> tuple[Path, list[Group]]:
    """Corpus root, and the clips of each pair of speakers."""
    for folder in (root, root / "IEMOCAP", root / "IEMOCAP_full_release"):
        if any((folder / name / "dialog" / "EmoEvaluation").is_dir() for name in folders(folder)):
            return folder, _sessions(folder, skips, progress)
    if (root / "labels.csv").is_file():
        return root, _speaker_pairs(root, skips, progress)
    raise other_layout(root, CORPUS, f"{LAYOUT} (or EmoDB's labels.csv)")


def _sessions(root: Path, skips: Skips, progress: bool) -> list[Group]:
    labelled = [_evaluations(root, f"Session{n}", skips) for n in range(1, SESSIONS + 1)]
    usable = lengths(root, [path for session in labelled for path in session], skips, progress)
    groups = [_clips(session, usable) for session in labelled]
    for number, group in enumerate(groups, start=1):
        if not group:
            raise DataError(
                f"no usable clip in {root / f'Session{number}'}; the folds need all {SESSIONS} "
                f"sessions, laid out as {LAYOUT}: unpack {CORPUS} again"
            )
    return groups


def _evaluations(root: Path, session: str, skips: Skips) -> dict[str, tuple[str, str]]:
    """Label and speaker by path of the utterances in a session with one of the four emotions."""
    folder = root / session / "dialog" / "EmoEvaluation"
    advice = f"unpack {CORPUS} again"
    found: dict[str, tuple[str, str]] = {}
    for name in names(folder):
        if not name.endswith(".txt"):
            continue
        for number, line in lines_of(folder / name, advice):
            if not line.startswith("["):
                continue
            columns = line.split("\t")
            match = _UTTERANCE.fullmatch(columns[1]) if len(columns) >= 3 else None
            if match is None:
                raise DataError(
                    f"{folder / name}:{number}: expected '[start - end]', an utterance such as "
                    f"Ses01F_impro01_F000 and its emotion, separated by tabs; {advice}"
                )
            utterance = columns[1]
            path = f"{session}/sentences/wav/{utterance.rpartition('_')[0]}/{utterance}.wav"
            label = _SAME.get(columns[2], columns[2])
            if path in found:
                raise DataError(f"{folder / name}:{number}: {utterance} is labelled twice")
            if label in LABELS:
                found[path] = (label, match[1] + match[2])
            else:
                skips.add("another emotion", path)
    return dict(sorted(found.items()))


def _speaker_pairs(root: Path, skips: Skips, progress: bool) -> list[Group]:
    labelled = _table(root / "labels.csv", skips)
    usable = lengths(root, labelled, skips, progress)
    clips = _clips(labelled, usable)
    speakers = sorted({clip.speaker for clip in clips}, key=natural_order)
    count = len(speakers) // 2
    if count < 3:
        raise DataError(
            f"clips of {len(speakers)} speakers in {root}, six are needed: two to train on, two to "
            f"validate on and two to test on; unpack it again"
        )
    group_of = {speaker: min(n // 2, count - 1) for n, speaker in enumerate(speakers)}
    return [
        tuple(clip for clip in clips if group_of[clip.speaker] == group) for group in range(count)
    ]


def _table(path: Path, skips: Skips) -> dict[str, tuple[str, str]]:
    """Label and speaker by path of the rows of `labels.csv` with one of the four emotions."""
    found: dict[str, tuple[str, str]] = {}
    for number, row in rows_of(path, _COLUMNS, f"unpack {CORPUS} or EmoDB again"):
        file, emotion, speaker = (row[column] for column in _COLUMNS)
        problem = path_problem(file) or ("" if speaker else "no speaker")
        if problem:
            raise DataError(f"{path}:{number}: {problem}; correct that row")
        if file in found:
            raise DataError(f"{path}:{number}: {file} is labelled twice; correct that row")
        if emotion in LABELS:
            found[file] = (emotion, speaker)
        else:
            skips.add("another emotion", file)
    return dict(sorted(found.items()))


def _clips(labelled: Mapping[str, tuple[str, str]], usable: Mapping[str, int]) -> Group:
    return tuple(
        Clip(Piece(path, 0, usable[path]), speaker, label)
        for path, (label, speaker) in labelled.items()
        if path in usable
    )
