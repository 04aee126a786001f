"""The gate: no time is taken of a provider whose results are wrong on the very inputs that are timed.

Every output and every gradient is compared with float64 by ‖found − exact‖ / ‖exact‖. Allowed is twice the error of
plain PyTorch in the same precision on the same inputs, at least FLOOR (what rounding alone does) and at most CAP.
The exact results are computed in chunks over the batch, so that a batch which fills a GPU can still be judged.
"""
from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from work import Op, Work

FLOOR = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}
CAP = 5e-2
CHUNK = 1 << 26  # elements of the tokens that are judged at once in float64


class Wrong(Exception):
    """A result is not what it should be; the message names it."""


class Unavailable(Exception):
    """A provider cannot run here; the message is the reason shown in its rows."""


def reason(error: Exception) -> str:
    """One line that says why there is no number."""
    if isinstance(error, torch.OutOfMemoryError):
        torch.cuda.empty_cache()
    text = str(error) if isinstance(error, (Unavailable, Wrong)) else f"{type(error).__name__}: {error}"
    return (text.strip().splitlines() or [type(error).__name__])[0][:200]


def outputs_of(op: Op, work: Work) -> dict[str, Tensor]:
    """The outputs by name, computed as inference does: the op may take another path than in training."""
    with torch.no_grad():
        return dict(zip(work.d_outputs, op(*work.leaves.values()), strict=True))


def results_of(op: Op, work: Work) -> dict[str, Tensor]:
    """Outputs and gradients (dX, dC, …) by name."""
    return _differentiated(op, list(work.leaves.values()), list(work.d_outputs.values()), work)


def check(found: dict[str, Tensor], work: Work) -> dict[str, float]:
    """The errors of `found`: outputs alone, or all gradients too; Wrong if one is too large, no number, or missing."""
    expected = work.d_outputs.keys() if found.keys() <= work.d_outputs.keys() else work.limits.keys()
    if missing := sorted(expected - found.keys()):
        raise Wrong(f"wrong: there is no {', '.join(missing)}")
    errors = errors_of(found, work)
    for name, error in errors.items():
        if not error <= work.limits[name]:
            raise Wrong(f"wrong: {name} is off by {error:.1e}, allowed {work.limits[name]:.1e}")
    return errors


def limits(work: Work) -> dict[str, float]:
    floor = FLOOR[work.leaves["X"].dtype]
    plain = errors_of(results_of(work.specification, work), work)
    return {name: min(CAP, max(floor, 2 * error)) for name, error in plain.items()}


def errors_of(found: dict[str, Tensor], work: Work) -> dict[str, float]:
    """‖found − exact‖ / ‖exact‖ of each result that was found."""
    tokens = work.leaves["X"]
    others = [leaf.detach().double().requires_grad_() for leaf in list(work.leaves.values())[1:]]
    by_sample = {*work.d_outputs, "dX"}
    off, size, sums = dict.fromkeys(found, 0.0), dict.fromkeys(found, 0.0), {}

    def judge(name: str, value: Tensor, exact: Tensor) -> None:
        if value.shape != exact.shape:
            raise Wrong(f"wrong: {name} is {list(value.shape)}, must be {list(exact.shape)}")
        off[name] += float((value.detach().double() - exact).square().sum())
        size[name] += float(exact.square().sum())

    step = max(CHUNK // max(tokens[0].numel(), 1), 1)
    for start in range(0, len(tokens), step):
        part = slice(start, start + step)
        leaves = [tokens[part].detach().double().requires_grad_(), *others]
        exact = _differentiated(work.specification, leaves, [g[part] for g in work.d_outputs.values()], work)
        for name in found:
            if name in by_sample:
                judge(name, found[name][part], exact[name])
            else:
                sums[name] = sums.get(name, 0) + exact[name]
    for name, exact in sums.items():
        judge(name, found[name], exact)
    return {name: math.sqrt(off[name] / size[name]) if size[name] else math.sqrt(off[name]) for name in found}


def _differentiated(op: Op, leaves: list[Tensor], d_outputs: list[Tensor], work: Work) -> dict[str, Tensor]:
    outputs = op(*leaves)
    gradients = [g.to(o.dtype) for g, o in zip(d_outputs, outputs, strict=True)]
    found = torch.autograd.grad(outputs, leaves, gradients, allow_unused=True)
    named = dict(zip(work.d_outputs, (o.detach() for o in outputs), strict=True))
    return named | {f"d{name}": g for name, g in zip(work.leaves, found, strict=True) if g is not None}
