"""What runs a tower: the contract between the Encoder and its backends."""
from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor


class Runner(Protocol):
    """Both towers of one model on one device.

    Several threads may call `run` at once. After `close`, which may be called twice, it is not called any more.
    """

    device: torch.device

    def run(self, tower: str, inputs: Tensor) -> Tensor:
        """`tower` is "image" or "text"; `inputs` [B ≥ 1, ...] is contiguous, on `device` and of the manifest's dtype.

        Returns L2-normalised float32 [B,F] on `device`, ordered on the caller's stream. It belongs to the caller:
        later calls leave it alone.
        """

    def close(self) -> None:
        """Frees what the towers hold."""
