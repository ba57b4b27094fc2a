"""Models to and from transformers: the same logits, the same texts, or a clear error."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_models import HEADS, LAYER_NORM, SMALL, backbone_of, noise, save_backbone, task_model
from torch import Tensor
from transformers import (
    Wav2Vec2Config,
    Wav2Vec2CTCTokenizer,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2ForCTC,
    Wav2Vec2ForPreTraining,
    Wav2Vec2ForSequenceClassification,
    Wav2Vec2Model,
)

from common.errors import DataError, UsageError
from ssl_core.downstream.corpora import asr
from ssl_core.downstream.decoding import greedy
from ssl_core.downstream.export import export
from ssl_core.downstream.task_model import LogMel, TaskModel, load_upstream
from ssl_core.downstream.task_recipe import recipe_of
from ssl_core.wav2vec2.config import ModelConfig
from ssl_core.wav2vec2.model import Backbone

LENGTHS = (16_000, 5_000)
SPREAD = 40
CONFIGS = pytest.mark.parametrize("config", [SMALL, LAYER_NORM], ids=["group norm", "layer norm"])


def our_logits(model: TaskModel, waveform: Tensor) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model.predict(waveform[None], (len(waveform),), "waveform").logits
        return logits


def opened(kind: Any, folder: Path) -> Any:
    """A transformers model that uses every tensor of the directory and misses none."""
    model, info = kind.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["mismatched_keys"]
    unexpected = {name for name in info["unexpected_keys"] if not name.startswith("head.")}
    assert not unexpected
    return model.eval()


@CONFIGS
def test_classes_open_in_transformers(config: ModelConfig, tmp_path: Path) -> None:
    labels = ("yes", "no", "up", "über", "off")
    model = task_model("mean-linear", len(labels), config)
    export(model, "kws12", labels, tmp_path / "model")
    theirs = opened(Wav2Vec2ForSequenceClassification, tmp_path / "model")
    for samples in LENGTHS:
        with torch.no_grad():
            expected = theirs(noise(samples)[None]).logits
        assert (our_logits(model, noise(samples)) - expected).abs().max() < 1e-5
    assert theirs.config.id2label == dict(enumerate(labels))
    assert theirs.config.label2id == {label: place for place, label in enumerate(labels)}


@CONFIGS
def test_transcribers_open_in_transformers_with_their_tokenizer(
    config: ModelConfig, tmp_path: Path
) -> None:
    model = task_model("linear-ctc", len(asr.LABELS), config)
    model.head.get_parameter("linear.weight").data.mul_(
        SPREAD
    )  # so that many symbols are predicted
    export(model, "asr", asr.LABELS, tmp_path / "model")
    theirs = opened(Wav2Vec2ForCTC, tmp_path / "model")
    tokenizer = Wav2Vec2CTCTokenizer.from_pretrained(tmp_path / "model")
    texts = []
    for samples in LENGTHS:
        ours = our_logits(model, noise(samples))
        with torch.no_grad():
            expected = theirs(noise(samples)[None]).logits
        assert (ours - expected[..., : len(asr.LABELS) + 1]).abs().max() < SPREAD * 1e-5
        assert expected.argmax(-1).max() <= len(asr.LABELS)
        text = greedy(asr.LABELS)(ours, [ours.shape[1]])[0]
        # Their tokenizer strips spaces at the ends and merges repeated ones.
        assert tokenizer.batch_decode(expected.argmax(-1)) == [" ".join(text.split())]
        texts.append(text)
    assert len(texts[0]) > 5
    assert tokenizer("IT'S A").input_ids == [asr.LABELS.index(s) + 1 for s in "IT'S A"]


def test_symbols_of_slots_are_in_the_vocabulary(tmp_path: Path) -> None:
    labels = (" ", "a", "é", "\ue000", "\ue0ff")
    model = task_model("linear-ctc", len(labels))
    export(model, "slots", labels, tmp_path / "model")
    vocabulary = json.loads((tmp_path / "model" / "vocab.json").read_text(encoding="utf-8"))
    assert [symbol for symbol, place in vocabulary.items() if 0 < place <= 5] == [
        "|",
        *labels[1:],
    ]
    tokenizer = Wav2Vec2CTCTokenizer.from_pretrained(tmp_path / "model")
    assert tokenizer.decode([2, 4, 0, 3, 3, 0, 3, 5]) == "a\ue000éé\ue0ff"


@pytest.mark.parametrize("head", ["lstm-ctc", "x-vector"])
def test_other_heads_leave_a_backbone_that_opens(head: str, tmp_path: Path) -> None:
    model = task_model(head)
    export(model, HEADS[head], "abcde", tmp_path / "model")
    theirs = opened(Wav2Vec2Model, tmp_path / "model")
    with torch.no_grad():
        expected = theirs(noise(9_000)[None]).last_hidden_state
        assert isinstance(model.upstream.network, Backbone)
        assert (model.upstream.network(noise(9_000)[None]) - expected).abs().max() < 1e-5
    stored = load_file(tmp_path / "model" / "model.safetensors")
    for name, value in model.head.state_dict().items():
        assert torch.equal(stored[f"head.{name}"], value)


@pytest.mark.parametrize("head", HEADS)
def test_an_exported_backbone_is_an_upstream_again(head: str, tmp_path: Path) -> None:
    model = task_model(head)
    export(model, HEADS[head], "abcde", tmp_path / "model")
    again = load_upstream(str(tmp_path / "model"), "base", 0)
    assert again.digest("frames") == model.upstream.digest("frames")
    about = json.loads((tmp_path / "model" / "task.json").read_text())
    assert (about["task"], about["labels"]) == (HEADS[head], list("abcde"))
    assert about["recipe"]["head"] == head


def test_a_personal_head_is_not_exported(tmp_path: Path) -> None:
    export(task_model("mean-linear"), "kws12", "abcde", tmp_path / "model", with_head=False)
    names = load_file(tmp_path / "model" / "model.safetensors").keys()
    assert all(name.startswith("wav2vec2.") for name in names)
    opened(Wav2Vec2Model, tmp_path / "model")


def test_log_mel_leaves_a_head_alone(tmp_path: Path) -> None:
    upstream = load_upstream("logmel", "base", 0)
    assert isinstance(upstream.network, LogMel)
    model = TaskModel.new(upstream, recipe_of("kws12"), 5, 0)
    export(model, "kws12", "abcde", tmp_path / "model")
    assert sorted(path.name for path in (tmp_path / "model").iterdir()) == [
        "model.safetensors",
        "task.json",
    ]


def test_normalising_passes_through(tmp_path: Path) -> None:
    model = task_model("mean-linear")
    model.upstream = model.upstream._replace(normalise=True)
    export(model, "kws12", "abcde", tmp_path / "model")
    assert load_upstream(str(tmp_path / "model"), "base", 0).normalise
    extractor = Wav2Vec2FeatureExtractor.from_pretrained(tmp_path / "model")
    assert extractor.do_normalize
    assert extractor.sampling_rate == 16_000


def test_an_export_replaces_the_one_before_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export(task_model("x-vector"), "speaker", "abcde", tmp_path / "model")
    export(task_model("mean-linear"), "kws12", "abcde", tmp_path / "model")
    assert json.loads((tmp_path / "model" / "task.json").read_text())["task"] == "kws12"

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("ssl_core.downstream.export.write_tensors", full)
    with pytest.raises(OSError, match="No space left"):
        export(task_model("x-vector"), "speaker", "abcde", tmp_path / "model")
    assert json.loads((tmp_path / "model" / "task.json").read_text())["task"] == "kws12"
    assert [path.name for path in tmp_path.iterdir() if path.name != "cache"] == ["model"]


def hidden(network: object, waveform: Tensor) -> Tensor:
    assert isinstance(network, Backbone)
    with torch.no_grad():
        return network(waveform[None])


@pytest.mark.parametrize("kind", [Wav2Vec2Model, Wav2Vec2ForPreTraining, Wav2Vec2ForCTC])
def test_any_wav2vec2_of_transformers_is_an_upstream(kind: type, tmp_path: Path) -> None:
    config = Wav2Vec2Config(
        conv_dim=(16,) * 7,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=48,
        num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=4,
        vocab_size=9,
        codevector_dim=16,
        proj_codevector_dim=16,
        num_codevectors_per_group=8,
    )
    torch.manual_seed(1)
    theirs = kind(config).eval()
    theirs.save_pretrained(tmp_path / "model")
    Wav2Vec2FeatureExtractor(do_normalize=True).save_pretrained(tmp_path / "model")
    upstream = load_upstream(str(tmp_path / "model"), "base", 0)
    assert upstream.normalise
    assert upstream.name == str(tmp_path / "model")
    bare = theirs if kind is Wav2Vec2Model else theirs.wav2vec2
    with torch.no_grad():
        expected = bare(noise(9_000)[None]).last_hidden_state
    assert (hidden(upstream.network, noise(9_000)) - expected).abs().max() < 1e-5
    (tmp_path / "model" / "preprocessor_config.json").unlink()
    assert not load_upstream(str(tmp_path / "model"), "base", 0).normalise


def test_the_embedding_of_the_mask_may_be_missing(tmp_path: Path) -> None:
    folder = save_backbone(tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    del weights["wav2vec2.masked_spec_embed"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    network = load_upstream(str(folder), "base", 0).network
    assert torch.equal(hidden(network, noise(9_000)), hidden(backbone_of(), noise(9_000)))


@CONFIGS
def test_this_projects_checkpoints_are_upstreams(config: ModelConfig, tmp_path: Path) -> None:
    upstream = load_upstream(str(save_backbone(tmp_path / "model", config)), "base", 0)
    assert not upstream.normalise
    expected = hidden(backbone_of(config), noise(9_000))
    assert torch.equal(hidden(upstream.network, noise(9_000)), expected)


def test_half_precision_weights_and_an_old_file_are_read(tmp_path: Path) -> None:
    folder = save_backbone(tmp_path / "model")
    weights = {
        name.replace("parametrizations.weight.original0", "weight_g").replace(
            "parametrizations.weight.original1", "weight_v"
        ): value.half()
        for name, value in load_file(folder / "model.safetensors").items()
    }
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    upstream = load_upstream(str(folder), "base", 0)
    difference = hidden(upstream.network, noise(9_000)) - hidden(backbone_of(), noise(9_000))
    assert 0 < difference.abs().max() < 0.05
    assert difference.dtype == torch.float32


def test_random_backbones_follow_the_seed() -> None:
    digests = [load_upstream("random", "tiny", seed).digest("frames") for seed in (0, 0, 1)]
    assert digests[0] == digests[1] != digests[2]
    with pytest.raises(UsageError, match="did you mean 'tiny'"):
        load_upstream("random", "tinny", 0)


Change = Callable[[Path, dict[str, Tensor]], None]
LAYER = "wav2vec2.encoder.layers.1.final_layer_norm.bias"


def missing(folder: Path, weights: dict[str, Tensor]) -> None:
    del weights[LAYER]


def unexpected(folder: Path, weights: dict[str, Tensor]) -> None:
    weights["wav2vec2.encoder.layers.2.final_layer_norm.bias"] = torch.zeros(32)


def wrong_shape(folder: Path, weights: dict[str, Tensor]) -> None:
    weights[LAYER] = torch.zeros(33)


def other_model(folder: Path, weights: dict[str, Tensor]) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "hubert"}))


def bad_preprocessor(folder: Path, weights: dict[str, Tensor]) -> None:
    (folder / "preprocessor_config.json").write_text("[1, 2")


def list_as_preprocessor(folder: Path, weights: dict[str, Tensor]) -> None:
    (folder / "preprocessor_config.json").write_text("[1, 2]")


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (missing, r"does not fit the model: 1 missing \(such as encoder\.layers\.1\.final"),
        (unexpected, r"does not fit the model: 1 unexpected \(such as encoder\.layers\.2"),
        (wrong_shape, r"layers\.1\.final_layer_norm\.bias has shape \(33,\), not \(32,\)"),
        (other_model, "model_type is 'hubert', not wav2vec2"),
        (bad_preprocessor, r"preprocessor_config\.json cannot be read"),
        (list_as_preprocessor, r"preprocessor_config\.json cannot be read"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_an_error(
    change: Change, problem: str, tmp_path: Path
) -> None:
    folder = save_backbone(tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    change(folder, weights)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(DataError, match=problem):
        load_upstream(str(folder), "base", 0)


@pytest.mark.parametrize("left", ["nothing", "config", "weights", "cut weights"])
def test_what_is_no_checkpoint_is_an_error(left: str, tmp_path: Path) -> None:
    folder = save_backbone(tmp_path / "model")
    problem = "is not a checkpoint"
    if left == "nothing":
        shutil.rmtree(folder)
    elif left == "config":
        (folder / "model.safetensors").unlink()
    elif left == "weights":
        (folder / "config.json").unlink()
    else:
        data = (folder / "model.safetensors").read_bytes()
        (folder / "model.safetensors").write_bytes(data[:-100])
        problem = "cannot read .*safetensors"
    with pytest.raises(DataError, match=problem):
        load_upstream(str(folder), "base", 0)
