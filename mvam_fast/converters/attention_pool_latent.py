"""timm's AttentionPoolLatent (SigLIP and other ViTs with `global_pool="map"`)."""
from __future__ import annotations

import torch
from torch import Tensor, nn

from .classes import FusedPooler
from .features import not_linear, owns, passed_by
from .folding import Flops, attend, pooling_flops

ARGUMENTS = ("x", "attn_mask")
_CHILDREN = {"q", "kv", "q_norm", "k_norm", "proj", "proj_drop", "norm"}


def recognises(module: nn.Module) -> bool:
    parameters = {"latent"} | ({"pos_embed"} if getattr(module, "pos_embed", None) is not None else set())
    return any(owns(module, parameters, _CHILDREN | mlp) for mlp in (set(), {"mlp"}))


def obstacle(module: nn.Module) -> str:
    if not (isinstance(module.q_norm, nn.Identity) and isinstance(module.k_norm, nn.Identity)):
        return "each head of each key is normalised (qk_norm), so that keys are not linear in the tokens"
    return not_linear(module, "kv") or passed_by(module, ("q", "kv", "q_norm", "k_norm"))


def flops(module: nn.Module) -> Flops:
    inner, width = module.kv.out_features // 2, module.kv.in_features
    return pooling_flops(width, inner, module.num_heads, module.latent.shape[1])


def examples(module: nn.Module, generator: torch.Generator) -> list[tuple]:
    length = 11 if module.pos_embed is None else len(module.pos_embed)
    tokens = torch.randn(3, length, module.kv.in_features, generator=generator)
    if not module.fused_attn:  # then a boolean mask is added to the logits as a number: nothing to fold
        return [(tokens,)]
    mask = torch.rand(3, 1, 1, length, generator=generator) > 0.5
    mask[-1] = False
    return [(tokens,), (tokens, mask)]


def _token_mask(module: nn.Module, mask: Tensor, tokens: Tensor) -> Tensor | None:
    """The mask [B,N] if it is boolean and the same for all heads and latents, else None."""
    shape = (1, 1, 1, *mask.shape)[-4:]
    if not (module.fused_attn and mask.dtype == torch.bool and mask.dim() >= 2 and shape[1:3] == (1, 1)):
        return None
    return mask.reshape(shape[0], shape[3]).expand(tokens.shape[:2])


class Fusion(FusedPooler):
    """x [B,N,D], attn_mask bool [..,1,1,N] → [B,out]; [B,latents,out] with pool_type "". Other masks run as before."""

    def forward(self, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        mask = None
        if attn_mask is not None:
            mask = _token_mask(self, attn_mask, x)
            if mask is None:
                return super().forward(x, attn_mask)
        if self.pos_embed is not None:
            x = x + self.pos_embed.unsqueeze(0).to(x.dtype)
        key_weight, value_weight = self.kv.weight.chunk(2)
        value_bias = None if self.kv.bias is None else self.kv.bias.chunk(2)[1]
        queries = self.q(self.latent)[0]
        x = attend(x, queries, key_weight, value_weight, value_bias, heads=self.num_heads, mask=mask)
        x = self.proj_drop(self.proj(x))
        if self.mlp is not None:
            x = x + self.mlp(self.norm(x))
        if self.pool == "token":
            return x[:, 0]
        return x.mean(1) if self.pool == "avg" else x
