"""The demo corpus: LibriSpeech's layout, distinct voices, atomic and repeatable builds."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import soundfile

from common.errors import UsageError
from partitions import demo_corpus as demo
from partitions.librispeech import find_utterances
from partitions.recut import recut
from partitions.recut_report import summary
from partitions.speakers import held_out_speakers, partition

pytest.importorskip("espeakng_loader", reason="espeak-ng is an optional extra")


def content(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_layout_and_transcripts() -> None:
    folder = demo.demo_corpus(progress=False, voices=4)
    corpus = find_utterances(folder)
    assert corpus.subsets == ("train-demo",)
    assert corpus.speakers == ("1001", "1002", "1003", "1004")
    assert corpus.skips == {}
    assert corpus.without_transcript == 0
    for utterance in corpus.utterances:
        info = soundfile.info(folder / utterance.path)
        assert (info.samplerate, info.channels, info.subtype) == (16_000, 1, "PCM_16")
        assert 6 < utterance.seconds < 18
        assert utterance.transcript is not None
        assert utterance.transcript.replace(" ", "").isalpha()
        assert utterance.transcript == utterance.transcript.upper()
    assert 4 * 40 < corpus.seconds < 4 * 56
    speakers = (folder / "SPEAKERS.TXT").read_text().splitlines()
    assert [line.split(" | ")[:2] for line in speakers[1:]] == [
        ["1001", "M"],
        ["1002", "F"],
        ["1003", "M"],
        ["1004", "F"],
    ]
    expected = json.loads((folder / "COMPLETE").read_text())
    assert expected["voices"] == 4
    assert expected["utterances"] == len(corpus.utterances)


def test_two_builds_are_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    builds = []
    for name in ("one", "two"):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / name))
        builds.append(content(demo.demo_corpus(progress=False, voices=4)))
    assert builds[0] == builds[1]


def test_an_incomplete_corpus_is_made_again(cache: Path) -> None:
    folder = demo.demo_corpus(progress=False, voices=1)
    before = content(folder)
    assert demo.is_complete(folder)
    next(folder.rglob("*.flac")).unlink()
    (folder.parent / ".demo-corpus-v1-1.killed.partial").mkdir()
    assert not demo.is_complete(folder)
    assert content(demo.demo_corpus(progress=False, voices=1)) == before
    assert sorted(path.name for path in (cache / "shortwave").iterdir()) == [
        ".demo-corpus-v1-1.lock",
        "demo-corpus-v1-1",
    ]


@pytest.mark.parametrize("old", [False, True])
def test_other_audio_of_the_same_size_is_not_taken_for_the_corpus(old: bool) -> None:
    folder = demo.demo_corpus(progress=False, voices=1)
    path = sorted(folder.rglob("*.flac"))[0]
    if old:  # as version 0.1 made it
        counts = json.loads((folder / "COMPLETE").read_text())
        del counts["content"]
        (folder / "COMPLETE").write_text(json.dumps(counts))
    assert demo.is_complete(folder)
    status, data = path.stat(), path.read_bytes()
    path.write_bytes(data[:26] + bytes(16) + data[42:])
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert not demo.is_complete(folder)


def test_processes_that_start_together_share_one_build(cache: Path) -> None:
    code = "from partitions.demo_corpus import demo_corpus; print(demo_corpus(False, 2))"
    command = [sys.executable, "-c", code]
    home = Path(__file__).parents[2]
    both = [
        subprocess.Popen(command, cwd=home, stdout=subprocess.PIPE, text=True) for _ in range(2)
    ]
    folder = cache / "shortwave" / "demo-corpus-v1-2"
    assert [process.communicate()[0].strip() for process in both] == [str(folder)] * 2
    assert demo.is_complete(folder)


def test_a_killed_build_leaves_no_corpus(cache: Path) -> None:
    code = "from partitions.demo_corpus import demo_corpus; demo_corpus(False)"
    home = Path(__file__).parents[2]
    process = subprocess.Popen([sys.executable, "-c", code], cwd=home)
    while not list(cache.rglob("*.flac")):
        assert process.poll() is None
        time.sleep(0.05)
    process.kill()
    process.wait()
    assert not (cache / "shortwave" / "demo-corpus-v1").exists()
    assert len(find_utterances(demo.demo_corpus(False, 1)).speakers) == 1


def test_the_voices_are_over_a_hundred_and_distinct() -> None:
    voices = demo.voices_of(demo.VOICES)
    assert len(voices) == 112
    assert len({voice.name for voice in voices}) == 112
    assert len({voice.speaker for voice in voices}) == 112
    assert len({voice.name.partition("+")[0] for voice in voices}) == 8
    variants: dict[str, list[int]] = {}
    for voice in voices:
        variants.setdefault(voice.name.partition("+")[2], []).append(voice.pitch)
    assert all(abs(first - second) >= 15 for first, second in variants.values())


def test_without_espeak_the_way_out_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "espeakng_loader", None)
    with pytest.raises(UsageError, match=r"pip install shortwave\[demo\], or .* --data DIR"):
        demo.demo_corpus(progress=False, voices=4)


@pytest.mark.parametrize("voices", [0, 113])
def test_number_of_voices(voices: int) -> None:
    with pytest.raises(UsageError, match="has 1 to 112 voices"):
        demo.demo_corpus(progress=False, voices=voices)


@pytest.mark.slow
def test_the_whole_corpus_serves_a_hundred_clients() -> None:
    corpus = find_utterances(demo.demo_corpus(progress=False))
    assert len(corpus.speakers) == 112
    for length, mean in ((1.0, 1.1), (5.0, 5.2), (10.0, 10.4), (15.0, 15.8)):
        manifest = recut(corpus, length)
        row = summary(manifest)
        assert row.mean == pytest.approx(mean, abs=0.01)
        assert row.maximum - row.minimum <= 1
        assert row.speakers == 112
        held_out = held_out_speakers(manifest)
        assert len(partition(manifest, 100, "speaker", 0, held_out)) == 100
