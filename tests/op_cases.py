"""Inputs for the op in many shapes, and all its results at once, for comparing one path with another."""
from __future__ import annotations

from dataclasses import dataclass, field

import torch


@dataclass
class Case:
    """One set of inputs. `kind`: what is special about it (see `inputs`)."""

    batch: int
    length: int
    width: int
    views: int
    key_width: int | None = None
    kind: str = "plain"
    dtype: torch.dtype = torch.float32
    options: dict = field(default_factory=dict)

    def __str__(self):
        keys = f"-keys{self.key_width}" if self.key_width else ""
        return f"{self.batch}x{self.length}x{self.width}-m{self.views}{keys}-{self.kind}-{str(self.dtype)[6:]}"


def inputs(case: Case, device: str) -> dict:
    """tokens, codes, keys, lengths, mask of a case, deterministic."""
    generator = torch.Generator().manual_seed(case.length * 1000 + case.width + case.views)

    def randn(*shape):
        return torch.randn(*shape, generator=generator).to(device, case.dtype)

    b, n, d, m = case.batch, case.length, case.width, case.views
    kinds = case.kind.split("+")
    tokens = randn(b, n + 2, d)[:, 1 : n + 1] if "strided" in kinds else randn(b, n, d)
    if "transposed" in kinds:  # the last axis is not contiguous
        tokens = randn(b, d, n).mT
    if "large" in kinds:  # logits of some hundreds
        tokens = tokens * 40
    if "negative" in kinds:  # logits of valid tokens far below 0, which is the logit of a token that is zeroed
        tokens = tokens.abs()
    if "constant" in kinds:  # every token equal: attention is uniform
        tokens = tokens[:, :1].expand(b, n, d)
    dk = case.key_width or d
    codes = randn(b, m, dk) if "percodes" in kinds else randn(m, dk)
    if "negative" in kinds:
        codes = -100 * codes.abs()
    keys = None if case.key_width is None else randn(b, n, dk)
    lengths = mask = None
    if "lengths" in kinds:  # full, empty, one token, and in between
        counts = [[n, 0, min(1, n), (2 * n) // 3][i % 4] for i in range(b)]
        lengths = torch.tensor(counts, dtype=torch.int64, device=device)
    if "mask" in kinds:
        mask = torch.rand(b, n, generator=generator).to(device) > 0.5
        mask[:1] = True
        if b > 1:
            mask[1] = False  # an empty sample
        if b > 2:
            mask[2] = torch.arange(n, device=device) >= n // 2  # whole tiles masked before the first valid token
    if "garbage" in kinds:  # NaN where nothing may be read
        valid = mask if mask is not None else torch.arange(n, device=device) < lengths[:, None]
        tokens = torch.where(valid[..., None], tokens, tokens.new_full((), float("nan")))
    given = {"tokens": tokens, "codes": codes, "keys": keys, "lengths": lengths, "mask": mask}
    if "norm" in kinds:  # raw tokens, each with its own mean and deviation, and a LayerNorm to pass
        size = torch.rand(b, n, 1, generator=generator).to(device, case.dtype) * 3 + 0.2
        given["tokens"] = tokens * size + (5 * size if "shifted" in kinds else randn(b, n, 1))
        given["norm_weight"] = 1 + 0.3 * randn(d)
        given["norm_bias"] = None if "unbiased" in kinds else 0.5 * randn(d)
    return given


def results(op, given: dict, dtype: torch.dtype, *, need_gram=True, **options) -> dict[str, torch.Tensor]:
    """P, G and the gradients of every input of `op` computed in `dtype`, for fixed random gradients of P and G."""
    leaves = {
        name: given[name].detach().to(dtype).requires_grad_()
        for name in ("tokens", "codes", "keys", "norm_weight", "norm_bias")
        if given.get(name) is not None
    }
    pooled, gram = op(**leaves, lengths=given["lengths"], mask=given["mask"], need_gram=need_gram, **options)
    generator = torch.Generator().manual_seed(1)
    outputs, gradients = [pooled], [torch.randn(pooled.shape, generator=generator).to(given["tokens"].dtype)]
    if need_gram:
        outputs.append(gram)
        gradients.append(torch.randn(gram.shape, generator=generator))
    gradients = [g.to(o.device, o.dtype) for g, o in zip(gradients, outputs, strict=True)]
    grads = torch.autograd.grad(outputs, list(leaves.values()), gradients)
    named = {"P": pooled.detach()} | ({"G": gram.detach()} if need_gram else {})
    return named | {f"d_{name}": gradient for name, gradient in zip(leaves, grads, strict=True)}


def rounding_of_logits(given: dict) -> float:
    """What float32 rounding of the largest logit does to its exponential, forward and once more when recomputed.

    Beyond 1e-5 only where logits are in the hundreds; no path that recomputes A from S can do better.
    """
    logits = given["codes"].double() @ given["tokens"].double().mT * given["codes"].shape[-1] ** -0.5
    return 2 * torch.finfo(torch.float32).eps * float(logits.abs().max())


def error(value: torch.Tensor, exact: torch.Tensor) -> float:
    """Largest deviation relative to the largest exact value; absolute where that is below 1 (an exact 0, say)."""
    if exact.numel() == 0:
        return 0.0
    return float((value.double() - exact).abs().max() / exact.abs().max().clamp_min(1.0))
