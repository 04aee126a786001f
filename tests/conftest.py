"""Without a GPU the kernels run through Triton's interpreter, which must be chosen before triton loads."""
import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def _poisoned_empty(monkeypatch):
    """torch.empty hands out NaN, so that a kernel that leaves a value unwritten cannot pass by luck."""
    empty = torch.empty

    def poisoned(*size, **options):
        tensor = empty(*size, **options)
        if tensor.is_floating_point() and not tensor.is_meta:
            tensor.detach().fill_(float("nan"))
        return tensor

    monkeypatch.setattr(torch, "empty", poisoned)


@pytest.fixture(autouse=True)
def _exact_float32():
    """No TF32 in what the kernels are compared with."""
    torch.backends.cuda.matmul.allow_tf32 = False


@pytest.fixture
def device():
    return DEVICE
