"""Preprocessed input: checked against what a tower takes, brought onto its device, and back again."""
from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

ARGUMENTS = {"image": "images", "text": "token_ids"}  # how encode_image and encode_text call it
# Kinds of dtypes, as numpy names them, but that "u" is uint8 alone.
_KINDS = {
    "f": ("f", "floating point", ", normalised as training's transform does"),
    "u": ("u", "uint8", ", the pixels as they are"),
    "i": ("iu", "integers", ""),
}


class TowerInput:
    """What one tower takes.

    Attributes:
        row: shape of one sample; dtype, numpy_dtype: the runner's, which others of the same kind are converted to.
    """

    def __init__(self, tower: str, spec: dict, device: torch.device):
        self.row, self.dtype = tuple(spec["shape"][1:]), getattr(torch, spec["dtype"])
        self.numpy_dtype = np.dtype(spec["dtype"])
        self._argument, self._device = ARGUMENTS[tower], device
        self._kinds, name, remark = _KINDS[_kind(self.dtype)]
        shape = f"[{', '.join(map(str, ('B', *self.row)))}]"
        self._wanted, self._shape = f"{name} {shape}{remark}", shape

    def tensor(self, value: np.ndarray | Tensor) -> Tensor:
        """`value` as the runner wants it. Shares its memory where device, dtype and layout are right already.

        Copied are: what has another dtype of the same kind, is not contiguous or is on another device; and arrays that
        are read-only, which PyTorch does not know.
        """
        if isinstance(value, Tensor):
            self._check(value, _kind(value.dtype))
            # From the CPU only: a copy to the CPU would have to be waited for.
            value = value.detach().to(self._device, self.dtype, non_blocking=self._device.type == "cuda")
            return value.contiguous()
        if not isinstance(value, np.ndarray):
            found = type(value).__name__
            raise TypeError(f"{self._argument} is a {found}; it must be an array or a tensor, {self._wanted}")
        self._check(value, "u" if value.dtype == np.uint8 else value.dtype.kind.replace("u", "i"))
        value = np.ascontiguousarray(value, self.numpy_dtype)
        return torch.from_numpy(value if value.flags.writeable else value.copy()).to(self._device)

    def _check(self, value: np.ndarray | Tensor, kind: str) -> None:
        if kind not in self._kinds:
            dtype = str(value.dtype).removeprefix("torch.")
            raise TypeError(f"{self._argument} has dtype {dtype}; it must be {self._wanted}")
        if not value.ndim or value.shape[1:] != self.row:
            raise ValueError(f"{self._argument} has shape {list(value.shape)}; it must be {self._shape}")


def _kind(dtype: torch.dtype) -> str:
    if dtype.is_floating_point:
        return "f"
    return "u" if dtype == torch.uint8 else "other" if dtype == torch.bool or dtype.is_complex else "i"


def as_given(found: Tensor, value: np.ndarray | Tensor) -> np.ndarray | Tensor:
    """`found` in the form of the input `value`: an array, or a tensor on the same device."""
    return found.cpu().numpy() if isinstance(value, np.ndarray) else found.to(value.device)
