"""What tests/test_gpu.py judges with, on small sizes, so that it is known to work before it meets a GPU."""
import gpu_checks
import pytest
import torch
from gpu_checks import check, draw, results
from op_cases import Case

from mvam_fast.functional import multi_view_pool

pytest.importorskip("triton")
KINDS = ["plain", "lengths", "norm+lengths", "mask+strided", "percodes"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_kernels_pass(kind, dtype, device, monkeypatch):
    monkeypatch.setattr(gpu_checks, "CHUNK", 2 * 40 * 64)  # several chunks, the last one shorter
    given = draw(Case(5, 40, 64, 4, kind=kind, dtype=dtype), device)
    check(given, results(multi_view_pool, given, dtype, backend="triton"))


def test_kernels_pass_with_keys(device):
    given = draw(Case(3, 21, 64, 5, key_width=40, kind="lengths"), device)
    check(given, results(multi_view_pool, given, torch.float32, backend="triton"))


@pytest.mark.parametrize("name", ["P", "G", "d_tokens", "d_codes", "d_norm_weight", "d_norm_bias"])
@pytest.mark.parametrize("wrong", ["one value", "everything a little", "NaN"])
def test_what_is_wrong_anywhere_is_found(name, wrong, device):
    given = draw(Case(5, 20, 64, 4, kind="norm"), device)
    found = results(multi_view_pool, given, torch.float32, backend="torch")
    check(given, found)
    found[name] = found[name].clone()
    if wrong == "everything a little":
        found[name] *= 1 + 1e-4
    else:
        found[name].view(-1)[-1] = float("nan") if wrong == "NaN" else found[name].view(-1)[-1] + 0.01
    with pytest.raises(AssertionError, match=f"^{name}, "):
        check(given, found)
