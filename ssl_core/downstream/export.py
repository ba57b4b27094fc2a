"""Exports a fine-tuned model to a directory that transformers opens.

`mean-linear` opens with `Wav2Vec2ForSequenceClassification` (its projection before the mean is the
identity), `linear-ctc` with `Wav2Vec2ForCTC` and `Wav2Vec2CTCTokenizer`. With other heads,
`Wav2Vec2Model` opens the backbone; the head's tensors have the prefix `head.` and the names of
`ssl_core.downstream.heads`. `task.json` holds recipe and labels.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common import atomic, strict_json
from ssl_core.downstream.heads import BLANK
from ssl_core.downstream.task_model import TaskModel
from ssl_core.training import hf_checkpoint as hf
from ssl_core.training.tensor_file import write_tensors
from ssl_core.training.weight_files import WEIGHTS

TASK = "task.json"


def export(
    model: TaskModel, task: str, labels: Sequence[str], path: Path, with_head: bool = True
) -> None:
    """Write a model directory atomically.

    Args:
        model: fine-tuned model.
        task: name of the task.
        labels: classes, or symbols without the blank.
        path: directory to create or replace.
        with_head: whether to export the head too; False for a personal one.

    Raises:
        OSError: such as a full disk.
    """
    tensors = {name: value.detach() for name, value in model.state_dict().items()}
    if not with_head:
        tensors = {name: value for name, value in tensors.items() if not name.startswith("head.")}
    config = _transformers_parts(model, labels, tensors)
    about = {
        "task": task,
        "upstream": model.upstream.name,
        "labels": list(labels),
        "recipe": dataclasses.asdict(model.recipe),
    }
    with atomic.directory(path) as partial:
        write_tensors(partial / WEIGHTS, tensors, metadata={"format": "pt"})
        _write(partial / TASK, about)
        if not config:
            return
        _write(partial / hf.CONFIG, config)
        hf.save_preprocessor(partial, model.upstream.normalise)
        if "vocab_size" in config:
            _write(partial / "vocab.json", _vocabulary(labels))
            _write(
                partial / "tokenizer_config.json",
                {
                    "tokenizer_class": "Wav2Vec2CTCTokenizer",
                    "pad_token": "<pad>",
                    "unk_token": "<unk>",
                    "bos_token": "<s>",
                    "eos_token": "</s>",
                    "word_delimiter_token": "|",
                },
            )


def _write(path: Path, values: dict[str, Any]) -> None:
    path.write_text(
        strict_json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
    )


def _vocabulary(labels: Sequence[str]) -> dict[str, int]:
    tokens = ["<pad>", *("|" if label == " " else label for label in labels)]
    return {token: place for place, token in enumerate([*tokens, "<unk>", "<s>", "</s>"])}


def _transformers_parts(
    model: TaskModel, labels: Sequence[str], tensors: dict[str, Tensor]
) -> dict[str, Any]:
    """The config, empty without a backbone; renames the head in `tensors` as transformers does."""
    if model.wav2vec2 is None:
        return {}
    own = model.wav2vec2.config
    config = own.to_hf() | {"architectures": ["Wav2Vec2Model"]}
    if not any(name.startswith("head.") for name in tensors):
        return config
    if model.recipe.head == "mean-linear":
        size = own.hidden_size
        names = {str(place): label for place, label in enumerate(labels)}
        config |= {
            "architectures": ["Wav2Vec2ForSequenceClassification"],
            "classifier_proj_size": size,
            "use_weighted_layer_sum": False,
            "id2label": names,
            "label2id": {label: int(place) for place, label in names.items()},
        }
        tensors["projector.weight"], tensors["projector.bias"] = torch.eye(size), torch.zeros(size)
        tensors["classifier.weight"] = tensors.pop("head.linear.weight")
        tensors["classifier.bias"] = tensors.pop("head.linear.bias")
    elif model.recipe.head == "linear-ctc":
        spare = len(_vocabulary(labels)) - len(labels) - 1
        weight, bias = tensors.pop("head.linear.weight"), tensors.pop("head.linear.bias")
        config |= {
            "architectures": ["Wav2Vec2ForCTC"],
            "vocab_size": len(labels) + 1 + spare,
            "pad_token_id": BLANK,
            "ctc_loss_reduction": "mean",
        }
        # The special tokens that the tokenizer requires are never predicted.
        tensors["lm_head.weight"] = torch.cat([weight, weight.new_zeros(spare, weight.shape[1])])
        tensors["lm_head.bias"] = torch.cat([bias, bias.new_full((spare,), -1e4)])
    return config
