"""Who gets which labelled clips, and which of them a client is tested on."""

import dataclasses
import shutil
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from conftest import Writer
from tone_words import SPEAKERS, WORDS, write_words

from common.errors import DataError, UsageError
from fl_client import task_data
from fl_client.client_state import ClientState
from fl_client.federation_settings import TaskFederation, from_run_config
from fl_client.task_data import (
    ClientClips,
    Pool,
    client_clips,
    divide_pool,
    load_pool,
    own_split,
)
from partitions.manifest import Piece
from ssl_core.downstream.clips import Clip, TaskData
from ssl_core.downstream.task_recipe import recipe_of

HOWS = ("speaker", "iid", "skewed", "labels")


def settings(data: Path | str, **changes: Any) -> TaskFederation:
    values = {"task": "kws35", "checkpoint": "random", "model": "tiny", "data": str(data)}
    found = from_run_config({**values, **changes})
    assert isinstance(found, TaskFederation)
    return found


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six speakers who say four words twice; to be read only."""
    return write_words(tmp_path_factory.mktemp("words"))


@pytest.fixture(scope="module")
def pool(corpus: Path) -> Pool:
    return load_pool("kws35", corpus, recipe_of("kws35"), 0, ())


def test_a_pool_holds_every_clip_of_every_split_once(pool: Pool, corpus: Path) -> None:
    assert pool.root == corpus
    assert pool.labels == WORDS
    assert [clip.name for clip in pool.clips] == sorted(
        f"{word}/{speaker}_nohash_{time}.wav"
        for word in WORDS
        for speaker in SPEAKERS
        for time in (0, 1)
    )
    assert pool.skips == ()


def test_clips_that_nobody_trains_on_are_not_in_the_pool(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The trials of verification name speakers of their own, whom no head knows."""
    known, stranger = (
        Clip(Piece(f"wav/{name}/a/1.wav", 0, 16_000), name, name) for name in ("id1", "id2")
    )
    data = TaskData(Path("voices"), (known,), (), (stranger,), ("id1",))
    monkeypatch.setattr(task_data, "read_task", lambda *_, **__: data)
    pool = load_pool("verification", Path("voices"), recipe_of("verification"), 0, ())
    assert pool.clips == (known,)
    assert pool.skips == ("skipped, label without clips to train on: 1",)


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("clients", [1, 4, 6])
def test_every_clip_goes_to_exactly_one_client(pool: Pool, how: str, clients: int) -> None:
    parts = divide_pool(pool, clients, how, 3, False)
    assert len(parts) == clients
    assert sorted(clip.name for part in parts for clip in part) == [c.name for c in pool.clips]
    assert all(len(part) >= 2 for part in parts)
    for part in parts:
        assert list(part) == sorted(part, key=lambda clip: clip.name)


@pytest.mark.parametrize("how", HOWS)
def test_a_division_follows_from_its_seed(pool: Pool, how: str) -> None:
    first = divide_pool(pool, 4, how, 3, False)
    assert divide_pool(pool, 4, how, 3, False) == first
    assert any(divide_pool(pool, 4, how, seed, False) != first for seed in (4, 5, 6))


@pytest.mark.parametrize("how", ["skewed", "labels"])
@pytest.mark.parametrize("seed", range(5))
def test_however_uneven_every_client_can_train_and_be_tested(
    pool: Pool, how: str, seed: int
) -> None:
    parts = divide_pool(pool, 20, how, seed, False)
    assert sum(map(len, parts)) == len(pool.clips)
    for part in parts:
        train, test = own_split(part, 0.25, seed)
        assert train
        assert test


@pytest.mark.parametrize("clients", [2, 4, 6])
def test_speakers_stay_whole(pool: Pool, clients: int) -> None:
    parts = divide_pool(pool, clients, "speaker", 3, False)
    homes = [{clip.speaker for clip in part} for part in parts]
    assert sum(map(len, homes)) == len(SPEAKERS)
    assert set().union(*homes) == set(SPEAKERS)


def test_more_clients_than_speakers_have_one_speaker_each(pool: Pool) -> None:
    parts = divide_pool(pool, 10, "speaker", 3, False)
    assert all(len({clip.speaker for clip in part}) == 1 for part in parts)


def test_iid_parts_are_as_large_as_each_other_and_skewed_ones_are_not(pool: Pool) -> None:
    even = [len(part) for part in divide_pool(pool, 5, "iid", 0, False)]
    assert max(even) - min(even) <= 1
    uneven = [len(part) for part in divide_pool(pool, 5, "skewed", 0, False)]
    assert max(uneven) > 3 * min(uneven)


def test_with_labels_clients_say_different_words(pool: Pool) -> None:
    def widest(how: str) -> float:
        """Largest difference between two clients' fractions of a word."""
        counts = [Counter(c.label for c in part) for part in divide_pool(pool, 4, how, 1, False)]
        fractions = [[count[word] / count.total() for word in WORDS] for count in counts]
        return max(max(column) - min(column) for column in zip(*fractions, strict=True))

    assert widest("speaker") == 0
    assert widest("labels") > 0.5


def test_clips_without_a_known_speaker_are_divided_by_file(pool: Pool) -> None:
    clips = tuple(
        Clip(Piece(f"noise/{file}.wav", start, 800), label=WORDS[0])
        for file in range(3)
        for start in range(0, 4000, 1000)
    )
    parts = divide_pool(Pool(pool.root, WORDS, clips, ()), 3, "speaker", 0, False)
    assert [len({clip.piece.path for clip in part}) for part in parts] == [1, 1, 1]


@pytest.mark.parametrize("how", HOWS)
def test_too_many_clients_are_refused(pool: Pool, how: str) -> None:
    divide_pool(pool, 24, how, 0, False)
    with pytest.raises(UsageError, match="48 clips are too few for 25 clients: each needs two"):
        divide_pool(pool, 25, how, 0, False)


def test_labels_are_for_tasks_with_classes(pool: Pool) -> None:
    with pytest.raises(UsageError, match="partition labels is for tasks with classes"):
        divide_pool(pool, 4, "labels", 0, True)


def clips_of(counts: Mapping[str, int]) -> list[Clip]:
    return [
        Clip(Piece(f"{label}/{number}.wav", 0, 100), "me", label)
        for label, count in counts.items()
        for number in range(count)
    ]


def test_an_own_split_has_every_label_with_two_clips_on_both_sides() -> None:
    clips = clips_of({"a": 8, "b": 2, "c": 1, "d": 5})
    train, test = own_split(clips, 0.25, 0)
    assert not set(train) & set(test)
    assert {*train, *test} == set(clips)
    assert Counter(clip.label for clip in test) == {"a": 2, "b": 1, "d": 1}
    assert Counter(clip.label for clip in train) == {"a": 6, "b": 1, "c": 1, "d": 4}
    assert own_split(list(reversed(clips)), 0.25, 0) == (train, test)
    assert own_split(clips, 0.25, 1) != (train, test)


@pytest.mark.parametrize(("fraction", "count"), [(0.01, 1), (0.5, 5), (0.99, 9)])
def test_the_fraction_of_clips_to_test_on(fraction: float, count: int) -> None:
    train, test = own_split(clips_of({"a": 10}), fraction, 0)
    assert (len(test), len(train)) == (count, 10 - count)


def test_words_said_once_still_leave_one_to_be_tested_on() -> None:
    train, test = own_split(clips_of({"a": 1, "b": 1, "c": 1}), 0.25, 0)
    assert [clip.label for clip in train] == ["a", "b"]
    assert [clip.label for clip in test] == ["c"]


@pytest.mark.parametrize("counts", [{}, {"a": 1}])
def test_a_single_clip_is_too_few(counts: dict[str, int]) -> None:
    with pytest.raises(DataError, match="a client needs two clips"):
        own_split(clips_of(counts), 0.25, 0)


def names(clips: ClientClips) -> set[str]:
    return {clip.name for clip in (*clips.train, *clips.test)}


def test_a_node_has_its_part_its_speakers_or_all(corpus: Path, pool: Pool) -> None:
    run = settings(corpus, own_test=0.5)
    parts = [client_clips({"partition-id": n, "num-partitions": 3}, run) for n in range(3)]
    assert [part.key for part in parts] == [0, 1, 2]
    assert [names(part) for part in parts] == [
        {clip.name for clip in part} for part in divide_pool(pool, 3, "speaker", 0, False)
    ]
    mine = client_clips({"speakers": " aa00c1e7, ff55b6dc ", "client-key": 9}, run)
    assert (mine.key, {clip.speaker for clip in mine.train}) == (9, {"aa00c1e7", "ff55b6dc"})
    assert len(mine.train) == len(mine.test) == 8
    assert names(client_clips({"client-key": 4}, run)) == {clip.name for clip in pool.clips}


def test_a_device_has_data_of_its_own(corpus: Path, tmp_path: Path) -> None:
    own = write_words(tmp_path / "own", speakers=("gg66", "hh77", "ii88"), times=1)
    clips = client_clips({"data": str(own)}, settings(corpus))
    assert clips.root == own
    assert {clip.speaker for clip in clips.train} == {"gg66", "hh77", "ii88"}


def test_what_a_node_cannot_have_is_refused(corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"--speakers: not in .*: gg66, hh77"):
        client_clips({"speakers": "hh77,aa00c1e7,gg66"}, settings(corpus))
    with pytest.raises(UsageError, match="data: give the corpus of kws35"):
        client_clips({}, settings(""))
    with pytest.raises(DataError, match=r"no such folder: .*gone"):
        client_clips({"data": str(tmp_path / "gone")}, settings(corpus))
    (tmp_path / "flat").mkdir()
    (tmp_path / "flat" / "a.wav").write_bytes(b"x")
    with pytest.raises(DataError, match=r"not in the layout of Speech Commands v2"):
        client_clips({"data": str(tmp_path / "flat")}, settings(corpus))


def test_transcripts_are_divided_by_speaker_and_split_as_one_label(
    write: Writer, root: Path
) -> None:
    for speaker in (11, 12, 13):
        for number in range(4):
            write("train-own", speaker, 1, number, samples=4800, words="SECRET WORDS")
    run = settings(root, task="asr", subset="train-own")
    parts = [client_clips({"partition-id": n, "num-partitions": 3}, run) for n in range(3)]
    for part in parts:
        assert (len(part.train), len(part.test)) == (3, 1)
        assert len({clip.speaker for clip in (*part.train, *part.test)}) == 1
    assert {clip.text for clip in parts[0].train} == {"SECRET WORDS"}
    with pytest.raises(UsageError, match="partition labels is for tasks with classes"):
        client_clips(
            {"partition-id": 0, "num-partitions": 3}, dataclasses.replace(run, partition="labels")
        )


GOOD = {"task": "kws35", "checkpoint": "random", "model": "tiny", "data": "d"}
BAD: dict[str, tuple[dict[str, Any], str]] = {
    "labels without a task": (
        {"task": "", "partition": "labels"},
        "'labels' is not one of speaker, iid, skewed$",
    ),
    "nothing to be tested on": (
        {"own-test": 0.0},
        "own-test is a fraction of clips between 0 and 1",
    ),
    "nothing to train on": ({"own-test": 1.0}, "own-test is a fraction of clips between 0 and 1"),
    "head updates": ({"head-updates": -1}, "head-updates must be at least 0, not -1"),
    "no checkpoint": ({"checkpoint": ""}, "a task needs a checkpoint"),
    "a fleet": ({"fleet": "rpi4:4"}, "fleet is for pretraining"),
    "a time limit": ({"time-limit": "60s"}, "time-limit is for pretraining"),
    "another task": ({"task": "kws36"}, "no task 'kws36'.*did you mean 'kws35'"),
    "another method": ({"method": "fedpers"}, "'fedpers' is not one of fedavg, fedper, fedrep"),
    "another share": ({"share": "head"}, "'head' is not one of backbone, layers, lora, none"),
    "a recipe's typo": ({"recipe.head-rat": 1}, "did you mean 'recipe.head-rate'"),
    "a recipe's value": ({"recipe.head-rate": 0}, "head-rate must be above zero"),
    "a recipe in one text": ({"recipe": "head-rate=1"}, "recipe must be a mapping of settings"),
}


@pytest.mark.parametrize("case", BAD)
def test_settings_that_do_not_fit_are_refused(case: str) -> None:
    changes, reason = BAD[case]
    found = from_run_config(GOOD)
    assert isinstance(found, TaskFederation)
    assert found.recipe.head == "mean-linear"
    with pytest.raises(UsageError, match=reason):
        from_run_config(GOOD | changes)


def test_a_run_of_a_task_has_its_own_recipe() -> None:
    own = {"recipe.head": "x-vector", "recipe.head-rate": 0.5}
    recipe = settings("d", rounds=7, batch=3, **own).recipe
    assert (recipe.epochs, recipe.batch, recipe.head, recipe.head_rate) == (7, 3, "x-vector", 0.5)


class Device:
    """A device with its own corpus, every round of which is another process."""

    def __init__(self, folder: Path, **node: object) -> None:
        self.data = write_words(folder / "own")
        self.state = ClientState(folder / "state", "run", 4)
        self.node = {"client-key": 4, "data": str(self.data), **node}

    def clips(self) -> ClientClips:
        load_pool.cache_clear()
        return client_clips(self.node, settings("unused"), self.state)

    def add(self, clip: str) -> None:
        source = self.data / WORDS[0] / f"{SPEAKERS[0]}_nohash_0.wav"
        (self.data / clip).parent.mkdir(exist_ok=True)
        (self.data / clip).write_bytes(source.read_bytes())


def test_test_clips_of_a_device_stay_so_when_it_gets_others(tmp_path: Path) -> None:
    device = Device(tmp_path)
    first = device.clips()
    assert device.clips() == first
    new = [f"{WORDS[n % 4]}/gg66{n:04d}_nohash_0.wav" for n in range(40)]
    for name in new:
        device.add(name)
    again = device.clips()
    assert {clip.name for clip in again.test} == {clip.name for clip in first.test}
    assert {clip.name for clip in again.train} == {clip.name for clip in first.train} | set(new)
    load_pool.cache_clear()
    alone = client_clips(device.node, settings("unused"))
    assert {clip.name for clip in alone.test} & {clip.name for clip in first.train}
    for clip in first.test[:-1]:
        (device.data / clip.name).unlink()
    assert device.clips().test == first.test[-1:]
    (device.data / first.test[-1].name).unlink()
    with pytest.raises(DataError, match="no longer has clips to train on and test clips of"):
        device.clips()


def test_a_head_is_not_used_for_other_labels(tmp_path: Path) -> None:
    device = Device(tmp_path)
    first = device.clips()
    device.add("mother/aa00c1e7_nohash_0.wav")
    with pytest.raises(DataError) as refused:
        device.clips()
    assert str(refused.value) == (
        f"{device.data} has changed since the run began, and its head no longer fits: labels: 1 "
        f"added (mother). Put the corpus back as it was, or delete {device.state.folder} to begin "
        "anew"
    )
    shutil.rmtree(device.data / "mother")
    assert device.clips() == first
    (device.data / WORDS[1]).rename(device.data / "martin")  # as many labels as before
    for name in ("validation", "testing"):
        path = device.data / f"{name}_list.txt"
        path.write_text(path.read_text().replace(WORDS[1], "martin"))
    with pytest.raises(DataError, match=r"labels: 1 added \(martin\), 1 removed \(marvin\)"):
        device.clips()
    shutil.rmtree(device.state.folder)
    assert device.clips().labels[1] == "martin"


def test_parts_of_a_corpus_that_has_changed_are_refused(tmp_path: Path) -> None:
    device = Device(tmp_path, **{"partition-id": 1, "num-partitions": 3})
    first = device.clips()
    for number in range(9):
        device.add(f"{WORDS[0]}/gg66{number:04d}_nohash_0.wav")
    with pytest.raises(DataError, match="its part of the corpus no longer fits: clips by label"):
        device.clips()
    for path in device.data.rglob("gg66*"):
        path.unlink()
    assert device.clips() == first
