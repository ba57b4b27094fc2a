"""From the symbols of every frame to text: greedily, or by a beam search with words and n-grams."""

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from partitions.errors import UsageError
from ssl_core.downstream.heads import BLANK

Decoder = Callable[[Tensor, Sequence[int]], list[str]]
"""From logits `[clip, frame, symbol]` and the frames of each clip to texts."""


def greedy(labels: Sequence[str]) -> Decoder:
    """The most likely symbol of each frame, repeats joined, blanks left out."""

    def decode(logits: Tensor, lengths: Sequence[int]) -> list[str]:
        texts = []
        for row, length in zip(logits.argmax(-1).tolist(), lengths, strict=True):
            best = row[:length]
            kept = [s for s, last in zip(best, [BLANK, *best], strict=False) if s != last]
            texts.append("".join(labels[symbol - 1] for symbol in kept if symbol != BLANK))
        return texts

    return decode


def beam_search(labels: Sequence[str], size: int, words: str = "", ngram: str = "") -> Decoder:
    """A beam search by flashlight-text, through torchaudio's `ctc_decoder`.

    Args:
        labels: symbols without the blank.
        size: hypotheses kept at a time.
        words: a file with a word a line; without it any text can be found.
        ngram: an n-gram model of words that KenLM reads (ARPA or binary).

    Raises:
        UsageError: flashlight-text is not installed, or a file is not there.
    """
    for option, path in (("--words", words), ("--ngram", ngram)):
        if path and not Path(path).is_file():
            raise UsageError(f"{option} {path}: no such file")
    if ngram and not words:
        raise UsageError("--ngram scores words: give the words to choose from with --words")
    lexicon = None
    if words:
        listed = Path(words).read_text(encoding="utf-8").split("\n")
        known = set(labels)
        spelled = sorted({word.strip() for word in listed} - {""})
        lexicon = {word: [*map(_token, word), _SPACE] for word in spelled if set(word) <= known}
        if not lexicon:
            raise UsageError(f"--words {words}: no word is made of the task's symbols")
    tokens = [_BLANK, *map(_token, labels)]
    extra = [token for token in (_SPACE, _UNKNOWN) if token not in tokens]
    try:
        decoder = _decoder(tokens + extra, lexicon, ngram, size)
    except ImportError:
        raise UsageError(
            "a beam search needs flashlight-text: pip install 'shortwave[beam]', or leave --beam "
            "at 0 for greedy decoding"
        ) from None

    def decode(logits: Tensor, lengths: Sequence[int]) -> list[str]:
        scores = F.pad(logits.float().log_softmax(-1).cpu(), (0, len(extra)), value=-1e4)
        best = [found[0] for found in decoder(scores, torch.tensor(lengths, dtype=torch.int32))]
        if lexicon is not None:
            return [" ".join(found.words) for found in best]
        texts = ["".join(decoder.idxs_to_tokens(found.tokens)) for found in best]
        return [text.replace(_SPACE, " ").strip() for text in texts]

    return decode


_BLANK, _SPACE, _UNKNOWN = "<blank>", "|", "<unk>"


def _token(symbol: str) -> str:
    return _SPACE if symbol == " " else symbol


def _decoder(tokens: list[str], lexicon: dict[str, list[str]] | None, ngram: str, size: int) -> Any:
    """The library's decoder, which reads its lexicon from a file."""
    from torchaudio.models.decoder import ctc_decoder

    with tempfile.NamedTemporaryFile("w", suffix=".txt", encoding="utf-8") as file:
        for word, spelling in (lexicon or {}).items():
            file.write(f"{word} {' '.join(spelling)}\n")
        file.flush()
        return ctc_decoder(
            lexicon=file.name if lexicon is not None else None,
            tokens=tokens,
            lm=ngram or None,
            beam_size=size,
            blank_token=_BLANK,
            sil_token=_SPACE,
            unk_word=_UNKNOWN,
        )
