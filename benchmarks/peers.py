"""Pretraining steps of transformers and SpeechBrain, and transformers' gradients for given masks,
negatives and noise, for benchmarks and tests to compare with.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import Wav2Vec2Config, Wav2Vec2ForPreTraining
from transformers.models.wav2vec2.modeling_wav2vec2 import (
    _compute_mask_indices,
    _sample_negative_indices,
)

from ssl_core.wav2vec2.chance import Draws
from ssl_core.wav2vec2.config import ModelConfig
from ssl_core.wav2vec2.model import PretrainingModel

Step = Callable[[npt.NDArray[np.float32]], None]
"""Takes one optimizer step on waveforms `[batch, sample]`."""
Builder = Callable[[Path, str], Step]
"""Builds a step from a folder with `config.json` and a precision, `fp32` or `bf16`."""

NO_CHANCE = {
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
    "feat_proj_dropout": 0.0,
    "feat_quantizer_dropout": 0.0,
    "layerdrop": 0.0,
}
"""Rates at which a gradient depends only on masks, negatives and Gumbel noise."""

RATE = 1e-5
"""Learning rate of the peers' steps, as in warm-up; times do not depend on it."""


def transformers_step(folder: Path, precision: str) -> Step:
    """The step of transformers' `run_wav2vec2_pretraining_no_trainer.py`, without its Accelerate.

    Its collator's functions draw masks and negatives. After the backward pass, the example divides
    every gradient by the number of masked frames and logs its norm; here the loss is divided, which
    is equivalent and costs nothing. AdamW is fused, unlike the example's.
    """
    config = Wav2Vec2Config.from_pretrained(folder)
    model = Wav2Vec2ForPreTraining(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.98), fused=True)

    def step(waveforms: npt.NDArray[np.float32]) -> None:
        shape = len(waveforms), int(model._get_feat_extract_output_lengths(waveforms.shape[1]))
        masks = _compute_mask_indices(shape, config.mask_time_prob, config.mask_time_length)
        negatives = _sample_negative_indices(shape, config.num_negatives, mask_time_indices=masks)
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            loss = model(
                torch.from_numpy(waveforms),
                mask_time_indices=torch.tensor(masks, dtype=torch.long),
                sampled_negative_indices=torch.tensor(negatives, dtype=torch.long),
            ).loss
        (loss / int(masks.sum())).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def import_speechbrain() -> Builder:
    """Import SpeechBrain and return the function that builds its step.

    Raises:
        ImportError: it is not installed.
    """
    from speechbrain.core import Brain, Stage
    from speechbrain.integrations.huggingface.wav2vec2 import Wav2Vec2Pretrain

    class Pretraining(Brain):
        """As in `recipes/CommonVoice/self-supervised-learning/wav2vec2/train_hf_wav2vec2.py`."""

        def compute_forward(self, batch: tuple[Tensor, Tensor], stage: Stage) -> Tensor:
            """The loss, a scalar summed over masked frames, of waveforms `[batch, sample]`."""
            outputs, _ = self.modules.wav2vec2(*batch)
            return outputs.loss

        def compute_objectives(self, predictions: Tensor, batch: Any, stage: Stage) -> Tensor:
            """The loss as transformers computed it, a scalar."""
            return predictions

    def build(folder: Path, precision: str) -> Step:
        # This wrapper runs transformers' model of base; the encoder of SpeechBrain's other wav2vec
        # 2.0 recipe, with 8 heads and layer norms, is not base. The wrapper passes an attention
        # mask although nothing is padded, asks for all hidden states, and draws negatives from all
        # frames.
        brain = Pretraining(
            modules={"wav2vec2": Wav2Vec2Pretrain(str(folder), str(folder / "speechbrain"))},
            opt_class=lambda parameters: torch.optim.AdamW(
                parameters, lr=RATE, betas=(0.9, 0.98), eps=1e-9, weight_decay=0.01
            ),
            run_opts={"device": "cpu", "precision": precision},
        )
        brain.on_fit_start()
        brain.modules.train()

        def step(waveforms: npt.NDArray[np.float32]) -> None:
            brain.fit_batch((torch.from_numpy(waveforms), torch.ones(len(waveforms))))

        return step

    return build


def hf_config(config: ModelConfig, **changes: object) -> Wav2Vec2Config:
    """The architecture as a config of transformers, with `changes`."""
    values = {key: value for key, value in config.to_hf().items() if key != "torch_dtype"}
    return Wav2Vec2Config(**{**values, **changes})


def plain_flops(config: ModelConfig, batch: int, samples: int) -> int:
    """Floating-point operations in matrix products and convolutions of a plain step.

    Counted on transformers' model with fake tensors, forward and backward. Loss and masking are
    skipped: they need values, which fake tensors do not have, and contain no such operation.

    Args:
        config: architecture.
        batch: crops.
        samples: in each crop.
    """
    counter = FlopCounterMode(display=False)
    with FakeTensorMode():
        plain = hf_config(config, apply_spec_augment=False, attn_implementation="eager")
        model = Wav2Vec2ForPreTraining(plain).train()
        with counter:
            outputs = model(torch.empty(batch, samples))
            (outputs.projected_states.sum() + outputs.projected_quantized_states.sum()).backward()
    return int(counter.get_total_flops())


def drawn_negatives(draws: Draws, frames: int, negatives: int) -> Tensor:
    """Negatives as indices into all frames of the batch, as transformers takes them.

    Args:
        draws: with masked frames `[batch, masked]` and how often each is a negative of each other,
            `[batch, masked, masked]`.
        frames: in a crop.
        negatives: for each masked frame.

    Returns:
        `[batch, frame, negative]` int64; zeros at frames that are not masked.
    """
    batch = len(draws.masked)
    indices = torch.zeros(batch, frames, negatives, dtype=torch.long)
    for row in range(batch):
        for place, frame in enumerate(draws.masked[row]):
            repeated = torch.repeat_interleave(
                draws.masked[row], draws.multiplicity[row, place].long()
            )
            indices[row, frame] = repeated + row * frames
    return indices


def gradients(model: torch.nn.Module) -> dict[str, Tensor]:
    """The gradient of every parameter by name, each `[...]` in fp64; none may be missing."""
    found = {}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        found[name] = parameter.grad.double()
    return found


def relative(ours: Tensor, theirs: Tensor) -> float:
    """Norm of the difference of two tensors `[...]`, divided by the norm of `theirs`."""
    return float((ours - theirs).norm() / theirs.norm().clamp_min(1e-12))


class Backward(NamedTuple):
    """A backward pass of transformers' model."""

    contrastive: float
    """Nats, summed over masked frames."""
    perplexity: float
    gradients: dict[str, Tensor]


def transformers_backward(
    ours: PretrainingModel,
    waveforms: Tensor,
    draws: Draws,
    temperature: float,
    dtype: torch.dtype = torch.float32,
) -> Backward:
    """Losses and gradients of transformers' model with our weights, masks, negatives and noise.

    Args:
        ours: the model whose weights to use, without dropout.
        waveforms: `[batch, sample]`.
        draws: masks, noise and negatives of these crops; negatives come from the same utterance.
        temperature: of the Gumbel softmax.
        dtype: of all computations.
    """
    config, batch = ours.config, len(waveforms)
    model = Wav2Vec2ForPreTraining(hf_config(config)).train()
    model.load_state_dict(ours.state_dict())
    model = model.to(dtype)
    model.set_gumbel_temperature(temperature)
    frames = config.frames(waveforms.shape[1])
    codes = (config.num_codevector_groups, config.num_codevectors_per_group)
    noise = torch.zeros(batch, frames, *codes, dtype=dtype)
    assert draws.noise is not None
    for row in range(batch):
        noise[row, draws.masked[row]] = draws.noise[row].to(dtype)

    def gumbel(logits: Tensor, tau: float, hard: bool) -> Tensor:
        soft = torch.softmax((logits + noise.view_as(logits)) / tau, dim=-1)
        one_hot = torch.zeros_like(soft).scatter(-1, soft.argmax(-1, keepdim=True), 1.0)
        return one_hot - soft.detach() + soft

    def to_fp32(tensor: Tensor) -> Tensor:
        return tensor if dtype == torch.float64 else tensor.to(torch.float32)

    masks = torch.zeros(batch, frames, dtype=torch.bool).scatter(1, draws.masked, True)
    with (
        mock.patch.object(torch.nn.functional, "gumbel_softmax", gumbel),
        mock.patch.object(torch.Tensor, "float", to_fp32),
    ):
        result = model(
            waveforms.to(dtype),
            mask_time_indices=masks,
            sampled_negative_indices=drawn_negatives(draws, frames, config.num_negatives),
        )
        result.loss.backward()
    return Backward(
        result.contrastive_loss.item(), result.codevector_perplexity.item(), gradients(model)
    )
