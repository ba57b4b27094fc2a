"""The whole wav2vec 2.0 for pretraining; parameter names as in `Wav2Vec2ForPreTraining`."""

import itertools
import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ssl_core.wav2vec2 import context, packing
from ssl_core.wav2vec2.chance import Draws
from ssl_core.wav2vec2.config import ModelConfig
from ssl_core.wav2vec2.contrastive import contrastive_loss
from ssl_core.wav2vec2.cpu.products import Linear
from ssl_core.wav2vec2.dropout import Dropout
from ssl_core.wav2vec2.features import FeatureExtractor, normalised
from ssl_core.wav2vec2.precision import at_least_fp32
from ssl_core.wav2vec2.quantizer import Quantizer

QUANTIZED = 2
"""Site (see `keyed_bits`) of the dropout of frames to be quantised."""


class LossParts(NamedTuple):
    """Parts of the loss, summed over crops so that those of micro-batches add up."""

    contrastive: Tensor
    """Contrastive loss in nats, summed over masked frames."""
    penalty: Tensor
    """Mean square of the extractor's output, times the number of masked frames."""
    probabilities: Tensor
    """`[group, entry]`: codebook probabilities, summed over masked frames."""
    correct: Tensor
    """Number of masked frames whose code was identified among the negatives."""
    entropy: Tensor
    """Entropy of codebook probabilities in nats, mean over groups, summed over masked frames."""


class Backbone(nn.Module):
    """The part used downstream: feature extractor, projection and transformer."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.masked_spec_embed = nn.Parameter(torch.empty(config.hidden_size))
        self.feature_extractor = FeatureExtractor(config)
        self.feature_projection = context.FeatureProjection(config)
        self.encoder = context.Encoder(config)

    def forward(self, waveforms: Tensor) -> Tensor:
        """Hidden states without dropout: `[batch, sample]` to `[batch, frame, hidden]`."""
        return self.contextualise(self.feature_extractor(waveforms))

    def extract(self, waveforms: Iterable[Tensor]) -> Tensor:
        """Extract features of clips of `[sample]`: `[batch, frame, channel]`, packed if need be.

        Adjacent clips of equal length are extracted together.
        """
        runs = [torch.stack(list(run)) for _, run in itertools.groupby(waveforms, key=len)]
        extracted = [self.feature_extractor(run) for run in runs]
        if len(extracted) == 1:
            return extracted[0]
        return packing.join([clip for run in extracted for clip in run])

    def contextualise(
        self,
        features: Tensor,
        lengths: Sequence[int] = (),
        seeds: Tensor | None = None,
        keep: Sequence[bool] | None = None,
    ) -> Tensor:
        """Compute hidden states from extracted features.

        Args:
            features: `[batch, frame, channel]`.
            lengths: frames of each packed clip (see `packing`), else empty.
            seeds: `[batch]` int64, one per clip, for dropout; None drops nothing.
            keep: for each layer, whether it runs; None runs all.

        Returns:
            `[batch, frame, hidden]`.
        """
        hidden, _ = self.feature_projection(features, seeds, lengths)
        return self.encoder(at_least_fp32(hidden), keep, seeds, lengths=lengths)


class Undrawn(TorchFunctionMode):
    """Context in which a model is built without initial weights, because all will be loaded.

    It skips `torch.nn.init`, which takes more than a second for `base`. The meta device would too,
    but imports torch's compiler where a norm is computed.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Call `func`, unless it is an initialiser of `torch.nn.init`.

        Args:
            func: the torch function.
            types: types that override it, unused.
            args: its positional arguments.
            kwargs: its keyword arguments.
        """
        kwargs = kwargs or {}
        if getattr(func, "__module__", "") == nn.init.__name__:
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return func(*args, **kwargs)


class PretrainingModel(nn.Module):
    """wav2vec 2.0 with quantiser and the two projections for pretraining."""

    def __init__(self, config: ModelConfig) -> None:
        """Build the model, with initial weights from torch's global generator."""
        super().__init__()
        config.validate()
        self.config = config
        self.wav2vec2 = Backbone(config)
        self.dropout_features = Dropout(config.feat_quantizer_dropout, QUANTIZED)
        self.quantizer = Quantizer(config)
        self.project_hid = Linear(config.hidden_size, config.proj_codevector_dim)
        self.project_q = Linear(config.codevector_dim, config.proj_codevector_dim)
        self._initialise()

    def _initialise(self) -> None:
        context.initialise(self.wav2vec2.encoder, self.config)
        for layer in self.wav2vec2.feature_extractor.conv_layers:
            weight = layer.get_parameter("conv.weight")
            nn.init.kaiming_normal_(weight)
            if self.config.initial_taps == "shared" and weight.shape[1] > 1:
                with torch.no_grad():
                    weight.copy_(weight[:, :, :1] / math.sqrt(weight.shape[2]))
        projection = self.wav2vec2.feature_projection.projection
        bound = math.sqrt(1 / projection.in_features)
        nn.init.uniform_(projection.weight, -bound, bound)
        nn.init.uniform_(projection.bias, -bound, bound)
        nn.init.uniform_(self.wav2vec2.masked_spec_embed)
        nn.init.uniform_(self.quantizer.codevectors)
        # Logits vary as much as those of base at any width. With flatter ones, Gumbel noise would
        # choose the codes, and there would be nothing to predict.
        proj = self.quantizer.weight_proj
        nn.init.normal_(proj.weight, std=math.sqrt(512 / proj.in_features))
        nn.init.zeros_(self.quantizer.weight_proj.bias)

    def features(self, waveforms: Tensor) -> Tensor:
        """Extract features: `[batch, sample]` to `[batch, frame, channel]`.

        Crops are normalised on their own if the model wants that, as a clip is downstream.
        """
        if self.config.do_normalize:
            waveforms = normalised(waveforms)
        return self.wav2vec2.feature_extractor(waveforms)

    def _masked_frames(self, normalised: Tensor, draws: Draws) -> Tensor:
        return self.dropout_features(context.take_frames(normalised, draws.masked), draws.seeds)

    def code_probabilities(self, features: Tensor, draws: Draws) -> Tensor:
        """Codebook probabilities summed over masked frames, `[group, entry]`, without the loss.

        `features`: `[batch, frame, channel]` from `features`.
        """
        normalised = self.wav2vec2.feature_projection.layer_norm(features)
        logits = self.quantizer.logits(self._masked_frames(normalised, draws))
        return torch.softmax(logits, dim=-1).sum((0, 1))

    def loss_parts(self, features: Tensor, draws: Draws, temperature: float | Tensor) -> LossParts:
        """Compute the parts of the pretraining loss.

        Args:
            features: `[batch, frame, channel]` from `features`.
            draws: the random draws for these crops.
            temperature: temperature of the Gumbel softmax.
        """
        penalty = at_least_fp32(features).square().mean() * draws.masked.numel()
        hidden, normalised = self.wav2vec2.feature_projection(features, draws.seeds)
        is_masked = torch.zeros(hidden.shape[:2], dtype=torch.bool, device=hidden.device)
        is_masked = is_masked.scatter(1, draws.masked, True)
        embedding = self.wav2vec2.masked_spec_embed
        hidden = torch.where(is_masked[:, :, None], embedding, at_least_fp32(hidden))
        hidden = self.wav2vec2.encoder(hidden, draws.layer_keep, draws.seeds, draws.masked)
        predictions = self.project_hid(hidden)

        frames = self._masked_frames(normalised, draws)
        quantized = self.quantizer(frames, draws.noise, temperature)
        targets = self.project_q(quantized.vectors)
        pools = draws.multiplicity.shape[:2]
        contrast = contrastive_loss(
            predictions.reshape(*pools, -1),
            targets.reshape(*pools, -1),
            quantized.codes.reshape(pools),
            draws.multiplicity,
            self.config.contrastive_logits_temperature,
        )
        return LossParts(
            contrast.loss, penalty, quantized.probabilities, contrast.correct, quantized.entropy
        )
