"""Captions to token ids, for training."""
from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ..._optional import require

# Up to so many captions are tokenised before training begins: at 77 ids of four bytes each, 308 MB are kept.
TABLE_LIMIT = 1_000_000


def count_truncated(tokenizer, captions: Sequence[str], token_ids: Tensor) -> int:
    """How many captions the tokenizer cut because they exceed its context.

    Exact for open_clip's SimpleTokenizer. Of another one, rows that fill the whole context are counted: a caption which
    happens to fit to the last place is among them.

    Args:
        captions: T strings.
        token_ids: [T,L], what `tokenizer(captions)` returned.
    """
    length = token_ids.shape[1]
    if isinstance(tokenizer, require("open_clip", extra="train").SimpleTokenizer):
        room = length - 2  # less the marks of start and end
        full = token_ids[:, -1].nonzero()[:, 0].tolist()  # it pads with 0; encoding the others again can be spared
        return sum(len(tokenizer.encode(captions[row])) > room for row in full)
    inner = getattr(tokenizer, "tokenizer", tokenizer)  # this project's and open_clip's wrap one of transformers
    context = getattr(tokenizer, "context_length", None) or getattr(inner, "model_max_length", length)
    if length < context:  # padded to the longest text, which was not cut
        return 0
    padding = getattr(inner, "pad_token_id", None) or 0
    # Where the mark of the end looks like padding, what stands before it tells.
    last = -2 if padding == getattr(inner, "eos_token_id", None) else -1
    return int((token_ids[:, last] != padding).sum())


class TokenTable:
    """The token ids of all captions, made at once, or row by row when asked for if there are more than `TABLE_LIMIT`.

    Attributes:
        truncated: how many captions were cut to the context: of all captions, or of those asked for so far.
    """

    def __init__(self, tokenizer, captions: list[str]):
        self._tokenizer, self._captions, self.truncated = tokenizer, captions, 0
        self._table: Tensor | None = None
        if len(captions) <= TABLE_LIMIT:
            self._table = self._tokenize(captions).int()

    def rows(self, indices: np.ndarray) -> Tensor:
        """int64 [b,L], the ids of captions [b]."""
        if self._table is not None:
            return self._table[torch.from_numpy(indices)].long()
        return self._tokenize([self._captions[index] for index in indices])

    def _tokenize(self, captions: list[str]) -> Tensor:
        token_ids = self._tokenizer(captions)
        self.truncated += count_truncated(self._tokenizer, captions, token_ids)
        return token_ids
