"""Which path the op takes, and why: decided per call from the device, the dtypes, the widths and the user's wish."""
from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
import threading
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

BACKENDS = ("auto", "triton", "torch")
_SUPPORTED = "the kernels support these inputs"


class Path(NamedTuple):
    """`forward`, `backward`: "triton", "torch" or "reference"; `reason`: why, in words.

    `norm_fused`: whether the LayerNorm in front, if there is one, runs inside the kernels.
    """

    forward: str
    backward: str
    reason: str
    norm_fused: bool = False


_state = threading.local()


def _constant_when_traced(function):
    """`torch.compiler.assume_constant_result`, which imports torch._dynamo (a second) for setting this mark."""
    function._dynamo_marked_constant = True
    return function


def last_backend() -> Path | None:
    """The path that this thread's last `multi_view_pool` took, and why; None before the first call.

    A compiled graph decides once, while it is traced, and does not update this.
    """
    return getattr(_state, "path", None)


# How exporters have the pooling written: (tokens, codes, valid or None, scale) → P, or None for plain operators.
GraphForm = Callable[[Tensor, Tensor, "Tensor | None", float], "Tensor | None"]
_graph_form: GraphForm | None = None


@contextlib.contextmanager
def exporting_as(form: GraphForm) -> Iterator[None]:
    """While it lasts, graphs that are exported get `form(...)` where they would get the specification's operators.

    It is asked only for what one fused operator can do: codes [M,D] shared by the samples, no separate keys, no Gram
    matrix. Tokens [B,N,D] come normalised; those that `valid` [B,N] excludes may hold anything.
    """
    global _graph_form
    before, _graph_form = _graph_form, form
    try:
        yield
    finally:
        _graph_form = before


def graph_form() -> GraphForm | None:
    """The form that `exporting_as` has set, for the whole process: a variable that Dynamo can read while it traces."""
    return _graph_form


def choose(tokens: Tensor, codes: Tensor, keys: Tensor | None, backend: str, *, norm: bool = False) -> Path:
    """The path for these inputs. A wish for "triton" that cannot be met is an error; "auto" then says why it is not."""
    if backend not in BACKENDS:
        raise ValueError(f"backend is {backend!r}; it must be one of {', '.join(BACKENDS)}")
    if _exporting() or torch.jit.is_tracing():
        return Path("reference", "reference", "a graph is being exported: plain operators only")
    source = "the backend argument"
    if backend == "auto":
        backend, source = _environment()
    if backend == "torch":
        path = Path("torch", "torch", f"{source} asks for torch")
    elif backend == "auto" and tokens.device.type == "cpu":
        path = Path("torch", "torch", "the tokens are on the CPU (Triton's interpreter runs only when asked for)")
    else:
        path = _kernel_path(tokens, codes, keys, norm)
        if backend == "triton":
            if path.forward != "triton":
                raise ValueError(f"{source} asks for triton, which cannot run here: {path.reason}")
            path = path._replace(reason=f"{source} asks for triton") if path.reason == _SUPPORTED else path
    if not torch.compiler.is_compiling():
        _state.path = path
    return path


@_constant_when_traced
def _exporting() -> bool:
    """Asked of Python: inside a traced function Dynamo takes torch.compiler.is_exporting() for True, always."""
    return torch.compiler.is_exporting()


@_constant_when_traced
def _environment() -> tuple[str, str]:
    wish = os.environ.get("MVAM_BACKEND", "auto")
    if wish not in BACKENDS:
        raise ValueError(f"the environment variable MVAM_BACKEND is {wish!r}; it must be one of {', '.join(BACKENDS)}")
    return wish, "the environment variable MVAM_BACKEND"


def _kernel_path(tokens: Tensor, codes: Tensor, keys: Tensor | None, norm: bool) -> Path:
    key_width = None if keys is None else keys.shape[2]
    given = (tokens.device.type, tokens.device.index, tokens.dtype, tokens.shape[2], key_width, codes.shape[-2])
    if norm:
        fused_no = "keys are separate" if keys is not None else next(filter(None, _kernel_obstacles(*given, True)), "")
        if not fused_no:
            return Path("triton", "triton", _SUPPORTED, norm_fused=True)
    forward_no, backward_no = _kernel_obstacles(*given, False)
    if forward_no:
        return Path("torch", "torch", forward_no)
    reason = _SUPPORTED
    if backward_no:
        reason = f"forward: a kernel exists; backward: {backward_no}"
    if norm:
        reason += f"; the LayerNorm is not fused: {fused_no}"
    return Path("triton", "torch" if backward_no else "triton", reason)


@_constant_when_traced
def _kernel_obstacles(*given) -> tuple[str, str]:
    return _obstacles(*given)


@functools.cache
def _obstacles(
    device: str, index: int | None, dtype: torch.dtype, width: int, key_width: int | None, views: int, norm: bool
) -> tuple[str, str]:
    """Why the forward, and the backward, kernel cannot run: two reasons, each empty where it can."""
    if device == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        return ("the tokens are on the CPU and TRITON_INTERPRET is not 1",) * 2
    if device not in ("cpu", "cuda") or (device == "cuda" and torch.version.hip is not None):
        return (f"the kernels are built for NVIDIA GPUs, the tokens are on {device}",) * 2
    if importlib.util.find_spec("triton") is None:
        return ("triton is not installed (pip install triton)",) * 2
    from .kernels import tiles

    # The interpreter has no architecture, and so no limit of shared memory.
    capability = torch.cuda.get_device_capability(index) if device == "cuda" else None
    return tuple(tiles.obstacle(kernel, capability, dtype, width, key_width, views, norm) for kernel in tiles.KERNELS)
