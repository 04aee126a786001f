"""How focused a view is, and how much it overlaps with others: numbers made of attention alone."""
from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


def entropy_share(attention: Tensor) -> Tensor:
    """Entropy of each view's attention [..., M,N] as a share of the largest possible, ln of the number of tokens that
    take part: float64 [..., M], 0 (all on one token) to 1 (the same on all).

    A token takes part if any view gives it weight: masked ones have exactly 0. Where only one does, the share is 0.
    """
    attention = attention.double()
    tokens = (attention > 0).any(-2, keepdim=True).sum(-1)
    entropy = 0.0 - torch.special.xlogy(attention, attention).sum(-1)  # by subtraction: there is no -0 then
    return entropy / tokens.clamp_min(2).double().log()


def view_cosine(attention: Tensor) -> Tensor:
    """Cosine between the attentions of every two views: [..., M,N] → float64 [..., M,M], 1 on the diagonal."""
    unit = torch.nn.functional.normalize(attention.double(), dim=-1)
    return unit @ unit.mT


def mean_to_others(cosine: Tensor) -> Tensor:
    """Mean cosine of each view to the others: [..., M,M] → [..., M]; NaN for a view that is alone."""
    return (cosine.sum(-1) - cosine.diagonal(dim1=-2, dim2=-1)) / (cosine.shape[-1] - 1)


class Ranked(NamedTuple):
    """Views of one input, the most focused first: `order` (indices from 0), and for each in that order its `entropy`
    (share of the largest possible) and its mean cosine to the other views, `overlap` (None for a view that is alone).
    """

    order: list[int]
    entropy: list[float]
    overlap: list[float | None]

    def labels(self) -> list[tuple[str, str, str]]:
        """For each view in order: its name (counted from 1), entropy and overlap as texts."""
        overlaps = ["" if value is None else f"{value:.2f}" for value in self.overlap]
        rows = zip(self.order, self.entropy, overlaps, strict=True)
        return [(f"view {view + 1}", f"{100 * entropy:.0f} %", overlap) for view, entropy, overlap in rows]


def ranked(attention: Tensor) -> Ranked:
    """The views of attention [M,N], sorted by entropy; of equal ones the lower number first."""
    entropy = entropy_share(attention)
    order = entropy.argsort(stable=True)
    overlap = mean_to_others(view_cosine(attention))[order].tolist() if len(order) > 1 else [None]
    return Ranked(order.tolist(), entropy[order].tolist(), overlap)
