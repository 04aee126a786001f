"""Attention poolers of every kind in random configurations, for comparing the fused with the original.

The originals are the libraries' own modules. Two have no library to come from: `LaterAttention` stands in for the
attention that open_clip's AttentionalPooler has after 3.3, and `MultiHeadSelfAttention` for the additive attention that
PVSE's projects copy from each other.
"""
from __future__ import annotations

import copy
import random

import timm.layers
import torch
import torch.nn.functional as F
from open_clip.modified_resnet import AttentionPool2d
from open_clip.transformer import AttentionalPooler
from torch import nn
from transformers import Siglip2VisionConfig, SiglipVisionConfig
from transformers.models.siglip.modeling_siglip import SiglipMultiheadAttentionPoolingHead
from transformers.models.siglip2.modeling_siglip2 import Siglip2MultiheadAttentionPoolingHead


class LaterAttention(nn.Module):
    """Stand-in for open_clip's own attention: the parameters of nn.MultiheadAttention, called with k_x and v_x."""

    def __init__(self, dim: int, num_heads: int, kdim: int):
        super().__init__()
        self.num_heads = num_heads
        packed = kdim == dim
        shapes = {"in": None, "q": (dim, dim), "k": (dim, kdim), "v": (dim, kdim)}
        if packed:
            shapes = {"in": (3 * dim, dim), "q": None, "k": None, "v": None}
        for name, shape in shapes.items():
            value = None if shape is None else nn.Parameter(torch.randn(shape) * dim**-0.5)
            self.register_parameter(f"{name}_proj_weight", value)
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * dim))
        self.ln_q, self.ln_k, self.ln_inner = nn.Identity(), nn.Identity(), nn.Identity()
        self.logit_scale = self.head_scale = None
        self.attn_drop, self.out_drop = nn.Dropout(0.0), nn.Dropout(0.0)
        self.out_proj = nn.Linear(dim, dim)

    def forward(self, x, k_x, v_x):
        weights = self.q_proj_weight, self.k_proj_weight, self.v_proj_weight
        if self.in_proj_weight is not None:
            weights = self.in_proj_weight.chunk(3)
        projected = zip((x, k_x, v_x), weights, self.in_proj_bias.chunk(3), strict=True)
        q, k, v = (F.linear(*given).unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for given in projected)
        attended = F.scaled_dot_product_attention(self.ln_q(q), self.ln_k(k), v)
        return self.out_drop(self.out_proj(self.ln_inner(attended.transpose(1, 2).flatten(2))))


class LaterAttentionalPooler(nn.Module):
    """Stand-in for open_clip's AttentionalPooler after 3.3."""

    def __init__(self, d_model: int, context_dim: int, n_head: int, n_queries: int):
        super().__init__()
        self.query = nn.Parameter(torch.randn(n_queries, d_model))
        self.attn = LaterAttention(d_model, n_head, context_dim)
        self.ln_q, self.ln_k = nn.LayerNorm(d_model), nn.LayerNorm(context_dim)

    def forward(self, x):
        x = self.ln_k(x)
        queries = self.ln_q(self.query)[None].expand(len(x), -1, -1)
        return self.attn(queries, k_x=x, v_x=x)


class MultiHeadSelfAttention(nn.Module):
    """Stand-in for the additive attention of PIE-Net: softmax over the tokens of w_2(tanh(w_1 x))."""

    def __init__(self, n_head: int, d_in: int, d_hidden: int, bias: bool = False):
        super().__init__()
        self.w_1, self.w_2 = nn.Linear(d_in, d_hidden, bias=bias), nn.Linear(d_hidden, n_head, bias=bias)
        self.tanh, self.softmax = nn.Tanh(), nn.Softmax(dim=1)

    def forward(self, x, mask=None):
        logits = self.w_2(self.tanh(self.w_1(x)))
        if mask is not None:
            logits = logits.masked_fill(mask[..., None], float("-inf"))
        attention = self.softmax(logits)
        pooled = attention.mT @ x
        return (pooled.squeeze(1) if pooled.shape[1] == 1 else pooled), attention


def _mask(generator, batch: int, length: int) -> torch.Tensor:
    """True at tokens that take part, at least one in each sample."""
    mask = torch.rand(batch, length, generator=generator) > 0.4
    mask[:, length // 2] = True
    return mask


def _sizes(rng, generator) -> tuple[int, int, torch.Tensor]:
    """Heads, width, and tokens that differ in size."""
    heads = rng.choice([1, 2, 3, 4])
    width = heads * rng.choice([8, 11, 16])
    batch, length = rng.randint(2, 5), rng.randint(2, 40)
    tokens = torch.randn(batch, length, width, generator=generator)
    return heads, width, tokens * (0.3 + 2 * torch.rand(batch, length, 1, generator=generator))


def _attentional_pooler(rng, generator):
    heads, width, tokens = _sizes(rng, generator)
    out = rng.choice([width, heads * 8])
    norm = {} if rng.random() < 0.7 else {"norm_layer": rng.choice([nn.Identity, lambda d: nn.LayerNorm(d, eps=1e-3)])}
    return AttentionalPooler(out, width, heads, rng.randint(1, 6), **norm), (tokens,)


def _later_attentional_pooler(rng, generator):
    heads, width, tokens = _sizes(rng, generator)
    return LaterAttentionalPooler(rng.choice([width, heads * 8]), width, heads, rng.randint(1, 6)), (tokens,)


def _clip_pool2d(rng, generator):
    heads, width, tokens = _sizes(rng, generator)
    side = rng.randint(2, 6)
    grid = torch.randn(len(tokens), width, side, side, generator=generator)
    return AttentionPool2d(side, width, heads, rng.choice([None, 10])), (grid,)


def _timm_pool2d(rng, generator):
    heads, width, tokens = _sizes(rng, generator)
    size = rng.randint(2, 6), rng.randint(2, 6)
    class_token = rng.random() < 0.5
    pooler = timm.layers.AttentionPool2d(
        width, size, rng.choice([None, 0, 10]), embed_dim=None if class_token else rng.choice([None, heads * 8]),
        num_heads=heads, qkv_separate=rng.random() < 0.5, class_token=class_token,
    )  # fmt: skip
    if rng.random() < 0.3:  # another grid than it was made for
        size = size[0] + 1, size[1] + 2
    grid = torch.randn(len(tokens), width, *size, generator=generator)
    return pooler, (grid, True) if rng.random() < 0.2 else (grid,)


def _attention_pool_latent(rng, generator):
    heads, width, tokens = _sizes(rng, generator)
    batch, length = tokens.shape[:2]
    q_proj = rng.random() < 0.7
    pooler = timm.layers.AttentionPoolLatent(
        width, rng.choice([None, 0, 10]), num_heads=heads, feat_size=length, mlp_ratio=2.0,
        qkv_bias=rng.random() < 0.6, q_proj=q_proj, latent_len=rng.randint(1, 4),
        latent_dim=rng.choice([None, 7]) if q_proj else None, pos_embed=rng.choice(["", "abs"]),
        pool_type=rng.choice(["token", "avg", ""]), norm_layer=rng.choice([None, nn.LayerNorm]),
    )  # fmt: skip
    if rng.random() < 0.5:
        return pooler, (tokens,)
    mask = _mask(generator, batch, length)
    mask[0] = rng.random() < 0.5  # all or none of them
    return pooler, (tokens, rng.choice([mask[:, None, None], mask[None, None, None, 1], mask[1:2]]))


def _siglip(rng, generator):
    heads, width, tokens = _sizes(rng, generator)
    config = SiglipVisionConfig(hidden_size=width, num_attention_heads=heads, intermediate_size=2 * width)
    return SiglipMultiheadAttentionPoolingHead(config), (tokens,)


def _siglip2(rng, generator):
    heads, width, tokens = _sizes(rng, generator)
    config = Siglip2VisionConfig(hidden_size=width, num_attention_heads=heads, intermediate_size=2 * width)
    config._attn_implementation = rng.choice(["sdpa", "eager"])
    pooler = Siglip2MultiheadAttentionPoolingHead(config)
    mask = _mask(generator, *tokens.shape[:2])
    return pooler, (tokens, rng.choice([None, mask, mask.int(), mask.float()]))


def _additive(rng, generator):
    heads, width, tokens = _sizes(rng, generator)
    padding = None if rng.random() < 0.5 else ~_mask(generator, *tokens.shape[:2])
    return MultiHeadSelfAttention(heads, width, rng.choice([5, 16]), bias=rng.random() < 0.3), (tokens, padding)


KINDS = {
    "open_clip AttentionalPooler": _attentional_pooler,
    "later open_clip AttentionalPooler": _later_attentional_pooler,
    "CLIP AttentionPool2d": _clip_pool2d,
    "timm AttentionPool2d": _timm_pool2d,
    "timm AttentionPoolLatent": _attention_pool_latent,
    "SigLIP head": _siglip,
    "SigLIP 2 head": _siglip2,
    "additive": _additive,
}


def case(kind: str, number: int) -> tuple[nn.Module, tuple]:
    """A pooler of this kind with all its parameters random, and arguments for it; the same for the same number."""
    rng = random.Random(f"{kind} {number}")
    torch.manual_seed(number)
    pooler, arguments = KINDS[kind](rng, torch.Generator().manual_seed(number))
    with torch.no_grad():  # biases that start as 0 would hide what is done with them
        for parameter in pooler.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return pooler, arguments


def results(
    pooler: nn.Module, arguments: tuple, dtype: torch.dtype = torch.float32, device: str = "cpu", run=lambda f: f
) -> dict[str, torch.Tensor]:
    """Outputs, and gradients of all parameters and of the input, for fixed random gradients of the outputs.

    The pooler is copied and cast, and called as `run(pooler)`; a gradient that does not exist is absent.
    """
    pooler = copy.deepcopy(pooler).to(device, dtype)
    tokens, *others = (a.to(device) if isinstance(a, torch.Tensor) else a for a in arguments)
    tokens = tokens.to(dtype, copy=True).requires_grad_()
    outputs = run(pooler)(tokens, *others)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    generator = torch.Generator().manual_seed(1)
    gradients = [torch.randn(output.shape, generator=generator).to(output) for output in outputs]
    torch.autograd.backward(outputs, gradients)
    found = {f"output {i}": output.detach() for i, output in enumerate(outputs)}
    found |= {name: parameter.grad for name, parameter in pooler.named_parameters() if parameter.grad is not None}
    return found | {"input": tokens.grad}
