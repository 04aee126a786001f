"""The training case: a step of CLIP, of MVAM pooled by plain PyTorch and of MVAM, from the same weights and batch.

Loss and gradients are judged by those of plain PyTorch in float32, and MVAM's may be off by twice what plain PyTorch
is in the same precision. The learning rate is 0: the optimizer's work is the same, and the weights stay what they are.
"""
from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from encoder_cases import beside_clip
from encoder_models import CLIP, FUSED, MODELS, NAIVE, Compared
from gate import Wrong, reason
from machine import clocks, clocks_between
from timing import Clock, peak_extra_mb, saved_mb, summary
from torch import Tensor

import mvam_fast

FLOOR = {"float32": 1e-4, "bfloat16": 2e-2}  # what is always allowed: rounding in another order
ROUNDS = 3


@dataclass
class Training:
    """All that the three models share in training: parameters, optimizer, batch, loss."""

    compared: Compared
    batch: int
    precision: str  # "bfloat16" is autocast
    inputs: tuple[Tensor, Tensor] = field(init=False)

    def __post_init__(self):
        self.inputs = tuple(self.compared.inputs(tower, self.batch) for tower in ("image", "text"))
        model = self.compared.trained[FUSED]
        self.parameters = list(model.parameters())
        self.optimizer = torch.optim.AdamW(self.parameters, lr=0.0, weight_decay=0.05, betas=(0.9, 0.98), fused=True)
        self.loss_function = mvam_fast.MVAMLoss(0.01)

    def loss(self, name: str, precision: str) -> Tensor:
        model = self.compared.trained[name].train()
        autocast = torch.autocast(self.compared.device.type, torch.bfloat16, enabled=precision == "bfloat16")
        with autocast:
            if name != CLIP:
                return self.loss_function(**model(*self.inputs))
            features = (encode(given, normalize=True) for encode, given in
                        zip((model.encode_image, model.encode_text), self.inputs, strict=True))  # fmt: skip
            return self.loss_function(*features, model.logit_scale.exp())  # without Gram matrices it is ClipLoss

    def step(self, name: str) -> None:
        self.loss(name, self.precision).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def first(self, name: str, precision: str) -> tuple[float, list[Tensor | None], float]:
        """A step that keeps what the gate looks at: loss, gradients, and the seconds it took."""
        began = time.perf_counter()
        loss = self.loss(name, precision)
        loss.backward()
        self.optimizer.step()
        loss = loss.item()
        took = time.perf_counter() - began
        gradients = [parameter.grad for parameter in self.parameters]
        self.optimizer.zero_grad()
        return loss, gradients, took


def measure(compared: Compared, batch: int, precision: str, seconds: float, tick: Callable) -> list[dict]:
    """The rows of the case, one for each model. `tick(text)` is called as the work goes on."""
    device = compared.device
    training = Training(compared, batch, precision)
    found, reasons = {}, {}
    for name in MODELS:
        tick(f"training {batch}: {name}")
        try:
            found[name] = _candidate(training, name, found.get(NAIVE))
        except Exception as error:  # whatever one does, the others are still timed
            reasons[name] = reason(error)
            training.optimizer.zero_grad()
    tick(f"training {batch}: timing")
    before = clocks(device)
    steps = {name: lambda name=name: training.step(name) for name in found}
    blocks, failed = Clock(device).interleaved_blocks_ms(steps, seconds=seconds, rounds=ROUNDS)
    reasons |= {name: reason(error) for name, error in failed.items()}
    after = clocks(device)
    rows = []
    for name in MODELS:
        row = {"work": "training", "batch": batch, "model": name}
        if name in reasons:
            rows.append({**row, "reason": reasons[name]})
            continue
        row |= found[name] | {"blocks_ms": blocks[name], **summary([t for block in blocks[name] for t in block])}
        row |= {"repetitions": sum(map(len, blocks[name])), "per_s": 1000 * batch / row["median_ms"]}
        row["clocks"] = clocks_between(before, after)
        rows.append(row)
    for model in compared.trained.values():
        model.eval()
    return beside_clip(rows)


def _candidate(training: Training, name: str, naive: dict | None) -> dict:
    """What the row of a model says besides its times; Wrong if the gate stops it."""
    training.optimizer.state.clear()  # each model's first step makes it
    loss, gradients, first_step_s = training.first(name, training.precision)
    exact_loss, exact, _ = training.first(CLIP if name == CLIP else NAIVE, "float32")
    errors = {"loss": abs(loss - exact_loss) / abs(exact_loss), "gradients": _distance(gradients, exact)}
    del exact, gradients
    for what, error in errors.items():
        if name == FUSED and naive is None:
            raise Wrong(f"not checked: {NAIVE!r}, which it is judged beside, has no result")
        limit = max(FLOOR[training.precision], 2 * naive["errors"][what]) if name == FUSED else math.inf
        if not error <= limit or math.isinf(error):
            raise Wrong(f"wrong: {what} off by {error:.1e}, allowed {limit:.1e} in {training.precision}")
    path = mvam_fast.last_backend()
    leaves = (*training.parameters, *training.inputs)
    return {
        "precision": training.precision, "loss": loss, "errors": errors, "first_step_s": first_step_s,
        "details": f"forward {path.forward}, backward {path.backward}: {path.reason}" if name == FUSED else "",
        "peak_extra_mb": peak_extra_mb(lambda: training.step(name), training.compared.device),
        "saved_mb": saved_mb(lambda: training.loss(name, training.precision), leaves),
    }  # fmt: skip


def _distance(found: list[Tensor | None], exact: list[Tensor | None]) -> float:
    """‖found − exact‖ / ‖exact‖ over all parameters; infinite if one has a gradient where the other has none."""
    if any((f is None) != (e is None) for f, e in zip(found, exact, strict=True)):
        return math.inf
    pairs = [(f, e) for f, e in zip(found, exact, strict=True) if f is not None]
    off = sum((f - e).double().square().sum().item() for f, e in pairs)
    return math.sqrt(off / sum(e.double().square().sum().item() for _, e in pairs))
