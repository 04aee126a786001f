"""transformers' Siglip2MultiheadAttentionPoolingHead: SigLIP's head with a mask of the patches that are there."""
from __future__ import annotations

import torch
from torch import Tensor, nn

from . import siglip
from .classes import FusedPooler

ARGUMENTS = ("hidden_state", "attention_mask")
obstacle, flops = siglip.obstacle, siglip.flops


def recognises(module: nn.Module) -> bool:
    return siglip.is_head(module) and hasattr(module, "num_heads")


def examples(module: nn.Module, generator: torch.Generator) -> list[tuple]:
    ((tokens,),) = siglip.examples(module, generator)
    mask = torch.rand(tokens.shape[:2], generator=generator) > 0.5
    mask[:, 0] = True  # of a sample without any patch the original attends to the padding
    return [(tokens,), (tokens, mask.int())]


def _folds(module: nn.Module, mask: Tensor) -> bool:
    """A mask of tokens as transformers' "sdpa" and "eager" read it; others ignore it or read it in their own way."""
    config = getattr(module, "config", None)
    return mask.dim() == 2 and (config is None or config._attn_implementation in ("sdpa", "eager"))


class Fusion(FusedPooler):
    """hidden_state [B,N,D], attention_mask [B,N] (nonzero = the patch is there) → [B,D]. Other masks run as before."""

    def forward(self, hidden_state: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        if attention_mask is None:
            return siglip.head(self, hidden_state)
        if not _folds(self, attention_mask):
            return super().forward(hidden_state, attention_mask)
        return siglip.head(self, hidden_state, attention_mask.to(hidden_state.device, torch.bool))
