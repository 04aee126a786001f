"""Judging the op at sizes that fill a GPU: inputs drawn on the device, float64 a few samples at a time."""
from __future__ import annotations

import torch
from op_cases import Case

from mvam_fast import reference

CHUNK = 1 << 24  # elements of the tokens that are judged at once: float64 and autograd make a dozen tables of them
LEAVES = ("tokens", "codes", "keys", "norm_weight", "norm_bias")
BY_SAMPLE = ("tokens", "keys", "lengths", "mask", "d_P", "d_G", "P", "G", "d_tokens", "d_keys")


def draw(case: Case, device: str) -> dict:
    """Arguments of the op and the gradients d_P, d_G of its results, made on the device. Kinds as in op_cases."""
    generator = torch.Generator(device).manual_seed(case.batch + case.length * 1000 + case.width + case.views)

    def randn(*shape, dtype=case.dtype):
        return torch.zeros(shape, device=device, dtype=dtype).normal_(generator=generator)

    b, n, d, m = case.batch, case.length, case.width, case.views
    kinds = case.kind.split("+")
    given = {"tokens": randn(b, n + 1, d)[:, 1:] if "strided" in kinds else randn(b, n, d)}
    width = case.key_width or d
    given["codes"] = 2 * (randn(b, m, width) if "percodes" in kinds else randn(m, width))
    if case.key_width:
        given["keys"] = randn(b, n, width)
    if "lengths" in kinds:
        given["lengths"] = torch.randint(0, n + 1, (b,), generator=generator, device=device)
    if "mask" in kinds:
        given["mask"] = torch.rand(b, n, generator=generator, device=device) > 0.3
    if "norm" in kinds:  # raw tokens, each with its own mean and deviation
        given["tokens"].mul_(randn(b, n, 1).abs_() + 0.2).add_(randn(b, n, 1))
        given["norm_weight"], given["norm_bias"] = 1 + 0.3 * randn(d), 0.5 * randn(d)
    return given | {"d_P": randn(b, m, d), "d_G": randn(b, m, m, dtype=torch.float32)}


def by_sample(name: str, value: torch.Tensor) -> bool:
    return name in BY_SAMPLE or (name in ("codes", "d_codes") and value.dim() == 3)


def results(op, given: dict, dtype: torch.dtype, rows: slice = slice(None), **options) -> dict[str, torch.Tensor]:
    """P, G and the gradients of all inputs, computed in `dtype` for the samples in `rows`."""
    part = {name: value[rows] if by_sample(name, value) else value for name, value in given.items()}
    d_outputs = part.pop("d_P"), part.pop("d_G")
    leaves = {
        name: value.detach().to(dtype).requires_grad_() for name, value in part.items() if value.is_floating_point()
    }
    outputs = op(**{**part, **leaves}, **options)
    gradients = [gradient.to(output.dtype) for gradient, output in zip(d_outputs, outputs, strict=True)]
    found = torch.autograd.grad(outputs, list(leaves.values()), gradients)
    return {
        "P": outputs[0].detach(), "G": outputs[1].detach(),
        **{f"d_{name}": gradient for name, gradient in zip(leaves, found, strict=True)},
    }  # fmt: skip


class Error:
    """How far a result is from the exact one, summed up over its parts."""

    def __init__(self):
        self.off = self.most = self.off_squares = self.squares = torch.zeros((), dtype=torch.float64)

    def add(self, found: torch.Tensor, exact: torch.Tensor) -> None:
        difference = (found.double() - exact).flatten()
        exact = exact.flatten()
        self.off = torch.maximum(self.off, difference.abs().max().cpu())  # unlike Python's max, it lets NaN through
        self.most = torch.maximum(self.most, exact.abs().max().cpu())
        self.off_squares = self.off_squares + difference.dot(difference).cpu()
        self.squares = self.squares + exact.dot(exact).cpu()

    def measures(self) -> dict[str, float]:
        """Largest deviation over the largest exact value (absolute below 1, as in op_cases), and over all values."""
        return {
            "largest": float(self.off / self.most.clamp_min(1.0)),
            "Frobenius": float((self.off_squares / self.squares.clamp_min(1e-30)).sqrt()),
        }


def errors(given: dict, found: dict[str, torch.Tensor]) -> tuple[dict[str, Error], dict[str, Error]]:
    """Of what was found, and of plain PyTorch in the same precision; both against float64 on the same inputs."""
    tokens = given["tokens"]
    ours, plain = ({name: Error() for name in found} for _ in range(2))
    sums: dict[str, list[torch.Tensor]] = {}
    step = max(CHUNK // max(tokens[0].numel(), 1), 1)
    for start in range(0, len(tokens), step):
        rows = slice(start, start + step)
        exact = results(reference.multi_view_pool, given, torch.float64, rows)
        same = results(reference.multi_view_pool, given, tokens.dtype, rows)
        for name, value in exact.items():
            if by_sample(name, value):
                ours[name].add(found[name][rows], value)
                plain[name].add(same[name], value)
            else:  # a sum over the samples
                before = sums.get(name, [0, 0])
                sums[name] = [before[0] + value, before[1] + same[name].double()]
    for name, (value, rounded) in sums.items():
        ours[name].add(found[name], value)
        plain[name].add(rounded, value)
    return ours, plain


def check(given: dict, found: dict[str, torch.Tensor]) -> None:
    """At most twice the error of plain PyTorch in the same precision, at least one rounding; 1e-5 in float32.

    By the Frobenius norm. It does not show one wrong value among 1e8, so the largest deviation is held too; in half
    precision to four times PyTorch's, since of two such extremes one is now and then three times the other.
    """
    half = given["tokens"].dtype != torch.float32
    least = torch.finfo(given["tokens"].dtype).eps / 2 if half else 5e-6
    ours, plain = errors(given, found)
    assert set(ours) == {"P", "G"} | {f"d_{name}" for name in given if name in LEAVES}
    for name in ours:
        theirs = plain[name].measures()
        for measure, error in ours[name].measures().items():
            allowed = (4 if half and measure == "largest" else 2) * max(theirs[measure], least)
            assert error <= allowed, f"{name}, {measure}: {error:.2e}, allowed {allowed:.2e}"
