"""The model against transformers: the same weights and chance give the same gradients."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import Wav2Vec2Config, Wav2Vec2ForPreTraining

from ssl_core.step import Weights, combine
from ssl_core.wav2vec2 import hf
from ssl_core.wav2vec2.config import ModelConfig, preset
from ssl_core.wav2vec2.model import Draws, PretrainingModel, draw
from ssl_core.wav2vec2.quantizer import perplexity

NO_CHANCE = {
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
    "feat_proj_dropout": 0.0,
    "feat_quantizer_dropout": 0.0,
    "layerdrop": 0.0,
}


def small(**changes: object) -> ModelConfig:
    """The base architecture with two layers, or changed."""
    values = {**NO_CHANCE, "num_hidden_layers": 2, **changes}
    return ModelConfig(**values)  # type: ignore[arg-type]


CONFIGS = {
    "base": small(),
    "base, all layers": small(num_hidden_layers=12),
    "tiny": preset("tiny"),
    "layer norm": small(feat_extract_norm="layer", do_stable_layer_norm=True, conv_bias=True),
}


def drawn_negatives(draws: Draws, frames: int, negatives: int) -> torch.Tensor:
    """Multiplicities as indices into all frames of the batch, as transformers wants them."""
    batch = len(draws.masked)
    indices = torch.zeros(batch, frames, negatives, dtype=torch.long)
    for row in range(batch):
        for place, frame in enumerate(draws.masked[row]):
            repeated = torch.repeat_interleave(
                draws.masked[row], draws.multiplicity[row, place].long()
            )
            indices[row, frame] = repeated + row * frames
    return indices


def relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm().clamp_min(1e-12))


class Case:
    """A model of ours and the same in transformers, on the same waveforms and chance."""

    def __init__(self, config: ModelConfig, monkeypatch: pytest.MonkeyPatch) -> None:
        self.config, self.monkeypatch = config, monkeypatch
        torch.manual_seed(1)
        self.model = PretrainingModel(config).train()
        rng = np.random.default_rng(2)
        self.waveforms = torch.from_numpy(rng.standard_normal((3, 16_000)).astype(np.float32))
        self.draws = draw(config, 3, 16_000, rng)
        self.temperature = 1.7

    def ours(self, dtype: torch.dtype) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
        config, model = self.config, copy.deepcopy(self.model).to(dtype)
        assert self.draws.noise is not None
        draws = self.draws._replace(
            multiplicity=self.draws.multiplicity.to(dtype), noise=self.draws.noise.to(dtype)
        )
        features = model.features(self.waveforms.to(dtype))
        parts = model.loss_parts(features, draws, self.temperature)
        masked = draws.masked.numel()
        combine(parts, Weights(config.diversity_loss_weight, 0.0, 0.0), masked).backward()
        losses = {
            "contrastive": parts.contrastive.item(),
            "perplexity": perplexity(parts.probabilities.detach() / masked).item(),
        }
        return losses, gradients(model)

    def theirs(self, dtype: torch.dtype) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
        values = self.config.to_hf()
        for name in ("architectures", "torch_dtype"):
            values.pop(name)
        model = Wav2Vec2ForPreTraining(Wav2Vec2Config(**values)).train()
        model.load_state_dict(self.model.state_dict())
        model = model.to(dtype)
        model.set_gumbel_temperature(self.temperature)
        config, draws = self.config, self.draws
        frames = config.frames(self.waveforms.shape[1])
        codes = (config.num_codevector_groups, config.num_codevectors_per_group)
        noise = torch.zeros(3, frames, *codes, dtype=dtype)
        assert draws.noise is not None
        for row in range(3):
            noise[row, draws.masked[row]] = draws.noise[row].to(dtype)

        def gumbel(logits: torch.Tensor, tau: float, hard: bool) -> torch.Tensor:
            soft = torch.softmax((logits + noise.view_as(logits)) / tau, dim=-1)
            one_hot = torch.zeros_like(soft).scatter(-1, soft.argmax(-1, keepdim=True), 1.0)
            return one_hot - soft.detach() + soft

        with self.monkeypatch.context() as patch:
            patch.setattr(torch.nn.functional, "gumbel_softmax", gumbel)
            if dtype == torch.float64:
                patch.setattr(torch.Tensor, "float", lambda tensor: tensor)
            result = model(
                self.waveforms.to(dtype),
                mask_time_indices=torch.zeros(3, frames, dtype=torch.bool).scatter(
                    1, draws.masked, True
                ),
                sampled_negative_indices=drawn_negatives(draws, frames, config.num_negatives),
            )
            result.loss.backward()
        losses = {
            "contrastive": result.contrastive_loss.item(),
            "perplexity": result.codevector_perplexity.item(),
        }
        return losses, gradients(model)


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    found = {}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        found[name] = parameter.grad.double()
    return found


@pytest.mark.parametrize("name", CONFIGS)
def test_loss_parts_and_every_gradient_agree_with_transformers(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same in fp64; in fp32, where each rounds in its own way, as near to that as theirs."""
    case = Case(CONFIGS[name], monkeypatch)
    exact_losses, exact = case.theirs(torch.float64)
    losses, found = case.ours(torch.float64)
    assert found.keys() == exact.keys()
    # A constant added to every key, or to every logit of a code, changes nothing: zero gradients.
    telling = {n for n, value in exact.items() if value.norm() > 1e-6}
    assert {n for n in exact if n not in telling} <= {n for n in exact if n.endswith("k_proj.bias")}
    for part, value in exact_losses.items():
        assert losses[part] == pytest.approx(value, rel=1e-10), part
    for parameter in telling:
        assert relative(found[parameter], exact[parameter]) < 1e-9, parameter
    losses, found = case.ours(torch.float32)
    _, rounded = case.theirs(torch.float32)
    for part, value in exact_losses.items():
        assert losses[part] == pytest.approx(value, rel=1e-5), part
    for parameter in telling:
        theirs = relative(rounded[parameter], exact[parameter])
        assert relative(found[parameter], exact[parameter]) < max(1e-5, 2 * theirs), parameter


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
