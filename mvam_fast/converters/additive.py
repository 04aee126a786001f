"""Additive attention pooling as in PVSE's PIE-Net: softmax over the tokens of w_2(tanh(w_1 x)) (arXiv 1703.03130).

The class is in no library but copied from project to project, as MultiHeadSelfAttention. It is told by its submodules
w_1, w_2, tanh and softmax and by forward(x, mask=None), where mask [B,N] is True at padding. It returns the pooled
tokens, whose second axis is dropped if there is one head, and the attention [B,N,heads].

The op takes keys = tanh(w_1 x) and codes = w_2. The values are the tokens themselves, so there is no projection to
save; and since the attention is returned too, it is computed besides, by the modules that compute it in the original.
Fused it therefore costs more operations, not less, and is fused only when asked for.
"""
from __future__ import annotations

import torch
from torch import Tensor, nn

from .classes import FusedPooler
from .features import not_linear, owns
from .folding import Flops, pool, with_zero_gradient

ARGUMENTS = ("x", "mask")


def recognises(module: nn.Module) -> bool:
    return owns(module, set(), {"w_1", "w_2", "tanh", "softmax"})


def obstacle(module: nn.Module) -> str:
    if not isinstance(module.softmax, nn.Softmax) or module.softmax.dim != 1:
        return f"softmax is {module.softmax}, not one over the tokens"
    return not_linear(module, "w_1") or not_linear(module, "w_2")


def flops(module: nn.Module) -> Flops:
    width, hidden, heads = module.w_1.in_features, module.w_1.out_features, module.w_2.out_features
    own = 2 * hidden * width + 2 * heads * (hidden + width)
    return Flops(own, own + 2 * heads * hidden, heads)


def examples(module: nn.Module, generator: torch.Generator) -> list[tuple]:
    tokens = torch.randn(3, 11, module.w_1.in_features, generator=generator)
    padding = torch.rand(3, 11, generator=generator) > 0.5
    padding[:, 0] = False  # of a sample that is all padding the original makes NaN
    return [(tokens,), (tokens, padding)]


class Fusion(FusedPooler):
    """x [B,N,D], mask [B,N] (True = padding) → pooled [B,heads,D] ([B,D] if heads is 1), attention [B,N,heads]."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        keys = self.tanh(self.w_1(x))
        logits = self.w_2(keys)
        if mask is not None:
            logits = logits.masked_fill(mask[..., None], float("-inf"))
        codes = with_zero_gradient(self.w_2.weight, self.w_2.bias)
        valid = None if mask is None else mask.logical_not()
        pooled = pool(x, codes, keys=keys, mask=valid, scale=1.0)
        return pooled.squeeze(1) if pooled.shape[1] == 1 else pooled, self.softmax(logits)
