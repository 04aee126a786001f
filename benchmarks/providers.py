"""Who is timed: the same work done in several ways, and what people use today doing its own work."""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mvam_fast import last_backend, multi_view_pool, reference

Op = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


class Unavailable(Exception):
    """This provider cannot run here; the message is the reason shown in its row."""


@dataclass
class Inputs:
    """What is timed on: X [B,N,D], C [M,D], and the gradients dP [B,M,D], dG [B,M,M] that backward starts from."""

    tokens: Tensor
    codes: Tensor
    d_pooled: Tensor
    d_gram: Tensor

    @classmethod
    def make(cls, batch: int, length: int, width: int, views: int, dtype: torch.dtype, device: torch.device) -> Inputs:
        generator = torch.Generator().manual_seed(0)

        def randn(*shape, dtype=dtype):
            return torch.randn(*shape, generator=generator).to(device, dtype)

        tokens, codes = randn(batch, length, width).requires_grad_(), randn(views, width).requires_grad_()
        return cls(tokens, codes, randn(batch, views, width), randn(batch, views, views, dtype=torch.float32))

    def moved_bytes(self, mode: str) -> int:
        """Least traffic: forward reads X, C and writes P, G; backward reads X, C, dP, dG and writes dX, dC."""
        pooled, gram = self.d_pooled, self.d_gram
        once = sum(t.numel() * t.element_size() for t in (self.tokens, self.codes, pooled, gram))
        backward = once + sum(t.numel() * t.element_size() for t in (self.tokens, self.codes))
        return once if mode == "forward" else once + backward


def sdpa(tokens: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
    """Codes as the queries of torch's attention; it does not return A, so the Gram matrix recomputes it."""
    queries = codes.expand(len(tokens), 1, *codes.shape)
    pooled = F.scaled_dot_product_attention(queries, tokens[:, None], tokens[:, None])[:, 0]
    attention = reference.view_attention(tokens, codes)
    return pooled, attention @ attention.mT


def compiled(tokens: Tensor, codes: Tensor) -> Op:
    torch._dynamo.reset()
    return torch.compile(reference.multi_view_pool, dynamic=False)


def triton(tokens: Tensor, codes: Tensor) -> Op:
    if not tokens.is_cuda:
        raise Unavailable("needs a CUDA GPU (Triton's interpreter is for tests)")
    try:
        multi_view_pool(tokens[:1], codes, backend="triton")
    except ValueError as error:
        raise Unavailable(str(error)) from error
    if last_backend().backward != "triton":
        raise Unavailable(last_backend().reason)
    return lambda tokens, codes: multi_view_pool(tokens, codes, backend="triton")


def portable(tokens: Tensor, codes: Tensor) -> Op:
    return lambda tokens, codes: multi_view_pool(tokens, codes, backend="torch")


# name → maker of the op for these inputs. "eager" comes first: ratios are to it.
SAME_WORK: dict[str, Callable[[Tensor, Tensor], Op]] = {
    "eager": lambda tokens, codes: reference.multi_view_pool,
    "compile": compiled,
    "sdpa": lambda tokens, codes: sdpa,
    "torch": portable,
    "triton": triton,
}


def attentional_pooler(width: int, views: int) -> nn.Module:
    from open_clip.transformer import AttentionalPooler

    return AttentionalPooler(width, width, n_head=width // 64, n_queries=views)


def attention_pool_latent(width: int, views: int) -> nn.Module:
    try:
        from timm.layers import AttentionPoolLatent
    except ImportError as error:
        raise Unavailable("timm is not installed") from error
    return AttentionPoolLatent(width, num_heads=width // 64, latent_len=views, pool_type="")


# Poolers in use today: another, costlier function (projections of every token), without a Gram matrix.
OTHER_WORK: dict[str, Callable[[int, int], nn.Module]] = {
    "open_clip AttentionalPooler": attentional_pooler,
    "timm AttentionPoolLatent": attention_pool_latent,
}


def tolerance(dtype: torch.dtype) -> float:
    """Largest deviation from float64 that is let through, relative to the largest value."""
    return {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}[dtype]


def gate(op: Op, inputs: Inputs) -> None:
    """Raises Unavailable unless P, G, dX and dC of `op` are right on the very inputs that will be timed."""
    leaves = [inputs.tokens, inputs.codes]
    exact_leaves = [leaf.detach().double().requires_grad_() for leaf in leaves]
    results = []
    for function, (tokens, codes) in ((op, leaves), (reference.multi_view_pool, exact_leaves)):
        outputs = function(tokens, codes)
        gradients = [g.to(o.dtype) for g, o in zip((inputs.d_pooled, inputs.d_gram), outputs, strict=True)]
        results.append([*outputs, *torch.autograd.grad(outputs, (tokens, codes), gradients)])
    for name, found, exact in zip(("P", "G", "dX", "dC"), *results, strict=True):
        error = float(((found.double() - exact).abs().max() / exact.abs().max()).detach())
        if not error <= tolerance(inputs.tokens.dtype):
            raise Unavailable(f"wrong: {name} is off by {error:.1e}, allowed {tolerance(inputs.tokens.dtype):.0e}")
