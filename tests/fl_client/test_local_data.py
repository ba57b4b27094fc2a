"""A client's audio: its own part, never a held-out speaker, whatever way it is chosen."""

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import pytest

from common.errors import DataError, UsageError
from common.units import Seconds
from fl_client.client_state import ClientState
from fl_client.federation_settings import PretrainingFederation
from fl_client.local_data import client_audio, held_out, load_manifest
from partitions.speakers import How


@pytest.fixture
def settings(corpus: Path) -> PretrainingFederation:
    return PretrainingFederation(data=corpus, length=Seconds(1), model="tiny", held_out=0.2)


def speakers(node: dict[str, Any], settings: PretrainingFederation) -> set[str]:
    audio = client_audio(node, settings)
    return {audio.manifest.sequences[i].speaker for i in audio.indices}


@pytest.mark.parametrize("how", ["speaker", "iid", "skewed"])
def test_parts_share_nothing_and_have_no_held_out_speaker(
    how: How, settings: PretrainingFederation
) -> None:
    settings = dataclasses.replace(settings, partition=how)
    manifest = load_manifest(settings.data, (), 1.0, "")
    excluded = set(held_out(manifest, settings))
    assert len(excluded) >= 2
    seen: list[int] = []
    for number in range(4):
        audio = client_audio({"partition-id": number, "num-partitions": 4}, settings)
        assert audio.key == number
        assert not {manifest.sequences[i].speaker for i in audio.indices} & excluded
        seen += audio.indices.tolist()
    assert len(seen) == len(set(seen))
    everyone = [i for i, s in enumerate(manifest.sequences) if s.speaker not in excluded]
    assert sorted(seen) == everyone


def test_a_device_without_a_part_has_all_but_the_held_out(settings: PretrainingFederation) -> None:
    manifest = load_manifest(settings.data, (), 1.0, "")
    excluded = set(held_out(manifest, settings))
    node = {"client-key": 77, "data": str(settings.data)}
    assert client_audio(node, settings).key == 77
    assert speakers(node, settings) == set(manifest.speakers) - excluded


def test_chosen_speakers_must_be_there_and_not_held_out(settings: PretrainingFederation) -> None:
    manifest = load_manifest(settings.data, (), 1.0, "")
    excluded = held_out(manifest, settings)
    free = sorted(set(manifest.speakers) - set(excluded))
    assert speakers({"speakers": f"{free[0]}, {free[1]}"}, settings) == set(free[:2])
    with pytest.raises(UsageError, match="not in"):
        client_audio({"speakers": "99"}, settings)
    with pytest.raises(UsageError, match="held out"):
        client_audio({"speakers": excluded[0]}, settings)


def test_a_device_has_its_own_corpus(settings: PretrainingFederation, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="elsewhere"):
        client_audio({"data": str(tmp_path / "elsewhere")}, settings)


def test_speakers_that_a_run_holds_out_stay_held_out_when_the_corpus_changes(
    settings: PretrainingFederation,
    corpus: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    state = ClientState(tmp_path / "state", "run", 77)
    shutil.copytree(corpus, tmp_path / "corpus")
    node = {"client-key": 77, "data": str(tmp_path / "corpus")}

    def heard(state: ClientState | None) -> set[str]:
        load_manifest.cache_clear()  # every round is another process
        audio = client_audio(node, settings, state)
        return {audio.manifest.sequences[i].speaker for i in audio.indices}

    first = heard(state)
    held = set(map(str, range(1, 9))) - first
    assert len(held) == 2
    folder = tmp_path / "corpus" / "train-small"
    for speaker in range(11, 41):
        (folder / f"{speaker}" / "1").mkdir(parents=True)
        shutil.copy(
            folder / "1" / "1" / "1-1-0000.flac",
            folder / f"{speaker}" / "1" / f"{speaker}-1-0000.flac",
        )
    assert heard(None) & held  # what the corpus alone would give
    assert not caplog.messages
    assert heard(state) == first | set(map(str, range(11, 41)))
    assert (
        "has changed since the run began; the speakers held out then still are (2)"
        in (caplog.messages[0])
    )
    assert heard(ClientState(tmp_path / "state", "another-run", 77)) & held
    shutil.rmtree(folder / min(first))
    assert not heard(state) & held
    (state.folder / "split.json").write_text("{")
    with pytest.raises(DataError, match=r"split.json cannot be read .*: put it back, or delete"):
        heard(state)
