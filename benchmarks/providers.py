"""Who is timed: the same work done in several ways, and what people use today doing its own work."""
from __future__ import annotations

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


class Made(NamedTuple):
    """A provider made ready: its op, the work it does, and what is worth knowing about how it does it."""

    op: Op
    work: Work
    details: str = ""


@dataclass(frozen=True)
class Provider:
    """`make(works, views)` builds it; `work` names what it does; `in_model`: also timed inside a compiled model;
    `compiles`: its first call takes seconds, whatever the shape."""

    label: str
    work: str
    make: Callable[[dict[str, Work], int], Made]
    in_model: bool = False
    ours: bool = False
    compiles: bool = False


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


def _peer(build: Callable[[int, int], nn.Module]) -> Callable:
    """A library's own module. It computes a more expressive function, at the price of projecting every token."""

    def make(works: dict[str, Work], views: int) -> Made:
        tokens = works["pool"].leaves["X"]
        try:
            module = build(tokens.shape[2], views).to(tokens.device, tokens.dtype)
        except ImportError as error:
            raise Unavailable(f"{error.name or error} is not installed") from error
        return Made(own_op(module), own_work(module, tokens))

    return make


def attentional_pooler(width: int, views: int) -> nn.Module:
    from open_clip.transformer import AttentionalPooler

    return AttentionalPooler(width, width, n_head=8, n_queries=views)  # 8 heads: open_clip's default


def attention_pool_latent(width: int, views: int) -> nn.Module:
    from timm.layers import AttentionPoolLatent

    return AttentionPoolLatent(width, num_heads=width // 64, latent_len=views, pool_type="")


def siglip_head(width: int, views: int) -> nn.Module:
    """One probe, whatever the number of views; an MLP follows."""
    from transformers import SiglipVisionConfig
    from transformers.models.siglip.modeling_siglip import SiglipMultiheadAttentionPoolingHead

    heads, inner = (16, 4304) if width == 1152 else (width // 64, 4 * width)  # as the models of this width have
    config = SiglipVisionConfig(hidden_size=width, num_attention_heads=heads, intermediate_size=inner)
    return SiglipMultiheadAttentionPoolingHead(config)


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
    "attentional-pooler": Provider("open_clip AttentionalPooler", "own", _peer(attentional_pooler)),
    "attention-pool-latent": Provider("timm AttentionPoolLatent", "own", _peer(attention_pool_latent)),
    "siglip-head": Provider("transformers SigLIP head, 1 probe", "own", _peer(siglip_head)),
}
BASELINES = {"pool": "naive", "norm+pool": "norm-naive", "own": "naive"}
