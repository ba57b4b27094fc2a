"""The feature cache: exact, bounded, shared by processes, and harmless when it fails."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from noise_files import write_noise
from small_models import backbone_of, small_recipe
from transformers import Wav2Vec2FeatureExtractor

from common.errors import Interrupted
from partitions.manifest import Piece
from ssl_core.downstream.clip_loader import ClipLoader
from ssl_core.downstream.clips import Clip
from ssl_core.downstream.feature_cache import FeatureCache, clip_key
from ssl_core.downstream.frozen_part import FrozenPart
from ssl_core.downstream.task_model import TaskModel, Upstream
from ssl_core.downstream.task_step import HEAD, TaskStep
from ssl_core.planning.step_plan import Plan
from ssl_core.wav2vec2.model import Backbone

WIDTH = 6
Floats = np.ndarray


def clips(count: int, frames: int = 5, seed: int = 0) -> list[tuple[bytes, Floats]]:
    rng = np.random.default_rng(seed)
    return [
        (bytes([seed, n // 256, n % 256]) + b"k" * 13, rng.standard_normal((frames, WIDTH), "f4"))
        for n in range(count)
    ]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "features"


def assert_holds(cache: FeatureCache, expected: list[tuple[bytes, Floats]]) -> None:
    found = cache.get([key for key, _ in expected])
    assert found.keys() == {key for key, _ in expected}
    for key, frames in expected:
        assert found[key].dtype == np.float32
        assert found[key].tobytes() == frames.tobytes()
        assert found[key].shape == frames.shape


def test_what_is_put_comes_back_exactly(folder: Path) -> None:
    cache = FeatureCache("a-frames-fp32", WIDTH, folder=folder)
    some, others = clips(3), clips(1200, 2, seed=1)  # more than one query's worth
    some[1][1][0, :3] = (np.inf, -0.0, 1e-42)
    assert cache.missing(key for key, _ in some) == {key for key, _ in some}
    assert cache.get([some[0][0]]) == {}
    cache.put(some)
    cache.put(others)
    cache.put([])
    assert_holds(cache, some + others)
    unknown = b"?" * 16
    assert cache.missing([unknown, some[0][0]]) == {unknown}
    cache.close()
    again = FeatureCache("a-frames-fp32", WIDTH, folder=folder)
    assert_holds(again, some + others)
    assert not again.problem
    again.close()


def test_a_clip_put_twice_is_the_later_one(folder: Path) -> None:
    cache = FeatureCache("a", WIDTH, folder=folder)
    ((key, first),) = clips(1)
    cache.put([(key, first)])
    cache.put([(key, first[::2] * 2)])  # not contiguous
    assert_holds(cache, [(key, np.ascontiguousarray(first[::2] * 2))])
    cache.close()


def test_files_in_the_users_cache(cache: Path) -> None:
    kept = FeatureCache("abc-mean-fp32", WIDTH)
    assert kept.path == cache / "shortwave" / "features" / "abc-mean-fp32.sqlite"
    assert kept.path.is_file()
    kept.close()


def test_switched_off_it_keeps_nothing_and_makes_no_file(folder: Path) -> None:
    cache = FeatureCache("a", WIDTH, 0, folder)
    cache.put(clips(1))
    assert cache.get([clips(1)[0][0]]) == {}
    assert cache.problem == "the cache is switched off"
    assert not folder.exists()


def test_a_closed_cache_answers_nothing(folder: Path) -> None:
    cache = FeatureCache("a", WIDTH, folder=folder)
    cache.put(clips(1))
    cache.close()
    cache.close()
    cache.put(clips(2))
    assert cache.get([clips(1)[0][0]]) == {}


MIB = 2**20


def test_the_limit_is_kept_and_said(folder: Path) -> None:
    cache = FeatureCache("a", WIDTH, MIB, folder)
    first = clips(4, 2000)
    for clip in first:  # 48 kB each
        cache.put([clip])
    assert not cache.problem
    for clip in clips(20, 2000, seed=1):
        cache.put([clip])
    assert cache.problem == f"{folder} has reached its limit of 1 MiB"
    assert_holds(cache, first)
    assert sum(path.stat().st_size for path in folder.iterdir()) <= MIB
    cache.close()
    # The clips in the file are found again and count towards the limit.
    cache = FeatureCache("a", WIDTH, MIB, folder)
    assert not cache.problem
    assert_holds(cache, first)
    cache.close()


def age(folder: Path, name: str, days: int) -> None:
    for path in folder.glob(f"{name}.sqlite*"):
        os.utime(path, (path.stat().st_atime - days * 86_400,) * 2)


def test_the_file_not_used_for_longest_makes_room(folder: Path) -> None:
    for seed, name in enumerate(("new", "old", "middle")):
        cache = FeatureCache(name, WIDTH, folder=folder)
        cache.put(clips(10, 2000, seed))  # 480 kB
        cache.close()
    age(folder, "old", 9)
    age(folder, "middle", 5)
    cache = FeatureCache("own", WIDTH, 17 * MIB // 10, folder)
    own = clips(10, 2000, 9)
    cache.put(own)
    assert not cache.problem
    assert_holds(cache, own)
    names = {path.name.partition(".")[0] for path in folder.iterdir()}
    assert names == {"own", "middle", "new"}
    cache.close()
    # Opening a file counts as use.
    FeatureCache("middle", WIDTH, folder=folder).close()
    age(folder, "new", 1)
    cache = FeatureCache("own", WIDTH, 17 * MIB // 10, folder)
    cache.put(clips(12, 2000, 8))
    names = {path.name.partition(".")[0] for path in folder.iterdir()}
    assert names == {"own", "middle"}
    cache.close()


def test_no_file_goes_in_vain(folder: Path) -> None:
    other = FeatureCache("other", WIDTH, folder=folder)
    other.put(clips(3))
    other.close()
    cache = FeatureCache("own", WIDTH, MIB, folder)
    cache.put(clips(1, 100_000))
    assert "limit of 1 MiB" in cache.problem
    assert (folder / "other.sqlite").exists()
    cache.close()


def damage(path: Path, first: int, length: int) -> None:
    with open(path, "r+b") as stream:
        stream.seek(first)
        stream.write(np.random.default_rng(0).bytes(length))


@pytest.mark.parametrize("content", [b"no database", b"SQLite format 3\x00" + b"\xff" * 5000])
def test_a_file_that_is_no_database_is_made_again(folder: Path, content: bytes) -> None:
    folder.mkdir()
    (folder / "a.sqlite").write_bytes(content)
    (folder / "a.sqlite-wal").write_bytes(b"rubbish")
    cache = FeatureCache("a", WIDTH, folder=folder)
    assert not cache.problem
    cache.put(clips(2))
    assert_holds(cache, clips(2))
    cache.close()


@pytest.mark.parametrize("opened", [False, True], ids=["before", "while it is open"])
def test_a_damaged_file_is_made_again_when_the_damage_is_met(folder: Path, opened: bool) -> None:
    cache = FeatureCache("a", WIDTH, folder=folder)
    kept = clips(50, 200)
    cache.put(kept)
    cache.close()
    size = (folder / "a.sqlite").stat().st_size
    if opened:
        cache = FeatureCache("a", WIDTH, folder=folder)
    damage(folder / "a.sqlite", 4096, size - 4096)
    if not opened:
        cache = FeatureCache("a", WIDTH, folder=folder)
    assert len(cache.get([key for key, _ in kept])) == 0
    assert cache.missing([key for key, _ in kept]) == {key for key, _ in kept}
    cache.put(kept)
    assert_holds(cache, kept)
    assert not cache.problem
    cache.close()


@pytest.mark.parametrize("kind", ["file in place of the folder", "folder in place of the file"])
def test_a_place_that_cannot_be_written_is_a_problem_and_no_crash(folder: Path, kind: str) -> None:
    if kind.startswith("file"):
        folder.write_text("in the way")
    else:
        (folder / "a.sqlite").mkdir(parents=True)
    cache = FeatureCache("a", WIDTH, folder=folder)
    assert str(folder) in cache.problem
    cache.put(clips(2))
    assert cache.get([clips(1)[0][0]]) == {}
    assert cache.missing([b"x"]) == {b"x"}
    cache.close()
    assert folder.exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes anywhere")
def test_a_read_only_folder_is_a_problem_and_its_files_stay(folder: Path) -> None:
    FeatureCache("a", WIDTH, folder=folder).close()
    folder.chmod(0o500)
    cache = FeatureCache("b", WIDTH, folder=folder)
    assert cache.problem
    cache.close()
    folder.chmod(0o700)
    assert [path.name for path in folder.iterdir()] == ["a.sqlite"]


def test_a_file_that_another_process_holds_locked_stays(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sqlite3

    cache = FeatureCache("a", WIDTH, folder=folder)
    cache.put(clips(2))
    cache.close()
    connect = sqlite3.connect
    monkeypatch.setattr(sqlite3, "connect", lambda path, **_: connect(path, timeout=0))
    holder = connect(folder / "a.sqlite")
    holder.execute("pragma locking_mode=exclusive")
    holder.execute("begin exclusive")
    blocked = FeatureCache("a", WIDTH, folder=folder)
    assert "locked" in blocked.problem
    blocked.close()
    holder.close()
    cache = FeatureCache("a", WIDTH, folder=folder)
    assert_holds(cache, clips(2))
    cache.close()


def test_a_full_disk_is_a_problem_and_no_crash(folder: Path) -> None:
    cache = FeatureCache("a", WIDTH, folder=folder)
    kept = clips(2)
    cache.put(kept)
    assert cache._connection is not None
    cache._connection.execute("pragma max_page_count=10")  # SQLite's error is that of a full disk
    cache.put(clips(5, 2000, 1))
    assert "full" in cache.problem
    assert_holds(cache, kept)
    assert cache.missing([clips(5, 2000, 1)[0][0]])
    cache.close()


WRITER = """
import sys
from pathlib import Path
from typing import Any
import numpy as np
from ssl_core.downstream.feature_cache import FeatureCache

cache, number = FeatureCache("shared", 6, folder=Path(sys.argv[1])), 0
first, last = int(sys.argv[2]), int(sys.argv[3])
for number in range(first, last):
    keys = [b"%015d" % number + b"ab"[half : half + 1] for half in range(2)]
    cache.put([(key, np.full((400, 6), number, np.float32)) for key in keys])
    print(number, cache.problem, flush=True)
"""


def writer(folder: Path, first: int, last: int) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", WRITER, str(folder), str(first), str(last)],
        stdout=subprocess.PIPE,
        text=True,
    )


def kept_pairs(folder: Path, last: int) -> list[int]:
    """Numbers whose two clips are both stored as written; checks that no pair is stored by half."""
    cache = FeatureCache("shared", WIDTH, folder=folder)
    assert not cache.problem
    found = []
    for number in range(last):
        some = cache.get([b"%015d" % number + half for half in (b"a", b"b")])
        assert len(some) in (0, 2), number
        for frames in some.values():
            assert frames.shape == (400, 6)
            assert (frames == number).all()
        found += [number] if some else []
    cache.close()
    return found


@pytest.mark.slow
def test_a_killed_process_leaves_what_it_had_kept(folder: Path) -> None:
    process = writer(folder, 0, 100_000)
    assert process.stdout is not None
    reported = -1
    for line in process.stdout:
        reported = int(line)
        if reported >= 200:
            break
    process.send_signal(signal.SIGKILL)
    process.wait()
    found = kept_pairs(folder, reported + 500)
    assert found[: reported + 1] == list(range(reported + 1))


@pytest.mark.slow
def test_two_processes_share_a_file(folder: Path) -> None:
    both = [writer(folder, 0, 150), writer(folder, 100, 250)]
    for process in both:
        output, _ = process.communicate(timeout=120)
        assert process.returncode == 0
        assert [line.split() for line in output.splitlines()][-1:] == [[output.split()[-1]]]
    assert kept_pairs(folder, 250) == list(range(250))


def test_the_key_is_of_the_content_and_of_what_is_taken_of_it() -> None:
    piece = Piece("x.wav", 0, 3200)
    key = clip_key("ab" * 16, piece)
    assert len(key) == 16
    assert clip_key("ab" * 16, Piece("elsewhere/y.wav", 0, 3200)) == key
    others = [
        clip_key("cd" * 16, piece),
        clip_key("ab" * 16, Piece("x.wav", 1, 3199)),
        clip_key("ab" * 16, Piece("x.wav", 0, 3199)),
        clip_key("", piece),
        clip_key("", Piece("y.wav", 0, 3200)),
    ]
    assert len({key, *others}) == 6


CLIPS = tuple(Clip(Piece(f"{n}.wav", 0, n), label="abc"[n % 3]) for n in (4000, 9000, 6000, 4001))
LABELS = ("a", "b", "c")


@pytest.fixture
def audio(tmp_path: Path) -> Path:
    for clip in CLIPS:
        write_noise(tmp_path / "audio" / clip.piece.path, clip.piece.samples)
    return tmp_path / "audio"


def upstream(seed: int = 0, normalise: bool = False) -> Upstream:
    return Upstream(backbone_of(seed=seed), "random", normalise)


def step_of(
    head: str = "mean-linear",
    *,
    source: Upstream | None = None,
    precision: str = "fp32",
    unfrozen: bool = False,
    extractor: bool = False,
) -> TaskStep:
    recipe = small_recipe(head, train_extractor=extractor)
    model = TaskModel.new(source or upstream(), recipe, 3, 0)
    plan = Plan(batch=4, precision=precision)  # type: ignore[arg-type]
    return TaskStep(model, plan, unfrozen=unfrozen, seed=0)


def loader_of(audio: Path, step: TaskStep, limit: int = MIB) -> ClipLoader:
    return ClipLoader(audio, LABELS, step.recipe, FrozenPart(step), limit)


def loader(audio: Path, head: str = "mean-linear", **settings: Any) -> ClipLoader:
    """The loader of a new step; `settings` are of `step_of`."""
    return loader_of(audio, step_of(head, **settings))


def test_a_file_is_that_of_everything_that_makes_its_features(audio: Path) -> None:
    other = upstream()
    assert isinstance(other.network, Backbone)
    other.network.encoder.layer_norm.bias.data[3] += 1e-6
    variants = [
        loader(audio),
        loader(audio, "x-vector"),
        loader(audio, source=upstream(seed=1)),
        loader(audio, source=other),
        loader(audio, source=upstream(normalise=True)),
        loader(audio, precision="bf16"),
        loader(audio, unfrozen=True),
    ]
    assert len({each.cache.path for each in variants}) == len(variants)
    assert loader(audio).cache.path == variants[0].cache.path
    # Later layers do not change the output of the convolutions.
    same = loader(audio, source=other, unfrozen=True)
    assert same.cache.path == variants[-1].cache.path
    trained = loader(audio, unfrozen=True, extractor=True)
    assert trained.cache.problem == "the cache is switched off"


@pytest.mark.parametrize("head", ["mean-linear", "x-vector"])
def test_what_is_kept_is_what_the_model_makes(audio: Path, head: str) -> None:
    first = loader(audio, head)
    assert first.prepare(CLIPS, show=False) == len(CLIPS)
    assert first.prepare(CLIPS, show=False) == 0
    step = step_of(head)
    again = loader_of(audio, step)
    assert again.prepare(CLIPS, show=False) == 0
    made = again.batch(CLIPS)
    assert made is not None
    batch, used = made
    assert used == list(CLIPS)
    assert batch.samples == [clip.piece.samples for clip in CLIPS]
    assert batch.targets.tolist() == [LABELS.index(clip.label) for clip in CLIPS]
    model = step.model
    for clip, found in zip(CLIPS, batch.inputs, strict=True):
        waveform = again.waveform(clip)
        assert waveform is not None
        with torch.no_grad():
            exact = model.advance(
                torch.from_numpy(waveform)[None], (len(waveform),), "waveform", step.stage
            )[0]
        assert found.shape == exact.shape
        assert (found - exact).abs().max() < 1e-5


def test_waveforms_are_normalised_as_transformers_does(audio: Path) -> None:
    plain, normal = loader(audio), loader(audio, source=upstream(normalise=True))
    extractor = Wav2Vec2FeatureExtractor(do_normalize=True)
    for clip in CLIPS:
        waveform, found = plain.waveform(clip), normal.waveform(clip)
        assert waveform is not None
        assert found is not None
        expected = extractor(waveform, sampling_rate=16_000).input_values[0]
        assert found.dtype == np.float32
        assert np.abs(found - expected).max() < 1e-5
        assert np.abs(found - waveform).max() > 0.1


def other_audio(path: Path, how: str) -> None:
    """Replace a file by other audio of the same size and modification time."""
    status, data = path.stat(), path.read_bytes()
    made = path.with_name("made.wav")
    made.write_bytes(data[:44] + data[:43:-1])
    if how == "in place":
        path.write_bytes(made.read_bytes())
    elif how == "renamed":
        made.replace(path)
    else:
        path.unlink()
        os.link(made, path)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    after = path.stat()
    assert (after.st_size, after.st_mtime_ns) == (status.st_size, status.st_mtime_ns)


@pytest.mark.parametrize("how", ["in place", "renamed", "hard link"])
@pytest.mark.parametrize("settled", [-1.0, 60.0])
def test_a_changed_file_is_computed_anew(
    audio: Path, how: str, settled: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("partitions.fingerprints.SETTLED", settled)
    loader(audio).prepare(CLIPS, show=False)
    other_audio(audio / CLIPS[0].piece.path, how)
    assert loader(audio).prepare(CLIPS, show=False) == 1
    assert loader(audio).prepare(CLIPS, show=False) == 0


def test_the_same_audio_in_another_place_is_not_computed_again(audio: Path) -> None:
    loader(audio).prepare(CLIPS, show=False)
    for path in audio.iterdir():
        os.utime(path, ns=(1, 1))
    audio.rename(audio.with_name("moved"))
    assert loader(audio.with_name("moved")).prepare(CLIPS, show=False) == 0


def test_features_of_audio_that_changed_meanwhile_are_not_kept(
    audio: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, path = loader(audio), audio / CLIPS[1].piece.path
    real = ClipLoader.waveform

    def changing(self: ClipLoader, clip: Clip) -> Any:
        if clip == CLIPS[1]:
            other_audio(path, "renamed")
        return real(self, clip)

    before = path.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(ClipLoader, "waveform", changing)
        assert first.prepare(CLIPS, show=False) == len(CLIPS)
    path.write_bytes(before)
    assert loader(audio).prepare(CLIPS, show=False) == 1


def test_unusable_clips_are_not_counted_as_computed(audio: Path) -> None:
    (audio / CLIPS[1].piece.path).write_bytes(b"no audio")
    for computed in (3, 0):
        each = loader(audio)
        assert each.prepare(CLIPS, show=False) == computed
        assert each.skips == {"unreadable": 1}


def test_stopped_it_keeps_what_was_computed(audio: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ssl_core.downstream.clip_loader.TOGETHER", 1)
    asked: Iterator[bool] = iter((False, False, True))
    with pytest.raises(Interrupted, match="after 2 clips of 4"):
        loader(audio).prepare(CLIPS, show=False, stopped=lambda: next(asked))
    assert loader(audio).prepare(CLIPS, show=False) == 2


@pytest.mark.slow
@pytest.mark.parametrize("trouble", ["limit", "off", "place", "broken"])
def test_training_goes_on_without_room(audio: Path, cache: Path, trouble: str) -> None:
    def trained(step: TaskStep, each: ClipLoader) -> dict[str, torch.Tensor]:
        each.prepare(CLIPS, show=False)
        for epoch in range(2):
            for number, batch in each.epoch(CLIPS, 2, 0, epoch):
                step.update(batch, epoch * 2 + number, {HEAD: 0.01})
        each.cache.close()
        return step.model.head.state_dict()

    step = step_of("x-vector")
    with_room = loader_of(audio, step)
    expected = trained(step, with_room)
    assert not with_room.cache.problem
    path = with_room.cache.path
    if trouble == "place":
        for part in path.parent.iterdir():
            part.unlink()
        path.mkdir()
    if trouble == "broken":
        damage(path, 0, path.stat().st_size)
    limits = {"limit": 30_000, "off": 0}
    if trouble == "limit":
        path.unlink()
    step = step_of("x-vector")
    other = loader_of(audio, step, limits.get(trouble, MIB))
    found = trained(step, other)
    assert bool(other.cache.problem) == (trouble != "broken")
    for name, value in expected.items():
        assert torch.allclose(found[name], value, atol=1e-4), name
