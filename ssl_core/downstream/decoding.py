"""CTC decoding: greedy, or a beam search with a lexicon and an n-gram model."""

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from common.errors import UsageError
from ssl_core.downstream.heads import BLANK

Decoder = Callable[[Tensor, Sequence[int]], list[str]]
"""Takes logits `[clip, frame, symbol]` and the frames of each clip, returns a text per clip."""


def greedy(labels: Sequence[str]) -> Decoder:
    """Decode to the most likely symbol of each frame, without repeats and blanks."""

    def decode(logits: Tensor, lengths: Sequence[int]) -> list[str]:
        texts = []
        for row, length in zip(logits.argmax(-1).tolist(), lengths, strict=True):
            best = row[:length]
            kept = [s for s, last in zip(best, [BLANK, *best], strict=False) if s != last]
            texts.append("".join(labels[symbol - 1] for symbol in kept if symbol != BLANK))
        return texts

    return decode


def beam_search(labels: Sequence[str], size: int, words: str = "", ngram: str = "") -> Decoder:
    """Decode with flashlight-text's beam search, through torchaudio's `ctc_decoder`.

    Args:
        labels: symbols without the blank.
        size: hypotheses kept at each frame.
        words: file with one word per line; empty allows any text.
        ngram: word n-gram model for KenLM (ARPA or binary); needs `words`.

    In the lexicon a word ends with a space; the last word of a clip need not.

    Raises:
        UsageError: flashlight-text is not installed, or a file is missing or invalid.
    """
    for option, path in (("--words", words), ("--ngram", ngram)):
        if path and not Path(path).is_file():
            raise UsageError(f"{option} {path}: no such file")
    if ngram and not words:
        raise UsageError("--ngram scores words: give the lexicon with --words")
    lexicon = None
    if words:
        known = set(labels)
        spelled = _listed(words)
        lexicon = {word: [*map(_token, word), _SPACE] for word in spelled if set(word) <= known}
        if not lexicon:
            raise UsageError(f"--words {words}: no word can be spelled in the task's symbols")
    tokens = [_BLANK, *map(_token, labels)]
    added = [token for token in (_SPACE, _UNKNOWN) if token not in tokens]
    tokens += added
    decoder = _decoder(tokens, lexicon, ngram, size)

    def decode(logits: Tensor, lengths: Sequence[int]) -> list[str]:
        frames = torch.tensor(lengths, dtype=torch.int32)
        scores = F.pad(logits.float().log_softmax(-1).cpu(), (0, len(added), 0, 1), value=_NEVER)
        if lexicon is not None:
            # Append a frame that only allows the end of a word.
            scores[range(len(scores)), frames] = _NEVER
            scores[range(len(scores)), frames, tokens.index(_SPACE)] = 0
            frames = frames + 1
        best = [found[0] for found in decoder(scores, frames)]
        if lexicon is not None:
            return [" ".join(found.words) for found in best]
        texts = ["".join(decoder.idxs_to_tokens(found.tokens)) for found in best]
        return [text.replace(_SPACE, " ").strip() for text in texts]

    return decode


_BLANK, _SPACE, _UNKNOWN = "<blank>", "|", "<unk>"
_NEVER = -1e4


def _listed(path: str) -> list[str]:
    """Sorted words of a file with one word per line."""
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--words {path}: not UTF-8 text ({error})") from None
    for number, line in enumerate(lines, 1):
        if len(line.split()) > 1:
            raise UsageError(f"--words {path}:{number}: expected one word, found '{line.strip()}'")
    return sorted({line.strip() for line in lines} - {""})


def _token(symbol: str) -> str:
    return _SPACE if symbol == " " else symbol


def _decoder(tokens: list[str], lexicon: dict[str, list[str]] | None, ngram: str, size: int) -> Any:
    """Make torchaudio's decoder, which reads its lexicon from a file."""
    try:
        from torchaudio.models.decoder import ctc_decoder
    except (ImportError, RuntimeError):  # torchaudio raises the latter
        raise UsageError(
            "a beam search needs flashlight-text: pip install 'shortwave[beam]', or leave --beam "
            "at 0 for greedy decoding"
        ) from None
    with tempfile.NamedTemporaryFile("w", suffix=".txt", encoding="utf-8") as file:
        for word, spelling in (lexicon or {}).items():
            file.write(f"{word} {' '.join(spelling)}\n")
        file.flush()
        try:
            return ctc_decoder(
                lexicon=file.name if lexicon is not None else None,
                tokens=tokens,
                lm=ngram or None,
                beam_size=size,
                blank_token=_BLANK,
                sil_token=_SPACE,
                unk_word=_UNKNOWN,
            )
        except RuntimeError as error:
            if not ngram:
                raise
            raise UsageError(f"--ngram {ngram}: {' '.join(str(error).split())}") from None
