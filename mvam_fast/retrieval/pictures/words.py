"""Tokens as words: pieces merged, start, end and padding named, for tokenizers of open_clip and of Hugging Face."""
from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class WordAttention(NamedTuple):
    """Attention by word: `words`; `attention` [M,W] to them; `special` [W], which are no words (start, end, padding);
    `named`: False where the tokenizer tells no words, and `words` are the positions of tokens, from 1."""

    words: list[str]
    attention: Tensor
    special: list[bool]
    named: bool


def words_and_attention(tokenizer, caption: str, attention: Tensor) -> WordAttention:
    """A caption's words and each view's attention to them, from attention over token positions [M,L].

    Attention to the pieces of a word is added, and so is that to neighbouring padding. Positions that no view may
    attend to (exactly 0 everywhere) at the end of the text are left out.
    """
    ids = tokenizer([caption])[0].tolist()
    attended = attention.sum(0).nonzero()
    ids = ids[: int(attended.max()) + 1 if len(attended) else 0]
    vocabulary = vocabulary_of(tokenizer)
    if vocabulary is None:
        words, columns = [str(position + 1) for position in range(len(ids))], list(range(len(ids)))
        special = [False] * len(ids)
    else:
        words, columns, special = _merged(vocabulary, ids)
    merged = attention.new_zeros(attention.shape[0], len(words))
    merged.index_add_(1, torch.tensor(columns, device=attention.device), attention[:, : len(ids)])
    return WordAttention(words, merged, special, vocabulary is not None)


def _merged(vocabulary, ids: list[int]) -> tuple[list[str], list[int], list[bool]]:
    """Words, each token's word, and which words are special tokens."""
    groups: list[tuple[str | None, list[int]]] = []
    columns, open_word = [], False
    for token, kind in zip(ids, vocabulary.kinds(ids), strict=True):
        joins = open_word and vocabulary.continues(token) if kind is None else kind == "padding"
        if joins and groups and groups[-1][0] == kind:
            groups[-1][1].append(token)
        else:
            groups.append((kind, [token]))
        columns.append(len(groups) - 1)
        open_word = kind is None and not vocabulary.closes(token)
    words = []
    for kind, tokens in groups:
        count = f" ×{len(tokens)}" if len(tokens) > 1 else ""
        words.append(vocabulary.text(tokens) if kind is None else f"⟨{kind}{count}⟩")
    return words, columns, [kind is not None for kind, _ in groups]


def vocabulary_of(tokenizer):
    """What reads this tokenizer's ids: an object with

    kinds(ids): for each token of a text "start", "end", "padding", another name of a special token, or None;
    continues(token): it may belong to the word before it; closes(token): nothing after it belongs to its word;
    text(tokens): the word that tokens make.

    None for a tokenizer that has neither open_clip's `decoder` nor Hugging Face's `convert_ids_to_tokens`.
    """
    if hasattr(tokenizer, "decoder") and hasattr(tokenizer, "byte_decoder"):
        return _OpenClip(tokenizer)
    for owner in (tokenizer, getattr(tokenizer, "tokenizer", None)):
        if hasattr(owner, "convert_ids_to_tokens"):
            return _HuggingFace(owner)
    return None


class _OpenClip:
    """Byte pairs, each word's last one marked by </w>."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self.special = {token: tokenizer.decoder[token].strip("<>") for token in tokenizer.all_special_ids}
        self.special |= {tokenizer.sot_token_id: "start", tokenizer.eot_token_id: "end"}

    def kinds(self, ids: list[int]) -> list[str | None]:
        return _padded_after_end([self.special.get(token) for token in ids])

    def continues(self, token: int) -> bool:
        return True

    def closes(self, token: int) -> bool:
        return self.tokenizer.decoder[token].endswith("</w>")

    def text(self, tokens: list[int]) -> str:
        letters = "".join(self.tokenizer.decoder[token].removesuffix("</w>") for token in tokens)
        return bytes(self.tokenizer.byte_decoder[letter] for letter in letters).decode(errors="replace")


_MARKS = {"▁": str.startswith, "Ġ": str.startswith, "##": str.startswith, "</w>": str.endswith}


class _HuggingFace:
    """Pieces by the mark that most of the vocabulary has: ▁ or Ġ begins a word, ## goes on with one, </w> ends one.
    Without any, each token is a word."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        pieces = list(tokenizer.get_vocab())
        counts = {mark: sum(has(piece, mark) for piece in pieces) for mark, has in _MARKS.items()}
        self.mark = max(counts, key=counts.get) if any(counts.values()) else None
        self.special = {token: self._piece(token).strip("<>[]|") for token in tokenizer.all_special_ids}
        self.special.pop(getattr(tokenizer, "unk_token_id", None), None)  # an unknown word is a word
        # Where one token has several roles, the last one here counts.
        for role, name in {"cls": "class", "bos": "start", "sep": "end", "eos": "end"}.items():
            token = getattr(tokenizer, f"{role}_token_id", None)
            if token is not None:
                self.special[token] = name
        self.padding = getattr(tokenizer, "pad_token_id", None)

    def _piece(self, token: int) -> str:
        return self.tokenizer.convert_ids_to_tokens([token])[0] or ""

    def kinds(self, ids: list[int]) -> list[str | None]:
        """Padding may share its id with the end of the text: the first is the end then."""
        shared = self.special.get(self.padding) in ("start", "end")
        kinds = ["padding" if t == self.padding and not shared else self.special.get(t) for t in ids]
        if shared:
            return _padded_after_end(kinds)
        return kinds

    def continues(self, token: int) -> bool:
        if self.mark == "##":
            return self._piece(token).startswith("##")
        if self.mark in ("▁", "Ġ"):
            return not self._piece(token).startswith(self.mark)
        return self.mark == "</w>"

    def closes(self, token: int) -> bool:
        return self._piece(token).endswith("</w>") if self.mark == "</w>" else False

    def text(self, tokens: list[int]) -> str:
        pieces = self.tokenizer.convert_ids_to_tokens(tokens)
        if self.mark == "##":  # the tokenizer would put spaces around what has no mark
            return "".join(piece.removeprefix("##") for piece in pieces)
        text = self.tokenizer.convert_tokens_to_string(pieces)  # which makes letters of bytes
        for rest in ("</w>", "▁"):
            text = text.replace(rest, "")
        return "".join(text.split()) or "".join(pieces)


def _padded_after_end(kinds: list[str | None]) -> list[str | None]:
    """What follows the first end of the text is padding, whatever its id would mean."""
    if "end" not in kinds:
        return kinds
    end = kinds.index("end")
    return kinds[: end + 1] + ["padding"] * (len(kinds) - end - 1)
