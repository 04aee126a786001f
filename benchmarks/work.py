"""What is computed: the specification of one piece of work, its inputs, its gradients, and the least it costs.

    pool        P, G of tokens X and codes C                                      leaves X, C
    norm+pool   the same of layer_norm(X)                                         leaves X, C, γ, β
    model       f = normalize(concat_i(P_i W)) and G of layer_norm(X): what       leaves X, C, γ, β, W
                surrounds the op in a two-stream model, to be compiled as a whole
    own         what somebody else's pooler computes, judged by itself in float64  leaves X, its parameters
                (a fused pooler is judged by its original)
"""
from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from gate import limits
from torch import Tensor, nn

from mvam_fast import reference

Op = Callable[..., tuple[Tensor, ...]]
EMBEDDING = 512  # E of "model": the width CLIP projects to


@dataclass
class Work:
    """`leaves`: inputs by name, the tokens X [B,N,D] first; `d_outputs`: the gradients that backward starts from.

    Outputs and their gradients have the batch first, as has the gradient of X; those of other leaves are sums over it.
    """

    name: str
    specification: Op
    leaves: dict[str, Tensor]
    d_outputs: dict[str, Tensor]
    forward_flops: int | None = None
    backward_flops: int | None = None

    @functools.cached_property
    def limits(self) -> dict[str, float]:
        """How far each result of a provider may be from float64; see gate.py."""
        return limits(self)

    def moved_bytes(self, mode: str) -> int:
        """Least traffic: forward reads the leaves and writes the outputs; backward reads the leaves and the outputs'
        gradients and writes the leaves' gradients."""
        leaves, outputs = (sum(t.nbytes for t in ts.values()) for ts in (self.leaves, self.d_outputs))
        forward, backward = leaves + outputs, 2 * leaves + outputs
        return {"forward": forward, "backward": backward, "forward+backward": forward + backward}[mode]

    def flops(self, mode: str) -> int | None:
        """Least arithmetic, where it is known: nothing is computed twice."""
        if self.forward_flops is None:
            return None
        both = {"forward": self.forward_flops, "backward": self.backward_flops}
        return both.get(mode, sum(both.values()))


class Draw:
    """Random tensors, the same in every run."""

    def __init__(self, dtype: torch.dtype, device: torch.device):
        self.generator = torch.Generator().manual_seed(0)
        self.dtype, self.device = dtype, device

    def __call__(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.randn(*shape, generator=self.generator).to(self.device, dtype or self.dtype)


def normed_pool(tokens: Tensor, codes: Tensor, gain: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    return reference.multi_view_pool(tokens, codes, norm_weight=gain, norm_bias=bias)


def around(op: Op, norm_inside: bool) -> Op:
    """The end of a two-stream model's tower around `op`, which brings its own LayerNorm if `norm_inside`."""

    def model(tokens, codes, gain, bias, projection):
        if norm_inside:
            pooled, gram = op(tokens, codes, gain, bias)
        else:
            pooled, gram = op(F.layer_norm(tokens, gain.shape, gain, bias), codes)
        return F.normalize((pooled @ projection).flatten(1), dim=-1), gram

    return model


def works(batch: int, length: int, width: int, views: int, dtype: torch.dtype, device: torch.device) -> dict[str, Work]:
    """"pool", "norm+pool" and "model" on the same tokens and codes."""
    draw = Draw(dtype, device)
    leaves = {"X": draw(batch, length, width), "C": draw(views, width)}
    norm = {"γ": 1 + 0.1 * draw(width), "β": 0.1 * draw(width)}
    projection = {"W": width**-0.5 * draw(width, EMBEDDING)}
    pooled, gram = draw(batch, views, width), draw(batch, views, views, dtype=torch.float32)
    embedding = draw(batch, views * EMBEDDING)
    for leaf in (*leaves.values(), *norm.values(), *projection.values()):
        leaf.requires_grad_()
    table = batch * views * length  # entries of A
    # S, P and G; backward dP Xᵀ, H A, two products for dX, and dC, given A.
    forward, backward = 4 * table * width + 2 * table * views, 8 * table * width + 2 * table * views
    return {
        "pool": Work("pool", reference.multi_view_pool, leaves, {"P": pooled, "G": gram}, forward, backward),
        "norm+pool": Work("norm+pool", normed_pool, leaves | norm, {"P": pooled, "G": gram}, forward, backward),
        "model": Work("model", around(normed_pool, True), leaves | norm | projection, {"f": embedding, "G": gram}),
    }


def own_work(module: nn.Module, tokens: Tensor) -> Work:
    """What `module` makes of the tokens, differentiated in them and in its parameters, less those that are frozen."""
    leaves = {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
    frozen = {name: parameter for name, parameter in module.named_parameters() if not parameter.requires_grad}

    def specification(tokens, *parameters):
        given = {name: parameter.to(tokens.dtype) for name, parameter in frozen.items()}
        given |= zip(leaves, parameters, strict=True)
        return _tupled(torch.func.functional_call(module, given, (tokens,)))

    with torch.no_grad():
        (output,) = _tupled(module(tokens[:1]))
    d_output = Draw(tokens.dtype, tokens.device)(len(tokens), *output.shape[1:])
    return Work("own", specification, {"X": tokens, **leaves}, {"Y": d_output})


def own_op(module: nn.Module) -> Op:
    """`module` as an op over its own leaves: tokens first, then parameters, which it holds itself."""
    return lambda tokens, *_: _tupled(module(tokens))


def _tupled(output) -> tuple[Tensor, ...]:
    return output if isinstance(output, tuple) else (output,)
