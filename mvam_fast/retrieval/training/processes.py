"""Devices and processes of a training, by accelerate."""
from __future__ import annotations

import contextlib
import datetime

import torch

from ..._optional import require
from .config import TrainConfig


@contextlib.contextmanager
def accelerator_of(config: TrainConfig):
    accelerate = require("accelerate", extra="train")
    state = require("accelerate.state", extra="train")
    device = config.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device is 'cuda', but PyTorch sees no GPU; it must be cpu or auto here")
    if device == "cpu" and config.precision == "amp_fp16":
        raise ValueError("precision is 'amp_fp16', which needs a GPU; on a CPU it must be fp32 or amp_bf16")
    alone = not state.PartialState._shared_state  # nobody else in this process uses accelerate
    wait = accelerate.InitProcessGroupKwargs(timeout=datetime.timedelta(hours=3))  # for the evaluation of process 0
    try:
        yield accelerate.Accelerator(
            cpu=device == "cpu", kwargs_handlers=[wait],
            mixed_precision={"fp32": "no", "amp_bf16": "bf16", "amp_fp16": "fp16"}[config.precision],
        )  # fmt: skip
    finally:
        if alone:  # its settings are global, and the next training may need others
            if torch.distributed.is_available() and torch.distributed.is_initialized():
                torch.distributed.destroy_process_group()
            state.AcceleratorState._reset_state(reset_partial_state=True)


def check_agreement(accelerator, what: str, value) -> None:
    """Every process looks at OUT itself; where they see different folders, they would train apart or wait forever."""
    if accelerator.num_processes > 1:
        found = require("accelerate.utils", extra="train").gather_object([value])
        if len(set(found)) > 1:
            raise ValueError(
                f"out: the processes disagree on {what}: {found}; it must be one folder that all of them see"
            )
