"""torch.library operators around the kernels, and the autograd function that ties forward and backward together.

The operators are registered with define/impl and a fake, and an autograd.Function calls them: this traces under
`torch.compile(fullgraph=True)` and costs less per call than an operator with registered autograd.
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


def _pool_forward(tokens, codes, keys, lengths, mask, scale, need_gram):
    from .kernels.pool_forward import pool_forward

    return pool_forward(tokens, codes, keys, lengths, mask, scale, need_gram)


def _pool_backward(
    d_pooled, d_gram, tokens, codes, keys, lengths, mask, pooled, gram, lse, scale, need_d_tokens, need_d_keys
):
    from .kernels.pool_backward import pool_backward

    delta, symmetric = portable.gradient_terms(d_pooled, d_gram, pooled, gram)
    return pool_backward(
        d_pooled, symmetric, delta, tokens, codes, keys, lengths, mask, lse, scale, need_d_tokens, need_d_keys
    )


for _device in ("CUDA", "CPU"):  # on the CPU the kernels run through Triton's interpreter
    _library.impl("pool_forward", _pool_forward, _device)
    _library.impl("pool_backward", _pool_backward, _device)


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


def autocast_off(device_type: str):
    """Inside the op dtypes are as the op says; autocast must not turn its float32 products into half ones."""
    enabled = torch.is_autocast_enabled(device_type)
    return torch.autocast(device_type, enabled=False) if enabled else contextlib.nullcontext()


class PoolFunction(torch.autograd.Function):
    """(P, G) of `reference.multi_view_pool`; each direction on the kernels or on `portable`: both save the same."""

    @staticmethod
    def forward(ctx, tokens, codes, keys, lengths, mask, scale, need_gram, kernel_forward, kernel_backward):
        cast_codes = codes.to(tokens.dtype)
        if kernel_forward:
            pooled, gram, lse = torch.ops.mvam.pool_forward(
                tokens, cast_codes, keys, lengths, mask, scale, need_gram
            )
        else:
            valid = valid_tokens(tokens, lengths, mask)
            pooled, gram, lse = portable.forward(tokens, cast_codes, keys, valid, scale, need_gram)
        ctx.save_for_backward(tokens, codes, keys, lengths, mask, pooled, gram, lse)
        ctx.scale, ctx.kernel_backward = scale, kernel_backward
        ctx.set_materialize_grads(False)  # an output that nobody used costs nothing in the backward
        return pooled, gram

    @staticmethod
    def backward(ctx, d_pooled, d_gram):
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # create_graph=True
            raise RuntimeError(
                "multi_view_pool can be differentiated once; for second derivatives use "
                "mvam_fast.reference.multi_view_pool, which has the same arguments except backend"
            )
        tokens, codes, keys, lengths, mask, pooled, gram, lse = ctx.saved_tensors
        need_d_tokens, need_d_codes, need_d_keys = ctx.needs_input_grad[:3]
        d_pooled = torch.zeros_like(pooled) if d_pooled is None else d_pooled
        cast_codes = codes.to(tokens.dtype)
        if ctx.kernel_backward:
            d_tokens, d_codes, d_keys = torch.ops.mvam.pool_backward(
                d_pooled, d_gram, tokens, cast_codes, keys, lengths, mask, pooled, gram, lse, ctx.scale,
                need_d_tokens, need_d_keys,
            )
        else:
            with autocast_off(tokens.device.type):
                d_tokens, d_codes, d_keys = portable.backward(
                    d_pooled, d_gram, tokens, cast_codes, keys, valid_tokens(tokens, lengths, mask), pooled, gram,
                    lse, ctx.scale, need_d_tokens, need_d_keys,
                )
        return (
            d_tokens if need_d_tokens else None,
            d_codes.to(codes.dtype) if need_d_codes else None,
            d_keys if need_d_keys else None,
            *(None,) * 6,
        )
