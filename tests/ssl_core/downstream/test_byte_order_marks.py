"""Texts saved on Windows, with a byte-order mark and CRLF, are read as any other."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from small_corpora import emotions, speech_commands, timers, utterances, voices
from small_models import save_backbone

from common.options import settings_parser
from common.settings import parse, read_yaml
from partitions.librispeech import find_utterances
from partitions.manifest_text import read_manifest, write_manifest
from partitions.recut import recut
from ssl_core.downstream import decoding
from ssl_core.downstream.clips import TaskData
from ssl_core.downstream.finetune_settings import FinetuneSettings
from ssl_core.downstream.task_corpus import read_task
from ssl_core.downstream.task_recipe import recipe_of
from ssl_core.planning.device_profiles import known_profiles
from ssl_core.training import hf_checkpoint as hf
from ssl_core.training.weight_files import read_weights


def as_on_windows(folder: Path, *kinds: str) -> int:
    """Rewrite the text files of a folder; returns how many."""
    files = [file for kind in kinds for file in folder.rglob(kind)]
    for file in files:
        text = file.read_text(encoding="utf-8").replace("\r\n", "\n")
        assert not text.startswith("\ufeff")
        file.write_bytes(b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode())
    return len(files)


def read(task: str, root: Path) -> TaskData:
    return read_task(task, root, recipe_of(task), seed=0, progress=False)


@pytest.mark.parametrize(
    ("task", "make"),
    [
        ("asr", utterances),
        ("slots", timers),
        ("emotion", emotions),
        ("verification", voices),
        ("kws35", speech_commands),
    ],
)
def test_labels_and_transcripts_of_every_corpus(
    tmp_path: Path, task: str, make: Callable[[Path], Path]
) -> None:
    expected = read(task, make(tmp_path / "data"))
    assert as_on_windows(tmp_path / "data", "*.txt", "*.csv")
    assert read(task, tmp_path / "data") == expected


def test_the_first_utterance_of_a_chapter_keeps_its_text(tmp_path: Path) -> None:
    root = utterances(tmp_path / "data")
    as_on_windows(root, "*.trans.txt")
    corpus = find_utterances(root)
    assert corpus.without_transcript == 0
    assert corpus.utterances[0].transcript == "A BAD CAB"


def test_a_manifest(tmp_path: Path) -> None:
    manifest = recut(find_utterances(utterances(tmp_path / "data")), 1.0)
    write_manifest(tmp_path / "manifest.tsv", manifest)
    as_on_windows(tmp_path, "manifest.tsv")
    assert read_manifest(tmp_path / "manifest.tsv") == manifest


def test_settings_recipes_and_device_profiles(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("task: asr\ncheckpoint: random\nseed: 5\n")
    (tmp_path / "recipe.yaml").write_text("batch: 3\n")
    shutil.copy(
        Path(hf.__file__).parents[1] / "planning" / "device_profiles.yaml", tmp_path / "mine.yaml"
    )
    expected = known_profiles(tmp_path / "mine.yaml")
    as_on_windows(tmp_path, "*.yaml")
    assert next(iter(read_yaml(tmp_path / "run.yaml"))) == "task"
    assert known_profiles(tmp_path / "mine.yaml") == expected
    words = ["--config", str(tmp_path / "run.yaml"), "--recipe", str(tmp_path / "recipe.yaml")]
    settings, _ = parse(FinetuneSettings, settings_parser(FinetuneSettings), words)
    assert (settings.task, settings.seed, settings.recipe.batch) == ("asr", 5, 3)


def test_words_of_a_beam_search(tmp_path: Path) -> None:
    (tmp_path / "words.txt").write_text("BAD\nCAB\n")
    as_on_windows(tmp_path, "words.txt")
    assert decoding._listed(str(tmp_path / "words.txt")) == ["BAD", "CAB"]


def test_the_json_of_a_checkpoint(tmp_path: Path) -> None:
    folder = save_backbone(tmp_path / "model")
    expected = hf.load_config(folder)
    (folder / "preprocessor_config.json").write_text('{"do_normalize": true}')
    (folder / "processor_config.json").write_text('{"feature_extractor": {}}')
    shutil.move(folder / "model.safetensors", folder / "model-1.safetensors")
    names = [f'"{name}": "model-1.safetensors"' for name in ("quantizer.codevectors",)]
    index = folder / "model.safetensors.index.json"
    index.write_text(f'{{"weight_map": {{{", ".join(names)}}}}}')
    assert as_on_windows(folder, "*.json") == 4
    assert hf.normalises(folder)
    assert hf.load_config(folder).hidden_size == expected.hidden_size
    assert "quantizer.codevectors" in read_weights(folder)
