"""The public functions: checked arguments, choice of path, and what they mean.

`multi_view_pool` has three paths with the same results. "triton": fused kernels, one read of the tokens forward, one
read and one write backward. "torch": plain PyTorch with the same recompute-based backward. "reference": the
differentiable specification; taken while a graph is exported. `last_backend()` tells which ran, and why.
"""
from __future__ import annotations

import torch
from torch import Tensor

from . import reference
from .autograd import autocast_off, norm_pool, pool
from .dispatch import choose, graph_form

DIVERSITY_KINDS = ("frobenius", "norm", "offdiag", "cosine")


def multi_view_pool(
    tokens: Tensor,
    codes: Tensor,
    *,
    keys: Tensor | None = None,
    lengths: Tensor | None = None,
    mask: Tensor | None = None,
    scale: float | None = None,
    need_gram: bool = True,
    backend: str = "auto",
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    norm_eps: float = 1e-5,
) -> tuple[Tensor, Tensor | None]:
    """Pool tokens with M view codes: A = softmax(scale · C Kᵀ), P = A X, G = A Aᵀ, without ever storing A.

    Args:
        tokens: X [B,N,D], float32, float16, bfloat16 (or float64, on the "torch" path). May be a view with any
            strides over batch and token; a last axis that is not contiguous costs a copy.
        codes: C [M,Dk] shared by the samples or [B,M,Dk], any floating dtype; computed in the tokens' dtype, their
            gradient is accumulated in float32.
        keys: K [B,N,Dk] in the tokens' dtype, or None for K = X (then Dk = D).
        lengths: [B] integers in 0..N: token n of sample b takes part if n < lengths[b]. On a GPU the values are not
            looked at (that would wait for the GPU): less than 0 is 0 there, more than N is N. At most one of lengths
            and mask.
        mask: [B,N] bool, True = the token takes part.
        scale: factor of the logits; None = 1/sqrt(Dk), as in `scaled_dot_product_attention`.
        need_gram: False skips G.
        norm_weight, norm_bias, norm_eps: the LayerNorm [D] in front of the pooling: `tokens` are then the raw hidden
            states and the result is that of pooling layer_norm(tokens), with gradients for weight and bias. The kernels
            fuse it, statistics in float32, so that the normalised tokens are never written (not with separate keys,
            which are left as they are). The bias may be None.
        backend: "auto" (the environment variable MVAM_BACKEND, else the fastest that can run), "triton" or "torch".

    Returns:
        pooled P [B,M,D] in the tokens' dtype and gram G [B,M,M] float32 (None when `need_gram` is False). A sample
        without a valid token gives zeros. Under autocast tokens, codes and keys are cast as for a matrix product.
        Differentiable once in tokens, codes and keys on the "triton" and "torch" paths.

    Raises:
        ValueError, TypeError: naming the argument, what was given and what is allowed.

    Source: the view codes and the A·Aᵀ penalty of MVAM, arXiv 2402.17237; derivation in kernels/README.md.
    """
    tokens, codes, keys = _autocast(tokens, codes, keys)
    lengths, scale = _check(tokens, codes, keys, lengths, mask, scale)
    _check_norm(tokens, norm_weight, norm_bias)
    path = choose(tokens, codes, keys, backend, norm=norm_weight is not None)
    norm = {"norm_weight": norm_weight, "norm_bias": norm_bias, "norm_eps": norm_eps}
    with autocast_off(tokens.device.type):
        if path.forward == "reference":
            # Only what is traced: another thread may pool real tensors while this process exports.
            form = graph_form() if type(tokens) not in (Tensor, torch.nn.Parameter) else None
            if form is not None and keys is None and codes.dim() == 2 and not need_gram:
                normalised = reference.normalise(tokens, None, norm_weight, norm_bias, norm_eps)
                valid = reference.valid_tokens(tokens, lengths, mask)
                pooled = form(normalised, codes.to(tokens.dtype), valid, scale)
                if pooled is not None:
                    return pooled, None
            return reference.multi_view_pool(
                tokens, codes, keys=keys, lengths=lengths, mask=mask, scale=scale, need_gram=need_gram, **norm
            )
        if path.norm_fused:
            pooled, gram = norm_pool(
                tokens, codes, norm_weight, norm_bias, norm_eps, lengths, mask, scale, need_gram
            )
        else:
            if norm_weight is not None:
                valid = reference.valid_tokens(tokens, lengths, mask)
                tokens = reference.normalise(tokens, valid, norm_weight, norm_bias, norm_eps)
            kernels = (path.forward == "triton", path.backward == "triton")
            pooled, gram = pool(tokens, codes, keys, lengths, mask, scale, need_gram, *kernels)
    return pooled, gram if need_gram else None


def view_attention(
    tokens: Tensor,
    codes: Tensor,
    *,
    keys: Tensor | None = None,
    lengths: Tensor | None = None,
    mask: Tensor | None = None,
    scale: float | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    norm_eps: float = 1e-5,
) -> Tensor:
    """The attention A [B,M,N] in float32 that `multi_view_pool` pools with; for pictures and analysis.

    Arguments as there. Rows sum to 1; tokens that take no part, and samples without any valid token, are 0.
    """
    tokens, codes, keys = _autocast(tokens, codes, keys)
    lengths, scale = _check(tokens, codes, keys, lengths, mask, scale)
    _check_norm(tokens, norm_weight, norm_bias)
    norm = {"norm_weight": norm_weight, "norm_bias": norm_bias, "norm_eps": norm_eps}
    with autocast_off(tokens.device.type):
        return reference.view_attention(tokens, codes, keys=keys, lengths=lengths, mask=mask, scale=scale, **norm)


def diversity_loss(gram: Tensor, kind: str = "frobenius", reduction: str = "mean") -> Tensor:
    """How far the attentions of a sample's views are from being disjoint, from their Gram matrix G alone.

    Args:
        gram: G [B,M,M] from `multi_view_pool`.
        kind: per sample
            "frobenius"  ‖G − I‖²_F: the paper's A·Aᵀ − I, squared
            "norm"       ‖G − I‖_F, with a zero (not infinite) gradient where G = I
            "offdiag"    Σ_{i≠j} G_ij²: does not ask for one-hot attention, as the diagonal of "frobenius" does,
                         but flat attention lowers it as well as disjoint does
            "cosine"     ‖Ĝ − I‖²_F with Ĝ_ij = G_ij / sqrt(G_ii G_jj): overlap of the attentions' shapes, scale free
        reduction: "mean" over the batch, "sum", or "none" for [B]. The mean of an empty batch is 0.

    Samples without a valid token (G = 0) count as fully diverse: 0, with zero gradient.
    """
    if gram.dim() != 3 or gram.shape[1] != gram.shape[2]:
        raise ValueError(f"gram has shape {tuple(gram.shape)}; it must be [B,M,M]")
    if kind not in DIVERSITY_KINDS:
        raise ValueError(f"kind is {kind!r}; it must be one of {', '.join(DIVERSITY_KINDS)}")
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction is {reduction!r}; it must be mean, sum or none")
    diagonal = gram.diagonal(dim1=1, dim2=2)
    occupied = diagonal > 0
    if kind == "cosine":
        norm = torch.where(occupied, diagonal, torch.ones_like(diagonal)).sqrt()
        gram = gram / (norm[:, :, None] * norm[:, None, :])
    # The identity, except that an empty sample's target is its own zero matrix.
    target = torch.diag_embed(occupied.to(gram.dtype))
    if kind == "offdiag":
        difference = gram - torch.diag_embed(diagonal)
    else:
        difference = gram - target
    loss = difference.square().sum((1, 2))
    if kind == "norm":
        positive = loss > 0
        loss = torch.where(positive, torch.where(positive, loss, torch.ones_like(loss)).sqrt(), loss)
    if reduction == "none":
        return loss
    return loss.sum() / max(len(loss), 1) if reduction == "mean" else loss.sum()


def _autocast(tokens: Tensor, codes: Tensor, keys: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Inside autocast: tokens and keys in its dtype. The codes stay: the op casts them, and keeps dC in float32."""
    if isinstance(tokens, Tensor) and torch.is_autocast_enabled(tokens.device.type):
        dtype = torch.get_autocast_dtype(tokens.device.type)
        tokens = tokens.to(dtype) if tokens.is_floating_point() else tokens
        keys = keys.to(dtype) if isinstance(keys, Tensor) and keys.is_floating_point() else keys
    return tokens, codes, keys


def _check(
    tokens: Tensor,
    codes: Tensor,
    keys: Tensor | None,
    lengths: Tensor | None,
    mask: Tensor | None,
    scale: float | None,
) -> tuple[Tensor | None, float]:
    """One clear error for each kind of bad input; returns lengths on the tokens' device and the resolved scale."""
    given = {"tokens": tokens, "codes": codes, "keys": keys, "lengths": lengths, "mask": mask}
    for name, tensor in given.items():
        if tensor is None and name not in ("tokens", "codes"):
            continue
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} is {type(tensor).__name__}; it must be a torch.Tensor")
        if tensor.device != tokens.device:
            raise ValueError(f"{name} is on {tensor.device}, tokens on {tokens.device}; they must share one device")
    for name in ("tokens", "codes", "keys"):
        if given[name] is not None and not given[name].is_floating_point():
            raise TypeError(f"{name} has dtype {given[name].dtype}; it must be a floating dtype")
    if tokens.dim() != 3:
        raise ValueError(f"tokens has shape {tuple(tokens.shape)}; it must be [B,N,D]")
    batch, length, width = tokens.shape
    if codes.dim() not in (2, 3) or (codes.dim() == 3 and codes.shape[0] != batch):
        raise ValueError(f"codes has shape {tuple(codes.shape)}; it must be [M,Dk] or [B,M,Dk] with B = {batch}")
    if codes.shape[-2] == 0:
        raise ValueError("codes holds no view; there must be at least one")
    if keys is None and codes.shape[-1] != width:
        raise ValueError(f"codes has width {codes.shape[-1]}; without keys it must be the tokens' width {width}")
    if keys is not None:
        if keys.dim() != 3 or keys.shape[:2] != tokens.shape[:2] or keys.shape[2] != codes.shape[-1]:
            raise ValueError(
                f"keys has shape {tuple(keys.shape)}; it must be [B,N,Dk] = [{batch},{length},{codes.shape[-1]}]"
            )
        if keys.dtype != tokens.dtype:
            raise TypeError(f"keys has dtype {keys.dtype}, tokens {tokens.dtype}; they must be equal")
    if lengths is not None and mask is not None:
        raise ValueError("both lengths and mask were given; at most one is allowed")
    if lengths is not None:
        lengths = _check_lengths(lengths, batch, length)
    if mask is not None:
        if mask.dtype != torch.bool:
            raise TypeError(f"mask has dtype {mask.dtype}; it must be torch.bool (True = the token takes part)")
        if mask.shape != tokens.shape[:2]:
            raise ValueError(f"mask has shape {tuple(mask.shape)}; it must be [B,N] = [{batch},{length}]")
    if scale is None:
        return lengths, codes.shape[-1] ** -0.5
    if not isinstance(scale, (int, float)):
        raise TypeError(f"scale is {type(scale).__name__}; it must be a number or None")
    return lengths, float(scale)


def _check_norm(tokens: Tensor, weight: Tensor | None, bias: Tensor | None) -> None:
    if weight is None and bias is not None:
        raise ValueError("norm_bias was given without norm_weight; a LayerNorm needs its weight")
    for name, value in (("norm_weight", weight), ("norm_bias", bias)):
        if value is None:
            continue
        if value.shape != tokens.shape[-1:]:
            raise ValueError(f"{name} has shape {tuple(value.shape)}; it must be [D] = [{tokens.shape[-1]}]")
        if value.device != tokens.device:
            raise ValueError(f"{name} is on {value.device}, tokens on {tokens.device}; they must share one device")


def _check_lengths(lengths: Tensor, batch: int, length: int) -> Tensor:
    if lengths.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"lengths has dtype {lengths.dtype}; it must be int32 or int64")
    if lengths.shape != (batch,):
        raise ValueError(f"lengths has shape {tuple(lengths.shape)}; it must be [B] = [{batch}]")
    if torch.compiler.is_compiling() or batch == 0:
        return lengths  # a traced graph has no values to look at
    if not lengths.is_cuda and not ((lengths >= 0) & (lengths <= length)).all():
        raise ValueError(f"lengths lies in {int(lengths.min())}..{int(lengths.max())}; allowed is 0..N = 0..{length}")
    return lengths
