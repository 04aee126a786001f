"""TensorRT's Python library: whether it can be used here, what it says when something fails, what it runs on."""
from __future__ import annotations

import importlib
import platform
import re
import subprocess
from types import ModuleType
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    import tensorrt as trt

OLDEST, BEYOND = (10, 12), (12,)  # versions with strong typing for all that is exported, and one API
HOW_TO_GET_IT = (
    "pip install 'tensorrt>=10.12,<12' (checked against the API of 10.13, 10.16 and 11.4). pip takes libraries from "
    "NVIDIA's own package index, https://pypi.nvidia.com; where it does not find them, add --extra-index-url "
    "https://pypi.nvidia.com"
)


class Missing(RuntimeError):
    """Something that building an engine needs is not there; the message says what, and how to get it."""


def numbers(version: str) -> tuple[int, ...]:
    """ "11.4.0.106" → (11, 4, 0, 106)."""
    return tuple(int(part) for part in re.findall(r"\d+", version)[:4])


def unsupported(version: str) -> str:
    """Why this version of TensorRT is not for use; empty if it is."""
    if OLDEST <= numbers(version) < BEYOND:
        return ""
    return f"TensorRT {version} is installed; needed is 10.12 or later, before 12"


def find(device: int) -> ModuleType:
    """The module `tensorrt`, for use on CUDA device number `device`. Missing names all that is not there."""
    module, lacking = None, []
    try:
        module = importlib.import_module("tensorrt")
    except (ImportError, OSError) as error:
        absent = isinstance(error, ModuleNotFoundError) and error.name == "tensorrt"
        what = "it is not installed" if absent else f"it is installed but does not load ({error})"
        lacking.append(f"TensorRT: {what}; get it with {HOW_TO_GET_IT}")
    if module is not None and unsupported(module.__version__):
        lacking.append(f"{unsupported(module.__version__)}; get one with {HOW_TO_GET_IT}")
    if not torch.cuda.is_available():
        lacking.append(
            f"a GPU: PyTorch {torch.__version__} sees no CUDA device. An engine is built on the GPU that will run it: "
            "repeat this there, with a PyTorch built for CUDA (--dry-run checks the rest anywhere)"
        )
    elif not 0 <= device < torch.cuda.device_count():
        lacking.append(f"device {device}: PyTorch sees {torch.cuda.device_count()} CUDA device(s), counted from 0")
    if lacking:
        raise Missing("what is missing:\n" + "\n".join(f"- {item}" for item in lacking))
    return module


def listen(trt: ModuleType) -> trt.ILogger:
    """A logger that keeps what TensorRT says; `said()` gives the last errors, or warnings where there are none."""

    class Log(trt.ILogger):
        def __init__(self):
            trt.ILogger.__init__(self)  # pybind's classes do not take super().__init__()
            self.errors: list[str] = []
            self.warnings: list[str] = []

        def log(self, severity: trt.ILogger.Severity, msg: str) -> None:
            if severity in (trt.ILogger.Severity.INTERNAL_ERROR, trt.ILogger.Severity.ERROR):
                self.errors.append(msg.strip())
            elif severity == trt.ILogger.Severity.WARNING:
                self.warnings.append(msg.strip())

        def said(self) -> str:
            return "; ".join((self.errors or self.warnings)[-5:]) or "TensorRT says nothing more"

    return Log()


def here(device: int, trt: ModuleType) -> dict[str, str]:
    """What decides whether an engine can run: GPU, versions, platform."""
    about = torch.cuda.get_device_properties(device)
    return {
        "gpu": about.name,
        "compute_capability": f"{about.major}.{about.minor}",
        "tensorrt": trt.__version__,
        "cuda": torch.version.cuda or "",
        "driver": _driver(),
        "platform": f"{platform.system()} {platform.machine()}",
    }


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        lines = subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.split()
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return lines[0] if lines else ""
