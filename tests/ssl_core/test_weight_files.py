"""Weights load in every form in which they are published, and what is something else is named."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import (
    Wav2Vec2Config,
    Wav2Vec2CTCTokenizer,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2ForPreTraining,
    Wav2Vec2Processor,
)

from common.errors import DataError
from ssl_core.training import hf_checkpoint as hf
from ssl_core.training.weight_files import read_weights
from ssl_core.wav2vec2.config import preset

SMALL = {"num_hidden_layers": 2}


@pytest.fixture
def model() -> Wav2Vec2ForPreTraining:
    torch.manual_seed(0)
    return Wav2Vec2ForPreTraining(Wav2Vec2Config(**preset("tiny").to_hf() | SMALL))


def same(found: dict[str, Tensor], model: torch.nn.Module) -> bool:
    expected = model.state_dict()
    return found.keys() == expected.keys() and all(
        torch.equal(value.float(), expected[name].float()) for name, value in found.items()
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("size", ["50GB", "500KB"], ids=["whole", "parts"])
def test_safetensors_in_one_file_and_in_parts(
    model: Wav2Vec2ForPreTraining, tmp_path: Path, dtype: torch.dtype, size: str
) -> None:
    model.to(dtype).save_pretrained(tmp_path, max_shard_size=size)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (size == "500KB")
    assert same(hf.load_weights(tmp_path), model)
    hf.load_model(tmp_path)


@pytest.mark.parametrize("parts", [1, 3])
def test_bin_in_one_file_and_in_parts_with_old_names(
    model: Wav2Vec2ForPreTraining, tmp_path: Path, parts: int
) -> None:
    old = {
        name.replace("parametrizations.weight.original0", "weight_g").replace(
            "parametrizations.weight.original1", "weight_v"
        ): value
        for name, value in model.state_dict().items()
    }
    assert old.keys() != model.state_dict().keys()
    names = sorted(old)
    places: dict[str, str] = {}
    for part in range(parts):
        own = names[part::parts]
        file = "pytorch_model.bin" if parts == 1 else f"pytorch_model-{part}.bin"
        torch.save({name: old[name] for name in own}, tmp_path / file)
        places |= dict.fromkeys(own, file)
    if parts > 1:
        index = {"metadata": {}, "weight_map": places}
        (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    assert same(hf.load_weights(tmp_path), model)


def pointer(folder: Path) -> None:
    text = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 380267417\n"
    (folder / "model.safetensors").write_text(text)


def pointer_as_bin(folder: Path) -> None:
    pointer(folder)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def empty(folder: Path) -> None:
    (folder / "pytorch_model.bin").touch()


def fairseq(folder: Path) -> None:
    torch.save({"model": {"w": torch.ones(1)}, "cfg": {"task": 1}}, folder / "pytorch_model.bin")


def numbers(folder: Path) -> None:
    torch.save({"step": 3, "w": torch.ones(1)}, folder / "pytorch_model.bin")


def page(folder: Path) -> None:
    (folder / "pytorch_model.bin").write_text("<html>Not found</html>")


def cut_short(folder: Path) -> None:
    save_file({"w": torch.ones(1000)}, folder / "model.safetensors")
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[:500])


def lost_part(folder: Path) -> None:
    places = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(places))
    save_file({"a": torch.ones(1)}, folder / "model-1.safetensors")


def lost_tensor(folder: Path) -> None:
    lost_part(folder)
    save_file({"c": torch.ones(1)}, folder / "model-2.safetensors")


def part_elsewhere(folder: Path) -> None:
    places = {"weight_map": {"a": "../model-1.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(places))


def no_index(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text("[]")


@pytest.mark.parametrize(
    ("make", "problem"),
    [
        (lambda _: None, r"is not a checkpoint: it has none of model\.safetensors"),
        (pointer, r"model\.safetensors is a pointer of Git LFS.* `git lfs pull`"),
        (pointer_as_bin, r"pytorch_model\.bin is a pointer of Git LFS"),
        (empty, r"pytorch_model\.bin is empty"),
        (fairseq, r"pytorch_model\.bin is a checkpoint of fairseq; convert it"),
        (numbers, r"pytorch_model\.bin is not a dictionary of tensors"),
        (page, r"pytorch_model\.bin holds more than tensors, or is broken"),
        (cut_short, r"cannot read .*model\.safetensors"),
        (lost_part, r"model-2\.safetensors is missing, part 2 of 2"),
        (lost_tensor, r"names 1 tensors that no file has, such as b"),
        (part_elsewhere, r"names '\.\./model-1\.safetensors', which is not a file beside it"),
        (no_index, r"model\.safetensors\.index\.json is not an index of weights"),
    ],
)
def test_what_is_something_else_is_named(
    tmp_path: Path, make: Callable[[Path], None], problem: str
) -> None:
    make(tmp_path)
    with pytest.raises(DataError, match=problem):
        read_weights(tmp_path)


@pytest.mark.parametrize("wanted", [True, False])
def test_normalisation_is_read_from_either_generation_of_processors(
    tmp_path: Path, wanted: bool
) -> None:
    extractor = Wav2Vec2FeatureExtractor(do_normalize=wanted)
    extractor.save_pretrained(tmp_path / "old")
    assert hf.normalises(tmp_path / "old") == wanted
    (tmp_path / "vocab.json").write_text(json.dumps({"<pad>": 0, "a": 1, "|": 2, "<unk>": 3}))
    tokenizer = Wav2Vec2CTCTokenizer(str(tmp_path / "vocab.json"))
    Wav2Vec2Processor(extractor, tokenizer).save_pretrained(tmp_path / "new")
    assert (tmp_path / "new" / "processor_config.json").exists()
    assert hf.normalises(tmp_path / "new") == wanted
    assert not hf.normalises(tmp_path)


def test_two_files_that_contradict_each_other_are_refused(tmp_path: Path) -> None:
    (tmp_path / "preprocessor_config.json").write_text('{"do_normalize": true}')
    nested = {"feature_extractor": {"do_normalize": False}}
    (tmp_path / "processor_config.json").write_text(json.dumps(nested))
    with pytest.raises(DataError, match="contradict each other in do_normalize"):
        hf.normalises(tmp_path)
    nested["feature_extractor"]["do_normalize"] = True
    (tmp_path / "processor_config.json").write_text(json.dumps(nested))
    assert hf.normalises(tmp_path)
