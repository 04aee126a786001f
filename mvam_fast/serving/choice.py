"""Which backend runs a bundle or checkpoint, on which device, and why."""
from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch

from .._optional import require
from .onnx_runner import CUDA

BACKENDS = ("auto", "onnxruntime-cpu", "onnxruntime-cuda", "torch", "aoti", "trt")
CHECKPOINT = "checkpoint"
# What runs each kind of path; the first that can is what "auto" takes.
RUN_BY = {
    "onnx": ("onnxruntime-cuda", "onnxruntime-cpu"),
    "aoti": ("aoti",),
    "trt": ("trt",),
    CHECKPOINT: ("torch",),
}


class Choice(NamedTuple):
    """`insisted`: whether the user named backend or device, so that another must not take its place."""

    backend: str
    device: torch.device
    reason: str
    insisted: bool


def check_backend(backend: str) -> None:
    if backend not in BACKENDS:
        raise ValueError(f"backend is {backend!r}; it must be one of {', '.join(BACKENDS)}")


def choose(path: Path, manifest: dict, backend: str, device: str | torch.device | None) -> Choice:
    """ValueError where the wishes contradict the path or each other, RuntimeError where this machine lacks what they
    need. `manifest`: of a checkpoint, {"kind": CHECKPOINT} will do."""
    kind = manifest["kind"]
    can = RUN_BY[kind]
    if backend not in ("auto", *can):
        what = "a checkpoint" if kind == CHECKPOINT else f"a bundle of kind {kind!r}"
        raise ValueError(f"backend is {backend!r}, but {path} is {what}, which can be run by: {', '.join(can)}")
    wish = None if device is None else _parse(device)
    if backend != "auto":
        chosen, reason = backend, f"the backend argument asks for {backend}"
    elif kind == "onnx":
        chosen, reason = _for_onnx(wish, manifest["precision"])
    else:
        chosen, reason = can[0], f"nothing else runs a {kind if kind == CHECKPOINT else f'bundle of kind {kind!r}'}"
    if chosen == "onnxruntime-cpu" and manifest["precision"] == "bf16":
        raise RuntimeError(f"{path} is in bf16, for which ONNX Runtime has no kernels on a CPU; use a GPU or fp16")
    needed, why = _device_type(chosen, manifest, wish)
    if wish is not None and wish.type != needed:
        raise ValueError(f"device is {str(device)!r}, but {why}")
    found = torch.device("cpu") if needed == "cpu" else _cuda(chosen, wish)
    return Choice(chosen, found, reason, backend != "auto" or device is not None)


def _for_onnx(wish: torch.device | None, precision: str) -> tuple[str, str]:
    if wish is not None:
        return f"onnxruntime-{wish.type}", f"the device argument asks for {wish}"
    if precision == "int8":
        return "onnxruntime-cpu", "int8 bundles are made for CPUs"
    if CUDA not in require("onnxruntime", extra="export").get_available_providers():
        return "onnxruntime-cpu", "this ONNX Runtime is built without CUDA"
    if not torch.cuda.is_available():
        return "onnxruntime-cpu", "there is no CUDA GPU"
    return "onnxruntime-cuda", "there is a CUDA GPU"


def _device_type(backend: str, manifest: dict, wish: torch.device | None) -> tuple[str, str]:
    """ "cpu" or "cuda", and why it must be."""
    if backend == "aoti":
        return manifest["device"], f"the bundle was compiled for {manifest['device']}"
    if backend == "torch":
        return (wish.type if wish is not None else "cuda" if torch.cuda.is_available() else "cpu"), ""
    found = "cpu" if backend == "onnxruntime-cpu" else "cuda"
    return found, f"{backend} runs on {found}"


def _parse(device: str | torch.device) -> torch.device:
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"device is {device!r}; it must be cpu, cuda or cuda:N") from error
    if found.type not in ("cpu", "cuda"):
        raise ValueError(f"device is {str(device)!r}; it must be cpu, cuda or cuda:N")
    return found


def _cuda(backend: str, wish: torch.device | None) -> torch.device:
    """With its number, so that it equals the device of tensors."""
    if not torch.cuda.is_available():
        raise RuntimeError(f"backend {backend!r} needs a CUDA GPU here, and PyTorch sees none")
    index = torch.cuda.current_device() if wish is None or wish.index is None else wish.index
    if index >= torch.cuda.device_count():
        raise RuntimeError(f"device is 'cuda:{index}', but PyTorch sees {torch.cuda.device_count()} CUDA GPUs")
    return torch.device("cuda", index)
