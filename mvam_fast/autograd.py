"""torch.library operators around the kernels, and the autograd functions that tie forward and backward together.

The operators are registered with define/impl and a fake, and an autograd.Function calls them: all of it traces under
`torch.compile(fullgraph=True)`.
"""
from __future__ import annotations

import contextlib

import torch

from . import portable
from .reference import valid_tokens

_library = torch.library.Library("mvam", "DEF")
_library.define(
    "pool_forward(Tensor tokens, Tensor codes, Tensor? keys, Tensor? lengths, Tensor? mask, float scale,"
    " bool need_gram) -> (Tensor pooled, Tensor gram, Tensor lse)"
)
_library.define(
    "pool_backward(Tensor d_pooled, Tensor? d_gram, Tensor tokens, Tensor codes, Tensor? keys, Tensor? lengths,"
    " Tensor? mask, Tensor pooled, Tensor gram, Tensor lse, float scale, bool need_d_tokens, bool need_d_keys)"
    " -> (Tensor d_tokens, Tensor d_codes, Tensor d_keys)"
)
_library.define(
    "norm_pool_forward(Tensor tokens, Tensor codes, Tensor weight, Tensor? bias, float eps, Tensor? lengths,"
    " Tensor? mask, float scale, bool need_gram)"
    " -> (Tensor pooled, Tensor gram, Tensor lse, Tensor unit, Tensor stats)"
)
_library.define(
    "norm_pool_backward(Tensor d_pooled, Tensor? d_gram, Tensor tokens, Tensor codes, Tensor weight, Tensor? lengths,"
    " Tensor? mask, Tensor gram, Tensor lse, Tensor unit, Tensor stats, float scale, bool need_d_tokens)"
    " -> (Tensor d_tokens, Tensor d_codes, Tensor d_weight, Tensor d_bias)"
)


def _pool_forward(tokens, codes, keys, lengths, mask, scale, need_gram):
    from .kernels.pool_forward import pool_forward

    return pool_forward(tokens, codes, keys, lengths, mask, scale, need_gram)[:3]


def _pool_backward(
    d_pooled, d_gram, tokens, codes, keys, lengths, mask, pooled, gram, lse, scale, need_d_tokens, need_d_keys
):
    from .kernels.pool_backward import pool_backward

    delta, symmetric = portable.gradient_terms(d_pooled, d_gram, pooled, gram)
    return pool_backward(
        d_pooled, symmetric, delta, tokens, codes, keys, lengths, mask, lse, scale, need_d_tokens, need_d_keys
    )


def _fold(codes, weight, dtype):
    """c' = γ ∘ c in the tokens' dtype, and κ = Σ_d c'_d of what was rounded."""
    folded = (codes * weight).to(dtype)
    return folded, folded.float().sum(-1)


def _norm_pool_forward(tokens, codes, weight, bias, eps, lengths, mask, scale, need_gram):
    from .kernels.pool_forward import pool_forward

    folded, kappa = _fold(codes, weight, tokens.dtype)
    unit, gram, lse, stats = pool_forward(tokens, folded, None, lengths, mask, scale, need_gram, kappa, eps)
    pooled = unit * weight
    if bias is not None:
        pooled = pooled + bias * lse.isfinite()[..., None]  # an empty sample stays 0
    return pooled.to(tokens.dtype), gram, lse, unit, stats


def _norm_pool_backward(
    d_pooled, d_gram, tokens, codes, weight, lengths, mask, gram, lse, unit, stats, scale, need_d_tokens
):
    from .kernels.pool_backward import pool_backward

    folded, kappa = _fold(codes, weight, tokens.dtype)
    d_pooled = d_pooled.float() * lse.isfinite()[..., None]
    d_unit = (d_pooled * weight).to(tokens.dtype)
    delta, symmetric = portable.gradient_terms(d_unit, d_gram, unit, gram)
    d_tokens, d_folded, _ = pool_backward(
        d_unit, symmetric, delta, tokens, folded, None, lengths, mask, lse, scale, need_d_tokens, False,
        kappa, d_unit.float().sum(-1), stats,
    )  # fmt: skip
    by_codes = (codes * d_folded).flatten(0, -2).sum(0)
    d_weight = (d_pooled * unit).sum((0, 1)) + by_codes
    return d_tokens, weight * d_folded, d_weight, d_pooled.sum((0, 1))


_FUNCTIONS = {
    "pool_forward": _pool_forward, "pool_backward": _pool_backward,
    "norm_pool_forward": _norm_pool_forward, "norm_pool_backward": _norm_pool_backward,
}  # fmt: skip
for _name, _function in _FUNCTIONS.items():
    for _device in ("CUDA", "CPU"):  # on the CPU the kernels run through Triton's interpreter
        _library.impl(_name, _function, _device)


@torch.library.register_fake("mvam::pool_forward")
def _(tokens, codes, keys, lengths, mask, scale, need_gram):
    batch, views = tokens.shape[0], codes.shape[-2]
    side = views if need_gram else 0
    return (
        tokens.new_empty(batch, views, tokens.shape[2]),
        tokens.new_empty(batch, side, side, dtype=torch.float32),
        tokens.new_empty(batch, views, dtype=torch.float32),
    )


@torch.library.register_fake("mvam::pool_backward")
def _(
    d_pooled, d_gram, tokens, codes, keys, lengths, mask, pooled, gram, lse, scale, need_d_tokens, need_d_keys
):
    d_keys_shape = keys.shape if need_d_keys and keys is not None else (0,)
    return (
        tokens.new_empty(tokens.shape if need_d_tokens else (0,)),
        tokens.new_empty(codes.shape, dtype=torch.float32),
        tokens.new_empty(d_keys_shape),
    )


@torch.library.register_fake("mvam::norm_pool_forward")
def _(tokens, codes, weight, bias, eps, lengths, mask, scale, need_gram):
    batch, length, width = tokens.shape
    views = codes.shape[-2]
    side = views if need_gram else 0

    def float32(*shape):
        return tokens.new_empty(*shape, dtype=torch.float32)

    return (
        tokens.new_empty(batch, views, width), float32(batch, side, side), float32(batch, views),
        float32(batch, views, width), float32(batch, length, 2),
    )  # fmt: skip


@torch.library.register_fake("mvam::norm_pool_backward")
def _(d_pooled, d_gram, tokens, codes, weight, lengths, mask, gram, lse, unit, stats, scale, need_d_tokens):
    d_tokens = tokens.new_empty(tokens.shape if need_d_tokens else (0,))
    width = tokens.shape[2]
    d_codes = tokens.new_empty(codes.shape, dtype=torch.float32)
    return d_tokens, d_codes, d_codes.new_empty(width), d_codes.new_empty(width)


def _op(name: str, tokens: torch.Tensor):
    """The operator, or in plain eager mode the function behind it: torch.library costs as much as the rest of a call.

    Anything that looks at operators gets the operator: tracing, and tensor subclasses such as fake tensors.
    """
    if torch.compiler.is_compiling() or type(tokens) not in (torch.Tensor, torch.nn.Parameter):
        return getattr(torch.ops.mvam, name)
    return _FUNCTIONS[name]


def autocast_off(device_type: str):
    """Inside the op dtypes are as the op says; autocast must not turn its float32 products into half ones."""
    enabled = torch.is_autocast_enabled(device_type)
    return torch.autocast(device_type, enabled=False) if enabled else contextlib.nullcontext()


def _refuse_second_derivative() -> None:
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # create_graph=True
        raise RuntimeError(
            "multi_view_pool can be differentiated once; for second derivatives use "
            "mvam_fast.reference.multi_view_pool, which has the same arguments except backend"
        )


def _wanted(d_gram: torch.Tensor | None) -> torch.Tensor | None:
    """dG, or None where there was no Gram matrix: Dynamo then makes up an empty one, whatever set_materialize_grads."""
    return None if d_gram is None or d_gram.shape[-1] == 0 else d_gram


def _pool(tokens, codes, keys, lengths, mask, scale, need_gram, kernel_forward):
    """P, G and what else the backward of this path needs: lse, or A."""
    cast_codes = codes if codes.dtype == tokens.dtype else codes.to(tokens.dtype)
    if kernel_forward:
        pooled, gram, *kept = _op("pool_forward", tokens)(tokens, cast_codes, keys, lengths, mask, scale, need_gram)
    else:
        valid = valid_tokens(tokens, lengths, mask)
        pooled, gram, *kept = portable.forward(tokens, cast_codes, keys, valid, scale, need_gram)
    return pooled, gram, kept


def _norm_pool(tokens, codes, weight, bias, eps, lengths, mask, scale, need_gram):
    """P, and what its backward needs: G, lse, P^ and the tokens' statistics."""
    bias = None if bias is None else bias.float()
    return _op("norm_pool_forward", tokens)(
        tokens, codes.float(), weight.float(), bias, eps, lengths, mask, scale, need_gram
    )


def pool(tokens, codes, keys, lengths, mask, scale, need_gram, kernel_forward, kernel_backward):
    """(P, G), differentiable; without autograd's bookkeeping where no gradient can be asked for."""
    if _differentiated(tokens, codes, keys):
        return PoolFunction.apply(
            tokens, codes, keys, lengths, mask, scale, need_gram, kernel_forward, kernel_backward
        )
    return _pool(tokens, codes, keys, lengths, mask, scale, need_gram, kernel_forward)[:2]


def norm_pool(tokens, codes, weight, bias, eps, lengths, mask, scale, need_gram):
    """(P, G) of pooling layer_norm(tokens) on the kernels, likewise."""
    if _differentiated(tokens, codes, weight, bias):
        return NormPoolFunction.apply(tokens, codes, weight, bias, eps, lengths, mask, scale, need_gram)
    return _norm_pool(tokens, codes, weight, bias, eps, lengths, mask, scale, need_gram)[:2]


def _differentiated(*tensors) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


class PoolFunction(torch.autograd.Function):
    """(P, G) of `reference.multi_view_pool`; each direction on the kernels or on `portable`.

    For the backward the kernels keep P, G and lse and compute A again, `portable` keeps A.
    """

    @staticmethod
    def forward(ctx, tokens, codes, keys, lengths, mask, scale, need_gram, kernel_forward, kernel_backward):
        pooled, gram, kept = _pool(tokens, codes, keys, lengths, mask, scale, need_gram, kernel_forward)
        if kernel_forward and kernel_backward:
            kept = (pooled, gram, *kept)
        ctx.save_for_backward(tokens, codes, keys, lengths, mask, *kept)
        ctx.scale, ctx.kernel_forward, ctx.kernel_backward = scale, kernel_forward, kernel_backward
        ctx.set_materialize_grads(False)  # an output that nobody used costs nothing in the backward
        return pooled, gram

    @staticmethod
    def backward(ctx, d_pooled, d_gram):
        _refuse_second_derivative()
        d_gram = _wanted(d_gram)
        tokens, codes, keys, lengths, mask, *kept = ctx.saved_tensors
        need_d_tokens, need_d_codes, need_d_keys = ctx.needs_input_grad[:3]
        if d_pooled is None:
            d_pooled = tokens.new_zeros(len(tokens), codes.shape[-2], tokens.shape[2])
        cast_codes = codes.to(tokens.dtype)
        if ctx.kernel_backward:
            d_tokens, d_codes, d_keys = _op("pool_backward", tokens)(
                d_pooled, d_gram, tokens, cast_codes, keys, lengths, mask, *kept, ctx.scale, need_d_tokens, need_d_keys
            )
        else:
            with autocast_off(tokens.device.type):
                given = (tokens, cast_codes, keys, valid_tokens(tokens, lengths, mask))
                if ctx.kernel_forward:
                    kept = [portable.recomputed_attention(*given, *kept, ctx.scale)]
                d_tokens, d_codes, d_keys = portable.backward(
                    d_pooled, d_gram, *given, *kept, ctx.scale, need_d_tokens, need_d_keys
                )
        return (
            d_tokens if need_d_tokens else None,
            d_codes.to(codes.dtype) if need_d_codes else None,
            d_keys if need_d_keys else None,
            *(None,) * 6,
        )


class NormPoolFunction(torch.autograd.Function):
    """(P, G) of pooling layer_norm(tokens), on the kernels, with the LayerNorm fused into both passes."""

    @staticmethod
    def forward(ctx, tokens, codes, weight, bias, eps, lengths, mask, scale, need_gram):
        pooled, *kept = _norm_pool(tokens, codes, weight, bias, eps, lengths, mask, scale, need_gram)
        ctx.save_for_backward(tokens, codes, weight, lengths, mask, *kept)
        ctx.scale, ctx.bias_dtype = scale, None if bias is None else bias.dtype
        ctx.set_materialize_grads(False)
        return pooled, kept[0]

    @staticmethod
    def backward(ctx, d_pooled, d_gram):
        _refuse_second_derivative()
        d_gram = _wanted(d_gram)
        tokens, codes, weight, lengths, mask, gram, lse, unit, stats = ctx.saved_tensors
        d_pooled = torch.zeros_like(unit, dtype=tokens.dtype) if d_pooled is None else d_pooled
        d_tokens, d_codes, d_weight, d_bias = _op("norm_pool_backward", tokens)(
            d_pooled, d_gram, tokens, codes.float(), weight.float(), lengths, mask, gram, lse, unit, stats, ctx.scale,
            ctx.needs_input_grad[0],
        )
        wanted = zip(
            (d_tokens, d_codes, d_weight, d_bias), (tokens.dtype, codes.dtype, weight.dtype, ctx.bias_dtype),
            ctx.needs_input_grad, strict=False,
        )  # fmt: skip
        return (*(gradient.to(dtype) if needed else None for gradient, dtype, needed in wanted), *(None,) * 5)
