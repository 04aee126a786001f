"""Does a pooler give the same when fused? Asked of a bare copy, so that nobody's hooks, mode or buffers notice.

Twice: in float64 (float32 if the pooler cannot run in it), where only wrong algebra makes a difference, whatever the
module's own precision; and in the module's own precision and place, where the fused pooler may err by twice what the
original errs. Inputs come from a generator of their own.
"""
from __future__ import annotations

import torch
from torch import Tensor, nn

from ..autograd import autocast_off
from .features import HOOKS

# Far above the rounding of modules that compute in float32 whatever they are given, far below any mistake.
_ALGEBRA = 1e-5
_ROUNDING = 1e-5
_WIDE = (torch.float64, torch.float32)


def compare(name: str, module: nn.Module, fused: type[nn.Module], examples) -> str:
    """Why `module` cannot be run as its library runs it; empty if it can, and `fused` gives the same.

    `examples`: arguments for its forward, tensors on the CPU in float32. RuntimeError if outputs differ.
    """
    parameter = next(module.parameters())
    try:
        wide, exact = _exact(module, examples)
        given = [_place(arguments, parameter.dtype, parameter.device) for arguments in examples]
        own = _outputs(type(module), _bare(module), given)
        if not all(output.isfinite().all() for output in exact):
            raise ValueError("its outputs are not finite")
    except Exception as error:  # whatever it is: what cannot run cannot be compared
        return f"it could not be verified, its own forward failed: {type(error).__name__}: {error}"
    widened = _outputs(fused, _bare(module, wide, "cpu"), [_place(arguments, wide, "cpu") for arguments in examples])
    _judge(name, module, _error(widened, exact), _ALGEBRA, wide)
    found = _outputs(fused, _bare(module), given)
    for one, other in zip(found, own, strict=True):
        if one.shape != other.shape or one.dtype != other.dtype:
            raise RuntimeError(
                f"fused, {name!r} ({type(module).__name__}) gives {tuple(one.shape)} {one.dtype} instead of "
                f"{tuple(other.shape)} {other.dtype}; nothing was changed"
            )
    # The original's own error can be 0 by luck, and in float32 1e-5 is what the kernels are held to.
    allowed = 2 * _error(own, exact) + max(4 * torch.finfo(parameter.dtype).eps, _ROUNDING)
    _judge(name, module, _error(found, exact), allowed, parameter.dtype)
    return ""


def _judge(name: str, module: nn.Module, error: float, allowed: float, dtype: torch.dtype) -> None:
    if not error <= allowed:  # NaN too
        raise RuntimeError(
            f"fused, {name!r} ({type(module).__name__}) gives other values: in {dtype} they differ by {error:.1e} of "
            f"the largest, {allowed:.1e} is allowed; nothing was changed"
        )


def _exact(module: nn.Module, examples) -> tuple[torch.dtype, list[Tensor]]:
    """The original's outputs in the widest precision in which it runs, and that precision."""
    for dtype in _WIDE:
        given = [_place(arguments, dtype, "cpu") for arguments in examples]
        try:
            return dtype, _outputs(type(module), _bare(module, dtype, "cpu"), given)
        except RuntimeError:  # LayerNormFp32, for one, takes no float64
            if dtype == _WIDE[-1]:
                raise


def _outputs(cls: type[nn.Module], module: nn.Module, examples: list[tuple]) -> list[Tensor]:
    """All outputs of `cls.forward` for these arguments, on a bare copy, which it turns into a `cls`."""
    module.__class__ = cls
    outputs = []
    with torch.no_grad(), autocast_off(next(module.parameters()).device.type):
        for arguments in examples:
            output = cls.forward(module, *arguments)
            outputs += output if isinstance(output, tuple) else [output]
    return outputs


def _place(arguments: tuple, dtype: torch.dtype, device) -> tuple:
    def place(value):
        if not isinstance(value, Tensor):
            return value
        return value.to(device, dtype) if value.is_floating_point() else value.to(device)

    return tuple(place(value) for value in arguments)


def _error(found: list[Tensor], exact: list[Tensor]) -> float:
    """Largest deviation in all outputs, each relative to its largest value."""
    errors = []
    for one, other in zip(found, exact, strict=True):
        largest = other.abs().max().clamp_min(1e-30)  # all weights may be 0
        errors.append((one.cpu().double() - other).abs().max() / largest)
    return float(torch.stack(errors).max())


def _bare(module: nn.Module, dtype: torch.dtype | None = None, device=None) -> nn.Module:
    """A copy in eval mode without hooks, compiled calls or replaced forwards; without a dtype it shares parameters."""
    copy = module.__class__.__new__(module.__class__)
    copy.__dict__.update(module.__dict__)
    copy.__dict__.pop("forward", None)
    empty = {hooks: type(getattr(module, hooks))() for hooks in HOOKS}

    def place(value: Tensor | None) -> Tensor | None:
        if value is None or dtype is None:
            return None if value is None else value.detach()
        return value.detach().to(device, dtype if value.is_floating_point() else value.dtype)

    copy.__dict__.update(
        empty,
        training=False,
        _compiled_call_impl=None,
        _parameters={name: place(value) for name, value in module._parameters.items()},
        _buffers={name: None if value is None else place(value).clone() for name, value in module._buffers.items()},
        _modules={
            name: None if child is None else _bare(child, dtype, device) for name, child in module._modules.items()
        },
    )
    return copy
