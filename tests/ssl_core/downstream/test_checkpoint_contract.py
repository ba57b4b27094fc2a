"""What a checkpoint says about itself is obeyed, or refused by the name of the field."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from small_corpora import speech_commands
from small_models import LAYER_NORM, SMALL, save_backbone
from transformers import (
    Wav2Vec2Config,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2ForCTC,
    Wav2Vec2ForPreTraining,
)

from common.errors import DataError
from common.options import settings_parser
from common.settings import parse
from fl_client import protocol
from fl_client.federation_settings import from_run_config
from fl_client.protocol import ProtocolError
from fl_server.pretraining_job import Pretraining
from ssl_core import finetune, train
from ssl_core.downstream.frozen_part import FrozenPart
from ssl_core.downstream.task_model import load_upstream
from ssl_core.training import checkpoint
from ssl_core.training import hf_checkpoint as hf
from ssl_core.training.central import CentralSettings
from ssl_core.training.weight_files import WEIGHTS
from ssl_core.wav2vec2.config import OF_TRAINING, ModelConfig
from ssl_core.wav2vec2.features import normalised
from ssl_core.wav2vec2.model import PretrainingModel

OTHER = dataclasses.replace(
    LAYER_NORM, layer_norm_eps=1e-3, num_attention_heads=4, layerdrop=0.25, mask_time_prob=0.5,
    num_negatives=7, contrastive_logits_temperature=0.2, do_normalize=True,
)  # fmt: skip
"""An architecture that differs from every preset, in what no shape of a tensor shows too."""


def settings_of(*words: str) -> CentralSettings:
    return parse(CentralSettings, settings_parser(CentralSettings), words)[0]


def rewrite(file: Path, **values: Any) -> None:
    """Change fields of a JSON file."""
    kept = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps(kept | values))


@pytest.fixture
def other(tmp_path: Path) -> Path:
    return save_backbone(tmp_path / "other", OTHER)


def test_a_checkpoint_states_its_normalisation(other: Path, tmp_path: Path) -> None:
    assert hf.load_config(other) == OTHER
    assert "do_normalize" not in json.loads((other / "config.json").read_text())
    assert Wav2Vec2FeatureExtractor.from_pretrained(other).do_normalize
    plain = save_backbone(tmp_path / "plain")
    assert not Wav2Vec2FeatureExtractor.from_pretrained(plain).do_normalize


def test_crops_are_normalised_as_transformers_does(other: Path) -> None:
    rng = np.random.default_rng(0)
    crops = (0.2 + 0.01 * rng.standard_normal((2, 4000))).astype(np.float32)
    expected = Wav2Vec2FeatureExtractor(do_normalize=True)(
        list(crops), sampling_rate=16_000, return_tensors="pt"
    ).input_values
    torch.testing.assert_close(normalised(torch.from_numpy(crops)), expected)
    ours = hf.load_model(other).features(torch.from_numpy(crops))
    theirs = Wav2Vec2ForPreTraining.from_pretrained(other).wav2vec2.feature_extractor(expected)
    frames = theirs.shape[2]
    torch.testing.assert_close(ours[:, :frames], theirs.transpose(1, 2), rtol=1e-3, atol=1e-4)
    # A louder recording with an offset gives the same features.
    again = hf.load_model(other).features(torch.from_numpy(5 * crops - 1))
    torch.testing.assert_close(ours, again, rtol=1e-3, atol=1e-3)


def test_a_central_run_goes_on_with_the_architecture_of_its_checkpoint(
    corpus: Path, other: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    words = [
        "--data", str(corpus), "--model", "tiny", "--checkpoint", str(other), "--length", "1s",
        "--batch", "2", "--updates", "1", "--eval-crops", "2", "--threads", "1",
        "--architecture.layerdrop", "0",
    ]  # fmt: skip
    assert train.main([*words, "--output", str(run)]) == 0
    expected = dataclasses.replace(OTHER, layerdrop=0.0)
    saved = run / "checkpoints" / "update-0000001"
    assert hf.load_config(saved) == expected
    printed = " ".join(capsys.readouterr().err.split())
    assert "layer_norm_eps 0.001 (1e-05)" in printed
    assert "do_normalize True (False)" in printed
    assert "the recipe is that of tiny" in printed
    change = hf.load_weights(saved)["project_q.weight"] - hf.load_weights(other)["project_q.weight"]
    assert 0 < float(change.abs().max()) < 0.01
    second = train.main([*words[:-2], "--output", str(tmp_path / "b"), "--checkpoint", str(saved)])
    assert second == 0
    assert hf.load_config(tmp_path / "b" / "checkpoints" / "update-0000001") == expected


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("layer_norm_eps", 1e-5),
        ("num_attention_heads", 2),
        ("do_normalize", False),
        ("do_stable_layer_norm", False),
        ("feat_extract_norm", "group"),
        ("conv_bias", False),
        ("conv_stride", (5, 2, 2, 2, 2, 2, 1)),
        ("num_codevectors_per_group", 16),
        ("intermediate_size", 64),
    ],
)
def test_settings_that_contradict_the_weights_are_refused_by_name(
    other: Path, name: str, value: object
) -> None:
    assert name not in OF_TRAINING
    config = dataclasses.replace(OTHER, **{name: value})  # type: ignore[arg-type]
    dashed = name.replace("_", "-")
    with pytest.raises(DataError, match=f"its {name} is .*leave architecture.{dashed} out"):
        hf.require_same(config, other)


def test_on_the_command_line_too(other: Path) -> None:
    settings = settings_of("--checkpoint", str(other), "--architecture.layer-norm-eps", "1e-5")
    assert settings.architecture == dataclasses.replace(OTHER, layer_norm_eps=1e-5)
    with pytest.raises(DataError, match=r"layer_norm_eps is 0\.001, that of the settings 1e-05"):
        settings.load_checkpoint(PretrainingModel(settings.architecture))


@pytest.mark.parametrize("name", sorted(OF_TRAINING - {"initial_taps"}))
def test_how_a_model_is_trained_may_be_set_anew(other: Path, name: str) -> None:
    new = {int: 3, float: 0.125}[type(getattr(OTHER, name))]
    hf.require_same(dataclasses.replace(OTHER, **{name: new}), other)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({"adapter_attn_dim": 16}, "adapter_attn_dim 16 is not supported: adapters in the layers"),
        ({"add_adapter": True}, "add_adapter True is not supported: adapters after the backbone"),
        ({"quantization_config": {"load_in_8bit": True}}, "quantization_config .*fp32, fp16"),
        ({"pruned_heads": {"0": [1]}}, "pruned_heads .* all heads"),
        ({"hidden_act": "relu"}, "hidden_act 'relu' is not supported, only gelu"),
        ({"hidden_size": None}, "hidden_size is None; expected as in 768"),
        ({"feat_extract_norm": "batch"}, "feat_extract_norm is 'batch'; expected group or layer"),
        ({"conv_dim": [16, "a"]}, "conv_dim is .*; expected as in"),
        ({"layerdrop": "0"}, "layerdrop is '0'; expected as in 0.05"),
        ({"conv_bias": 1}, "conv_bias is 1; expected as in False"),
        ({"layer_norm_eps": float("inf")}, "layer_norm_eps must be finite"),
        ({"model_type": "hubert"}, "model_type is 'hubert', not wav2vec2"),
    ],
)
def test_what_the_model_cannot_do_is_refused_by_field(
    other: Path, values: dict[str, Any], problem: str
) -> None:
    rewrite(other / "config.json", **values)
    with pytest.raises(DataError, match=problem) as error:
        hf.load_config(other)
    assert str(other) in str(error.value)


def test_adapters_of_peft_and_other_sample_rates_are_refused(other: Path) -> None:
    rewrite(other / "preprocessor_config.json", sampling_rate=8000)
    with pytest.raises(DataError, match="sampling_rate 8000 is not supported, only 16000"):
        load_upstream(str(other), "", 0)
    rewrite(other / "preprocessor_config.json", sampling_rate=16_000)
    rewrite(other / "adapter_config.json", peft_type="LORA")
    with pytest.raises(DataError, match=r"an adapter of PEFT .*merge it"):
        settings_of("--checkpoint", str(other))


def change_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


def test_parts_that_are_not_needed_are_named(other: Path) -> None:
    heads = {"lm_head.weight": torch.ones(3, 32), "classifier.bias": torch.ones(3)}
    change_weights(other, lambda tensors: tensors.update(heads))
    model = PretrainingModel(OTHER)
    assert hf.load_pretrained(model, other) == ("classifier", "lm_head")
    assert settings_of("--checkpoint", str(other)).load_checkpoint(model)[-1] == (
        "not used: classifier, lm_head"
    )
    upstream = load_upstream(str(other), "", 0)
    assert upstream.unused == ("classifier", "lm_head", "project_hid", "project_q", "quantizer")
    assert "not its classifier, lm_head, project_hid, project_q, quantizer;" in upstream.note
    assert upstream.normalise


@pytest.mark.parametrize(
    ("name", "value", "problem"),
    [
        ("wav2vec2.adapter.layers.0.conv.bias", torch.ones(3), "1 unexpected .*adapter.layers"),
        ("wav2vec2.encoder.layers.0.adapter_layer.norm.bias", torch.ones(3), "adapter_layer"),
        ("wav2vec2.encoder.layers.0.attention.q_proj.lora_A.weight", torch.ones(3), "lora_A"),
        ("wav2vec2.encoder.layer_norm.bias", torch.full((32,), torch.nan), "holds NaN or inf"),
        ("wav2vec2.encoder.layer_norm.bias", torch.ones(32, dtype=torch.int8), "is int8; weigh"),
        ("wav2vec2.encoder.layer_norm.bias", torch.ones(31), r"has shape \(31,\), not \(32,\)"),
    ],
)
def test_tensors_that_change_what_is_computed_are_refused_by_every_training(
    other: Path, name: str, value: torch.Tensor, problem: str
) -> None:
    change_weights(other, lambda tensors: tensors.update({name: value}))
    with pytest.raises(DataError, match=problem):
        hf.load_model(other)
    with pytest.raises(DataError, match=problem):
        load_upstream(str(other), "", 0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_fine_tuned_model_is_a_backbone_but_not_a_start_of_pretraining(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    config = Wav2Vec2Config(**SMALL.to_hf() | {"vocab_size": 9})
    tuned = Wav2Vec2ForCTC(config).to(dtype)
    tuned.save_pretrained(tmp_path / "tuned")
    with pytest.raises(DataError, match=r"has no quantizer, project_hid, project_q, .*lm_head"):
        hf.load_model(tmp_path / "tuned")
    upstream = load_upstream(str(tmp_path / "tuned"), "", 0)
    assert upstream.unused == ("lm_head",)
    weights = upstream.network.state_dict()
    assert {value.dtype for value in weights.values()} == {torch.float32}
    projection = tuned.wav2vec2.feature_projection.projection.weight
    assert torch.equal(weights["feature_projection.projection.weight"], projection.float())


def test_fine_tuning_says_what_it_does_not_use(
    other: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [
        "--task", "kws35", "--data", str(speech_commands(tmp_path / "words")), "--checkpoint",
        str(other), "--epochs", "1", "--threads", "1", "--output", str(tmp_path / "run"),
    ]  # fmt: skip
    assert finetune.main(words) == 0
    assert "not its project_hid, project_q, quantizer; the head" in capsys.readouterr().out
    exported = hf.load_config(tmp_path / "run" / "model")
    assert exported == OTHER


def test_a_server_takes_the_architecture_and_tells_its_clients(
    corpus: Path, other: Path, tmp_path: Path
) -> None:
    run = {
        "model": "tiny", "length": "1s", "checkpoint": str(other), "data": str(corpus),
        "eval-crops": 2, "held-out": 0.3,
    }  # fmt: skip
    settings: Any = from_run_config(run)
    job = Pretraining(settings, "")
    assert job.config == OTHER
    lines = job.start()
    assert lines[0] == f"weights of {other}"
    assert "layer_norm_eps 0.001 (1e-05)" in lines[1]
    assert np.isfinite(job.evaluate()["held_out_loss"])
    job.save(tmp_path / "round-00001", {"next_round": 1}, {})
    assert checkpoint.load(tmp_path / "round-00001").config == OTHER
    assert job.restore(tmp_path / "round-00001")[0] == {"next_round": 1}
    # A device that does not have the checkpoint takes what the server sends.
    away: Any = from_run_config(run | {"checkpoint": "/not/on/this/device"})
    assert away.architecture != OTHER
    told = dict(job.told)
    assert protocol.architecture_in(told, away.architecture) == OTHER
    assert protocol.architecture_in({}, away.architecture) == away.architecture


@pytest.mark.parametrize("text", ["{", "[]", '{"model_type": "hubert"}', '{"hidden_size": -1}'])
def test_an_architecture_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(ProtocolError, match="the server's architecture cannot be used"):
        protocol.architecture_in({"architecture": text}, ModelConfig())


def test_one_normalisation_for_clips_and_crops() -> None:
    audio = np.random.default_rng(0).standard_normal(1000).astype(np.float32) + 3

    class Wants:
        normalise = True

    frozen = FrozenPart.__new__(FrozenPart)
    frozen._upstream = Wants()  # type: ignore[assignment]
    found = frozen.normalised(audio)
    assert found.dtype == np.float32
    np.testing.assert_allclose([found.mean(), found.std()], [0, 1], atol=1e-5)
