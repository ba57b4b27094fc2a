"""The model against transformers: equal weights and random draws give equal gradients."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import Wav2Vec2ForPreTraining

from benchmarks.peers import NO_CHANCE, Backward, gradients, relative, transformers_backward
from ssl_core.training import hf_checkpoint as hf
from ssl_core.training.pretraining_loss import Weights, combine
from ssl_core.wav2vec2.chance import draw
from ssl_core.wav2vec2.config import ModelConfig, preset
from ssl_core.wav2vec2.model import PretrainingModel
from ssl_core.wav2vec2.quantizer import perplexity


def small(**changes: object) -> ModelConfig:
    """The base architecture with two layers and the given changes."""
    values = {**NO_CHANCE, "num_hidden_layers": 2, **changes}
    return ModelConfig(**values)  # type: ignore[arg-type]


CONFIGS = {
    "base": small(),
    "base, all layers": small(num_hidden_layers=12),
    "tiny": preset("tiny"),
    "layer norm": small(feat_extract_norm="layer", do_stable_layer_norm=True, conv_bias=True),
}


class Case:
    """Our model and transformers' with the same weights, waveforms and random draws."""

    def __init__(self, config: ModelConfig) -> None:
        self.config = config
        torch.manual_seed(1)
        self.model = PretrainingModel(config).train()
        rng = np.random.default_rng(2)
        self.waveforms = torch.from_numpy(rng.standard_normal((3, 16_000)).astype(np.float32))
        self.draws = draw(config, 3, 16_000, rng)
        self.temperature = 1.7

    def ours(self, dtype: torch.dtype) -> Backward:
        config, model = self.config, copy.deepcopy(self.model).to(dtype)
        assert self.draws.noise is not None
        draws = self.draws._replace(
            multiplicity=self.draws.multiplicity.to(dtype), noise=self.draws.noise.to(dtype)
        )
        features = model.features(self.waveforms.to(dtype))
        parts = model.loss_parts(features, draws, self.temperature)
        masked = draws.masked.numel()
        combine(parts, Weights(config.diversity_loss_weight, 0.0, 0.0), masked).backward()
        return Backward(
            parts.contrastive.item(),
            perplexity(parts.probabilities.detach() / masked).item(),
            gradients(model),
        )

    def theirs(self, dtype: torch.dtype) -> Backward:
        return transformers_backward(
            self.model, self.waveforms, self.draws, self.temperature, dtype
        )


@pytest.mark.parametrize("name", CONFIGS)
def test_loss_parts_and_every_gradient_agree_with_transformers(name: str) -> None:
    """Equal in fp64; in fp32, where rounding differs, at most twice as far from it as theirs."""
    case = Case(CONFIGS[name])
    exact, found = case.theirs(torch.float64), case.ours(torch.float64)
    assert found.gradients.keys() == exact.gradients.keys()
    # A constant added to all keys, or to all logits of a code, has no effect: zero gradients.
    telling = {n for n, value in exact.gradients.items() if value.norm() > 1e-6}
    silent = exact.gradients.keys() - telling
    assert silent <= {n for n in exact.gradients if n.endswith("k_proj.bias")}
    assert found[:2] == pytest.approx(exact[:2], rel=1e-10)
    for parameter in telling:
        error = relative(found.gradients[parameter], exact.gradients[parameter])
        assert error < 1e-9, parameter
    rounded, found = case.theirs(torch.float32), case.ours(torch.float32)
    assert found[:2] == pytest.approx(exact[:2], rel=1e-5)
    for parameter in telling:
        theirs = relative(rounded.gradients[parameter], exact.gradients[parameter])
        error = relative(found.gradients[parameter], exact.gradients[parameter])
        assert error < max(1e-5, 2 * theirs), parameter


def test_base_has_the_papers_size_and_tiny_is_small() -> None:
    sizes = {
        name: sum(p.numel() for p in PretrainingModel(preset(name)).parameters())
        for name in ("base", "tiny")
    }
    assert sizes == {"base": 95_044_608, "tiny": 1_956_608}


def test_checkpoints_pass_between_here_and_transformers(tmp_path: Path) -> None:
    folder = tmp_path
    torch.manual_seed(0)
    ours = PretrainingModel(preset("tiny"))
    (folder / "a").mkdir()
    hf.save_model(folder / "a", ours.config, ours.state_dict())
    theirs, info = Wav2Vec2ForPreTraining.from_pretrained(folder / "a", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    theirs.save_pretrained(folder / "b")
    back = hf.load_model(folder / "b")
    for name, value in ours.state_dict().items():
        assert torch.equal(value, back.state_dict()[name]), name
    waveform = torch.randn(1, 16_000)
    with torch.inference_mode():
        expected = theirs.eval().wav2vec2(waveform).last_hidden_state
        assert relative(ours.eval().wav2vec2(waveform), expected) < 1e-5
