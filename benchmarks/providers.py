"""Who is timed: the same work done in several ways, and what people use today doing its own work."""
from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from gate import Unavailable
from torch import Tensor, nn
from torch.nn.attention import SDPBackend
from torch.nn.attention.flex_attention import flex_attention
from work import Op, Work, normed_pool, own_op, own_work

from mvam_fast import last_backend, multi_view_pool, reference
from mvam_fast.converters import fuse_attention_poolers


class Made(NamedTuple):
    """A provider made ready: its op, the work it does, and what is worth knowing about how it does it."""

    op: Op
    work: Work
    details: str = ""


@dataclass(frozen=True)
class Provider:
    """`make(works, views)` builds it; `work` names what it does; `in_model`: also timed inside a compiled model;
    `compiles`: its first call takes seconds, whatever the shape; `original`: the provider whose pooler this one is,
    fused."""

    label: str
    work: str
    make: Callable[[dict[str, Work], int], Made]
    in_model: bool = False
    ours: bool = False
    compiles: bool = False
    original: str = ""


def _plain(op: Op, work: str = "pool") -> Callable:
    return lambda works, views: Made(op, works[work])


def _compiled(op: Op, work: str = "pool") -> Callable:
    return lambda works, views: Made(torch.compile(op, dynamic=False), works[work])


def _queries(tokens: Tensor, codes: Tensor) -> Tensor:
    return codes.expand(len(tokens), 1, *codes.shape)


def sdpa(tokens: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
    """Codes as the queries of torch's attention; it does not return A, so the Gram matrix recomputes it."""
    pooled = F.scaled_dot_product_attention(_queries(tokens, codes), tokens[:, None], tokens[:, None])[:, 0]
    attention = reference.view_attention(tokens, codes)
    return pooled, attention @ attention.mT


def _sdpa(works: dict[str, Work], views: int) -> Made:
    tokens, codes = (works["pool"].leaves[name] for name in ("X", "C"))
    given = _queries(tokens, codes), tokens[:, None], tokens[:, None]
    training = SDPBackend(torch._fused_sdp_choice(*given)).name
    with torch.no_grad():
        inference = SDPBackend(torch._fused_sdp_choice(*given)).name
    return Made(sdpa, works["pool"], f"SDPA runs {inference}" + f", in training {training}" * (training != inference))


def _flex(works: dict[str, Work], views: int) -> Made:
    """FlexAttention, which must be compiled to be itself, and a Gram matrix as beside SDPA, compiled too.

    Not in one graph: there keys and values are one buffer, which it refuses on a CPU.
    """
    attend = torch.compile(flex_attention, dynamic=False)

    @torch.compile(dynamic=False)
    def gram(tokens: Tensor, codes: Tensor) -> Tensor:
        attention = reference.view_attention(tokens, codes)
        return attention @ attention.mT

    def flex(tokens: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
        if not torch.is_grad_enabled():  # on a CPU it refuses tensors that require a gradient even then
            tokens, codes = tokens.detach(), codes.detach()
        pooled = attend(_queries(tokens, codes), tokens[:, None], tokens[:, None])[:, 0]
        return pooled, gram(tokens, codes)

    return Made(flex, works["pool"])


def _ours(backend: str, work: str = "pool") -> Callable:
    """mvam_fast on one of its paths, the LayerNorm handed to it where there is one."""

    def op(tokens, codes, gain=None, bias=None):
        return multi_view_pool(tokens, codes, norm_weight=gain, norm_bias=bias, backend=backend)

    def make(works: dict[str, Work], views: int) -> Made:
        leaves = works[work].leaves.values()
        if backend == "triton" and not works[work].leaves["X"].is_cuda:
            raise Unavailable("needs a CUDA GPU (Triton's interpreter is for tests)")
        try:
            op(*(leaf[:1] if name == "X" else leaf for name, leaf in works[work].leaves.items()))
        except ValueError as error:  # no kernel for this width or number of views: the op says why
            raise Unavailable(str(error)) from error
        path = last_backend()
        fused = f", LayerNorm {'fused' if path.norm_fused else 'not fused'}" if len(leaves) > 2 else ""
        return Made(op, works[work], f"forward {path.forward}, backward {path.backward}{fused}")

    return make


def _pooler(build: Callable[[int, int, int], nn.Module], works: dict[str, Work], views: int) -> nn.Module:
    """A library's own module for these tokens, its parameters the same whenever it is built."""
    tokens = works["pool"].leaves["X"]
    try:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)
            module = build(*tokens.shape[1:], views)
    except ImportError as error:
        raise Unavailable(f"{error.name or error} is not installed") from error
    return module.to(tokens.device, tokens.dtype)


def _peer(build: Callable[[int, int, int], nn.Module]) -> Callable:
    """A library's own module. It computes a more expressive function, at the price of projecting every token."""

    def make(works: dict[str, Work], views: int) -> Made:
        module = _pooler(build, works, views)
        return Made(own_op(module), own_work(module, works["pool"].leaves["X"]))

    return make


def _fused(build: Callable[[int, int, int], nn.Module]) -> Callable:
    """The same module after `fuse_attention_poolers`, on the very parameters of an original, which judges it."""

    def make(works: dict[str, Work], views: int) -> Made:
        original, tokens = _pooler(build, works, views), works["pool"].leaves["X"]
        module = copy.deepcopy(original, {id(parameter): parameter for parameter in original.parameters()})
        names = fuse_attention_poolers(module)
        if not names:
            raise Unavailable("; ".join(names.left_alone.values()) or "no pooler that can be fused was found in it")
        module(tokens[:1])
        path = last_backend()
        norm = ", LayerNorm fused" if path.norm_fused else ""
        details = f"forward {path.forward}, backward {path.backward}{norm}"
        return Made(own_op(module), own_work(original, tokens), details)

    return make


def _pair(name: str, label: str, build: Callable[[int, int, int], nn.Module]) -> dict[str, Provider]:
    """A library's pooler, and the same one fused."""
    return {
        name: Provider(label, "own", _peer(build)),
        f"fused-{name}": Provider(f"{label}, fused", "own", _fused(build), ours=True, original=name),
    }


def attentional_pooler(length: int, width: int, views: int) -> nn.Module:
    from open_clip.transformer import AttentionalPooler

    return AttentionalPooler(width, width, n_head=8, n_queries=views)  # 8 heads: open_clip's default


def attention_pool_latent(length: int, width: int, views: int) -> nn.Module:
    from timm.layers import AttentionPoolLatent

    return AttentionPoolLatent(width, num_heads=width // 64, latent_len=views, pool_type="")


def siglip_head(length: int, width: int, views: int) -> nn.Module:
    """One probe, whatever the number of views; an MLP follows."""
    from transformers import SiglipVisionConfig
    from transformers.models.siglip.modeling_siglip import SiglipMultiheadAttentionPoolingHead

    heads, inner = (16, 4304) if width == 1152 else (width // 64, 4 * width)  # as the models of this width have
    config = SiglipVisionConfig(hidden_size=width, num_attention_heads=heads, intermediate_size=inner)
    return SiglipMultiheadAttentionPoolingHead(config)


class PatchGrid(nn.Module):
    """Tokens [B,N,D] as the square grid [B,D,S,S] that the pools of CLIP's ResNets take, without a class token."""

    def __init__(self, length: int):
        super().__init__()
        self.side = math.isqrt(length)
        self.left_out = length - self.side**2
        if self.left_out > 1:
            raise Unavailable(f"{length} tokens are no square grid")

    def forward(self, tokens: Tensor) -> Tensor:
        return tokens[:, self.left_out :].mT.unflatten(2, (self.side, self.side))


def attention_pool2d(length: int, width: int, views: int) -> nn.Module:
    """One query, the mean of the grid, whatever the number of views."""
    from open_clip.modified_resnet import AttentionPool2d

    grid = PatchGrid(length)
    pool = AttentionPool2d(grid.side, width, num_heads=width // 64)
    # It cancels in the softmax: its gradient is rounding around zero, of which no relative error can be told.
    pool.k_proj.bias.requires_grad_(False)
    return nn.Sequential(grid, pool)


def attention_pool2d_timm(length: int, width: int, views: int) -> nn.Module:
    from timm.layers import AttentionPool2d

    grid = PatchGrid(length)
    return nn.Sequential(grid, AttentionPool2d(width, feat_size=grid.side))


# "naive" does what the specification says under autograd: ratios are to it.
PROVIDERS: dict[str, Provider] = {
    "naive": Provider("PyTorch", "pool", _plain(reference.multi_view_pool), in_model=True),
    "compile": Provider("PyTorch, compiled", "pool", _compiled(reference.multi_view_pool), compiles=True),
    "sdpa": Provider("SDPA + Gram", "pool", _sdpa, in_model=True),
    "flex": Provider("FlexAttention + Gram", "pool", _flex, compiles=True),
    "torch": Provider("mvam_fast, torch path", "pool", _ours("torch"), in_model=True, ours=True),
    "triton": Provider("mvam_fast, Triton", "pool", _ours("triton"), in_model=True, ours=True),
    "norm-naive": Provider("LayerNorm + PyTorch", "norm+pool", _plain(normed_pool, "norm+pool")),
    "norm-compile": Provider(
        "LayerNorm + PyTorch, compiled", "norm+pool", _compiled(normed_pool, "norm+pool"), compiles=True
    ),
    "norm-torch": Provider("mvam_fast with LayerNorm, torch path", "norm+pool", _ours("torch", "norm+pool"), ours=True),
    "norm-triton": Provider(
        "mvam_fast with LayerNorm, Triton", "norm+pool", _ours("triton", "norm+pool"), in_model=True, ours=True
    ),
    **_pair("attentional-pooler", "open_clip AttentionalPooler", attentional_pooler),
    **_pair("attention-pool-latent", "timm AttentionPoolLatent", attention_pool_latent),
    **_pair("siglip-head", "transformers SigLIP head, 1 probe", siglip_head),
    **_pair("attention-pool2d", "open_clip AttentionPool2d", attention_pool2d),
    **_pair("attention-pool2d-timm", "timm AttentionPool2d", attention_pool2d_timm),
}
BASELINES = {"pool": "naive", "norm+pool": "norm-naive", "own": "naive"}
