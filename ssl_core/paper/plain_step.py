"""Computes the peak memory of a plain training step from shapes.

A plain step is that of transformers' `Wav2Vec2ForPreTraining` as its example trains it: a whole
batch at once, no checkpointing, attention weights kept, all frames quantised, negatives gathered as
vectors `[negative, batch, frame, feature]`. The paper measured this step in Table 2.

Tensors kept by autograd were counted operation by operation, to 0.3 MiB those of transformers 5.23
on torch 2.11 under FakeTensorMode (`tests/ssl_core/test_table2.py`): 1 to 15 s, fp32 and mixed.
"""

from typing import Literal

from partitions.sampling import SAMPLE_RATE
from ssl_core.planning.parts import ALLOCATOR, Estimate
from ssl_core.wav2vec2.config import ModelConfig

PlainPrecision = Literal["fp32", "mixed"]
"""`mixed`: products in fp16 by autocast; weights, normalisations and loss in fp32."""
Accelerator = Literal["cpu", "cuda"]

_LOSS = ("gathered negatives", "logits")
"""Activations that the backward pass of the loss frees."""


def conv_lengths(config: ModelConfig, samples: int) -> list[int]:
    """Output length of each convolution of the feature extractor; the last counts frames."""
    lengths = []
    for kernel, stride in zip(config.conv_kernel, config.conv_stride, strict=True):
        samples = (samples - kernel) // stride + 1
        lengths.append(samples)
    return lengths


def position_weights(config: ModelConfig) -> int:
    """Number of weights of the positional convolution."""
    group = config.hidden_size // config.num_conv_pos_embedding_groups
    return config.hidden_size * group * config.num_conv_pos_embeddings


def parameter_counts(config: ModelConfig) -> tuple[int, int]:
    """Number of all parameters, and of those that autocast copies to fp16 (linear, convolution)."""
    width, inner = config.hidden_size, config.intermediate_size
    by_layer = config.feat_extract_norm == "layer"
    copied, norms, channels = 0, 0, 1
    for number, (out, kernel) in enumerate(zip(config.conv_dim, config.conv_kernel, strict=True)):
        copied += out * channels * kernel + (out if config.conv_bias else 0)
        norms += 2 * out if by_layer or number == 0 else 0
        channels = out
    codes = config.num_codevector_groups * config.num_codevectors_per_group
    copied += channels * width + width  # projection to the transformer
    norms += 2 * channels + 2 * width
    layer = 4 * (width * width + width) + 2 * width * inner + inner + width
    copied += config.num_hidden_layers * layer
    norms += config.num_hidden_layers * 4 * width
    copied += channels * codes + codes  # quantiser
    copied += (width + 1) * config.proj_codevector_dim
    copied += (config.codevector_dim + 1) * config.proj_codevector_dim
    copied += width  # bias of the positional convolution
    position = position_weights(config) + config.num_conv_pos_embeddings  # direction, length
    codebook = codes * (config.codevector_dim // config.num_codevector_groups)
    masked = width
    return copied + norms + position + codebook + masked, copied


def plain_step(
    config: ModelConfig,
    length: float,
    batch: int,
    precision: PlainPrecision,
    accelerator: Accelerator,
    runtime: int = 0,
    allocator: float = ALLOCATOR,
) -> Estimate:
    """Estimate the peak memory of a plain training step with Adam.

    The peak is the largest of five phases: the end of the forward pass, the backward passes of the
    loss, the quantiser and the extractor, and the optimizer step. Gradients of the previous step
    are not kept (`zero_grad` of torch 2).

    Args:
        config: architecture; all layers run (layerdrop would only need less).
        length: seconds in a crop.
        batch: crops in a batch.
        precision: of matrix products.
        accelerator: a dropout mask takes 1 byte a value on CUDA, the size of its input on a CPU.
        runtime: bytes of the process before the model is built: imports, CUDA context.
        allocator: overhead of allocators, see `ALLOCATOR`.

    Returns:
        Bytes of each part in the largest phase.
    """
    mixed = precision == "mixed"
    kept = kept_activations(config, round(length * SAMPLE_RATE), batch, precision, accelerator)
    parameters, copied = parameter_counts(config)
    weights = 4 * parameters
    fixed = {"runtime": runtime, "parameters": weights, "optimizer state": 2 * weights}
    copies = {"fp16 copies of weights": 2 * copied} if mixed else {}
    frames = batch * config.frames(round(length * SAMPLE_RATE))
    vectors = 4 * frames * (config.num_negatives + 1) * config.proj_codevector_dim
    codes = config.num_codevector_groups * config.num_codevectors_per_group
    lookup = 4 * frames * codes * (config.codevector_dim // config.num_codevector_groups)
    ends = config.codevector_dim + config.proj_codevector_dim
    no_loss = {key: size for key, size in kept.items() if key not in _LOSS}
    position = 4 * position_weights(config)
    extractor = {"conv activations": kept["conv activations"]}
    half = 2 if mixed else 1
    phases = [
        # product of the normalised vectors, and the negatives, which the forward pass still holds
        kept | {"transients": vectors + vectors // half},
        # gradients of both factors and both norms, each [negative, batch, frame, feature]
        kept | {"transients": 4 * vectors},
        # gradients of the expanded sum and of both its factors, each [frame, code, feature], and
        # gradients of targets and predictions
        no_loss | {"transients": 3 * lookup + 16 * frames * ends},
        extractor
        | {"gradients": weights, "transients": position + 32 * frames * config.hidden_size},
        # on CUDA torch's Adam computes the root of all second moments at once
        {"gradients": weights, "transients": weights if accelerator == "cuda" else position},
    ]
    best: dict[str, int] = {}
    for number, phase in enumerate(phases):
        moving = sum(size for key, size in phase.items() if key != "gradients")
        parts = fixed | phase | {"allocator": int(allocator * moving)}
        if number < len(phases) - 1:
            parts |= copies
        if sum(parts.values()) > sum(best.values()):
            best = parts
    return Estimate(best)


def backbone_parameters(config: ModelConfig) -> int:
    """Number of parameters that downstream tasks use: all but quantiser and its projections."""
    width = config.hidden_size
    codes = config.num_codevector_groups * config.num_codevectors_per_group
    quantiser = (config.conv_dim[-1] + 1) * codes
    quantiser += codes * (config.codevector_dim // config.num_codevector_groups)
    projections = (width + config.codevector_dim + 2) * config.proj_codevector_dim
    return parameter_counts(config)[0] - quantiser - projections


def plain_task_step(
    config: ModelConfig,
    length: float,
    batch: int,
    accelerator: Accelerator,
    head: dict[str, int],
    *,
    unfrozen: bool,
    allocator: float = ALLOCATOR,
) -> Estimate:
    """Estimate the peak memory of a plain fine-tuning step with Adam in fp32.

    The model is transformers' `Wav2Vec2Model` under a head, as SpeechBrain's recipes train it: a
    whole batch at once; no graph for the extractor, which they do not train, or a frozen backbone.
    The peak is the largest of four phases: the extractor, one transformer layer, the end of the
    forward pass, and the optimizer step.

    Args:
        config: architecture; all layers run.
        length: seconds in a clip.
        batch: clips in a batch.
        accelerator: a dropout mask takes 1 byte a value on CUDA, the size of its input on a CPU.
        head: bytes of the head's `parameters`, `optimizer state` and `activations` at its peak.
        unfrozen: whether the transformer is trained.
        allocator: overhead of allocators, see `ALLOCATOR`.

    Returns:
        Bytes of each part in the largest phase, above imports and CUDA context.
    """
    samples = round(length * SAMPLE_RATE)
    lengths, width = conv_lengths(config, samples), config.hidden_size
    kept = kept_activations(config, samples, batch, "fp32", accelerator)
    weights = 4 * backbone_parameters(config)
    trained = weights if unfrozen else 0
    fixed = {
        "parameters": weights + head["parameters"],
        "optimizer state": 2 * trained + head["optimizer state"],
    }
    # input and output of the first norm, the largest tensors
    extractor = {"extractor": 2 * 4 * batch * config.conv_dim[0] * lengths[0]}
    frames = batch * lengths[-1]
    scores = frames * lengths[-1] * config.num_attention_heads
    layer = {"transformer": 4 * (2 * scores + frames * (6 * width + 2 * config.intermediate_size))}
    forward = {"head": head["activations"]}
    if unfrozen:
        forward |= {name: kept[name] for name in ("transformer activations", "attention weights")}
    gradients = {"gradients": trained + head["optimizer state"] // 2}
    best: dict[str, int] = {}
    for phase in (extractor, layer, forward, gradients):
        moving = sum(size for name, size in phase.items() if name != "gradients")
        parts = fixed | phase | {"allocator": int(allocator * moving)}
        if sum(parts.values()) > sum(best.values()):
            best = parts
    return Estimate(best)


def kept_activations(
    config: ModelConfig,
    samples: int,
    batch: int,
    precision: PlainPrecision,
    accelerator: Accelerator,
) -> dict[str, int]:
    """Count the bytes that autograd keeps for the backward pass, by part of the model.

    In mixed precision linear layers keep autocast's fp16 copy of their input; norms keep fp32.

    Args:
        config: architecture; all layers run.
        samples: samples in a crop.
        batch: crops in a batch.
        precision: of matrix products.
        accelerator: sets the size of dropout masks, see `plain_step`.
    """
    mixed, cuda = precision == "mixed", accelerator == "cuda"
    size = 2 if mixed else 4

    def mask(rate: float, element: int = 4) -> int:
        """Bytes of a dropout mask for each value of `element` bytes."""
        return (1 if cuda else element) if rate else 0

    lengths = conv_lengths(config, samples)
    frames = batch * lengths[-1]
    channels, width, inner = config.conv_dim[-1], config.hidden_size, config.intermediate_size

    conv = samples * (6 if mixed else 4)  # waveform and input of the first layer
    for number, (dim, positions) in enumerate(zip(config.conv_dim, lengths, strict=True)):
        last = number == len(lengths) - 1
        if number == 0 or config.feat_extract_norm == "layer":
            statistics = 8 * positions if config.feat_extract_norm == "layer" else 8 * dim
            # inputs of norm and GELU, output of GELU
            conv += dim * positions * (8 + (4 if last else size)) + statistics
        else:
            conv += dim * positions * (size + (4 if last else size))

    hidden = mask(config.hidden_dropout, size)
    front = channels * size  # input of the projection
    front += width * (
        mask(config.feat_proj_dropout, size) + 2 * size + 4 + mask(config.hidden_dropout)
    )
    layer = width * (
        (6 if mixed else 4)  # input of query, key and value
        + 3 * size
        + size  # context: input of the output projection
        + 4
        + 4  # inputs of both norms
        + size  # input of the feed-forward network
        + 2 * hidden
    )
    layer += inner * (2 * size + mask(config.activation_dropout, size))
    layer += 2 * 8  # mean and deviation of both norms
    rate = config.attention_dropout
    weights = 4 + (mask(rate) + size if rate else (size if mixed else 0))
    attention = config.num_hidden_layers * config.num_attention_heads * lengths[-1] * weights

    codes = config.num_codevector_groups * config.num_codevectors_per_group
    quantiser = channels * mask(config.feat_quantizer_dropout)
    quantiser += channels * size if mixed or config.feat_quantizer_dropout else 0
    quantiser += codes * (8 + size) + config.codevector_dim * size  # two softmaxes, choice
    candidates, dim = config.num_negatives + 1, config.proj_codevector_dim
    return {
        "conv activations": conv * batch,
        "transformer activations": frames
        * (front + config.num_hidden_layers * layer + width * size)
        + batch * width * size  # the positional convolution computes one extra frame
        + position_weights(config) * size,
        "attention weights": frames * attention,
        "quantiser": frames * quantiser,
        # the vectors, and both factors of the cosine
        "gathered negatives": frames * (3 * 4 * candidates * dim + 4 * dim),
        # norms of both factors, before and after their lower limit; logits; indices
        "logits": frames * (5 * 4 * candidates + 8 * config.num_negatives),
    }


def plain_operations(config: ModelConfig, length: float, batch: int) -> int:
    """Count the operations of products in a step: 3 times those of the forward pass.

    torch's flop counter gives 16 % more for `base` (1005.2 against 863.6 GFLOP for 5 s x 4): it
    counts the weight gradient of a grouped convolution once for each group.

    Args:
        config: architecture; all layers run.
        length: seconds in a crop.
        batch: crops in a batch.
    """
    samples = round(length * SAMPLE_RATE)
    lengths = conv_lengths(config, samples)
    frames, width = lengths[-1], config.hidden_size
    total, channels = 0, 1
    for dim, kernel, positions in zip(config.conv_dim, config.conv_kernel, lengths, strict=True):
        total += positions * dim * channels * kernel
        channels = dim
    codes = config.num_codevector_groups * config.num_codevectors_per_group
    total += (frames + 1) * position_weights(config)
    total += frames * (
        channels * (width + codes) + (config.codevector_dim + width) * config.proj_codevector_dim
    )
    layer = 4 * width * width + 2 * width * config.intermediate_size + 2 * frames * width
    return 3 * 2 * batch * (total + config.num_hidden_layers * frames * layer)
