"""What MVAM asks of an encoder: the protocol that every tower meets, and what the towers share."""
from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor, nn


class Tokens(NamedTuple):
    """What an encoder hands to the pooling.

    `hidden` [B,N,D]; which of them count: `lengths` [B] or `mask` [B,N] or neither; `norm`: the encoder's final
    LayerNorm if `hidden` is what goes into it (the pooling applies it, fused), None if `hidden` is normalised already;
    `pooled` [B,E]: the encoder's own pooled vector, projected as the encoder does, or None if not asked for.
    """

    hidden: Tensor
    lengths: Tensor | None = None
    mask: Tensor | None = None
    norm: nn.LayerNorm | None = None
    pooled: Tensor | None = None


@runtime_checkable
class TowerAdapter(Protocol):
    """An encoder as MVAM sees it. A tower of your own is an `nn.Module` with these; see docs/models.md.

    Attributes:
        width: D, how wide its tokens are.
        prefix_tokens: how many of its first tokens are no patches (class token, registers); 0 for a text.
        grid: (rows, columns) of the patches that follow them, row by row; None where there is no such grid.
    """

    width: int
    prefix_tokens: int
    grid: tuple[int, int] | None

    def tokens(self, inputs: Tensor | Mapping, need_pooled: bool) -> Tokens:
        """The encoder's last tokens. `inputs`: what the user gave `encode_image` or `encode_text`; `need_pooled`:
        whether `Tokens.pooled` will be read (it is only with `global_view`)."""

    def project(self, views: Tensor) -> Tensor:
        """Views [B,M,D] pooled from the tokens (normalised, if there is a `norm`) → [B,M,E], as the encoder projects
        what it pools itself."""


class Temperature(nn.Module):
    """What is left of a two-stream model where both towers are the user's own."""

    logit_bias = None

    def __init__(self):
        super().__init__()
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))  # as CLIP starts


_MEMBERS = ("width", "prefix_tokens", "grid", "tokens", "project")


def own_tower(tower: nn.Module, argument: str) -> nn.Module:
    """`tower` if it can serve as the MVAM argument of that name; the error says what it lacks."""
    if not isinstance(tower, nn.Module):
        raise TypeError(
            f"{argument} is {type(tower).__name__}; it must be a torch.nn.Module, so that its parameters are trained "
            "and saved with the model"
        )
    lacking = [member for member in _MEMBERS if not hasattr(tower, member)]
    if lacking:
        raise TypeError(
            f"{argument} is a {type(tower).__name__} without {', '.join(lacking)}; "
            "it must be a mvam_fast.towers.TowerAdapter"
        )
    if not isinstance(tower.width, int) or tower.width < 1:
        raise ValueError(f"{argument}.width is {tower.width!r}; it must be an int, at least 1")
    return tower


def leave_to_pooling(hidden: Tensor, norm: nn.Module) -> dict:
    """`hidden` and `norm` of Tokens: a plain LayerNorm is left to the pooling, anything else is applied here."""
    if isinstance(norm, nn.LayerNorm) and norm.elementwise_affine:
        return {"hidden": hidden, "norm": norm}
    return {"hidden": norm(hidden)}


def arguments(inputs: Tensor | Mapping, *names: str) -> tuple[Tensor | None, ...]:
    """The tensors that a tower reads, by the names that transformers gives them; None for those not given.

    A tensor is the first of them. A mapping, such as what a tokenizer or an image processor of transformers returns,
    must have the first and nothing that the tower would not read.
    """
    if isinstance(inputs, Mapping):
        if names[0] not in inputs or inputs.keys() - set(names):
            raise ValueError(f"inputs holds {', '.join(inputs) or 'nothing'}; this tower takes {', '.join(names)}")
        return tuple(inputs.get(name) for name in names)
    if not isinstance(inputs, Tensor):
        raise TypeError(f"inputs is {type(inputs).__name__}; it must be a tensor or a mapping with {', '.join(names)}")
    return inputs, *[None] * (len(names) - 1)


def valid_up_to(lengths: Tensor, attention_mask: Tensor) -> Tensor:
    """Mask [B,L] of the tokens before `lengths` [B] that `attention_mask` [B,L] leaves in."""
    positions = torch.arange(attention_mask.shape[1], device=attention_mask.device)
    return (positions < lengths[:, None]) & attention_mask.bool()
