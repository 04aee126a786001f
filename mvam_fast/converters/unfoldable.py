"""Poolers that are known and do not fold, with the reason."""
from __future__ import annotations

from torch import nn

from .features import owns

_PERCEIVER = (
    "its keys are the tokens and the latents together, and after the first layer the latents, which are the queries, "
    "differ from sample to sample: codes for every sample, latent and head cost as much as the projections they save"
)
# By submodules: open_flamingo's and lucidrains' PerceiverAttention; transformers' IdeficsPerceiverAttention.
_PERCEIVERS = (
    {"norm_media", "norm_latents", "to_q", "to_kv", "to_out"},
    {"context_layer_norm", "latents_layer_norm", "q_proj", "k_proj", "v_proj", "output_proj"},
)
_ROTARY = "rotary positions turn every key by its place, so that no code serves all tokens"
_ROTARIES = ({"qkv", "drop", "proj", "pos_embed"}, {"q", "k", "v", "drop", "proj", "pos_embed"})


def reason(module: nn.Module) -> str:
    """Why this kind of pooler is never fused; empty if it is not one of these."""
    if any(owns(module, set(), children) for children in _PERCEIVERS):
        return _PERCEIVER
    if any(owns(module, parameters, children) for children in _ROTARIES for parameters in (set(), {"cls_token"})):
        return _ROTARY  # timm's RotAttentionPool2d
    return ""
