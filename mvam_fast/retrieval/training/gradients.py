"""The gradients of one training step, whole or in parts that need less memory."""
from __future__ import annotations

import contextlib

import numpy as np
import torch
from torch import Tensor

from ..data.loading import Batch

PER_SAMPLE = ("image_features", "text_features", "image_gram", "text_gram")  # of what MVAM returns


class StepGradients:
    """Adds the gradients of one step to the parameters.

    With several parts, "cached" computes the same as one part would: it first runs all parts without keeping what a
    backward needs, takes the loss of all features together and its gradient with respect to them, and then runs every
    part again, with that gradient coming in (gradient caching, arXiv 2101.06983). All images are negatives of all.
    "separate" is ordinary accumulation: the mean of the losses of the parts, each with negatives of its own alone.

    Args:
        accelerator: of accelerate.
        model: MVAM as the accelerator prepared it.
        loss_function: called with what the model returns, and output_dict=True.
        parts: how many; it must divide a process' part of the batch.
        accumulation: "cached" or "separate".
        seed: of dropout and the like, drawn anew for every step, process and part: a resumed run repeats them, and the
            second run of a part what the first one drew. Models that have it are so not quite the same in other parts.
    """

    def __init__(self, accelerator, model, loss_function, *, parts: int, accumulation: str, seed: int):
        self.accelerator, self.model, self.loss_function = accelerator, model, loss_function
        self.parts, self.accumulation, self.seed = parts, accumulation, seed

    def __call__(self, batch: Batch, normalize) -> tuple[dict[str, Tensor], dict[str, Tensor | None], bool]:
        """(weighted terms of the loss, features and Gram matrices of all parts, whether the loss is finite in every
        process), detached. If it is not, the step must not be taken."""
        device = self.accelerator.device
        size = len(batch.images) // self.parts
        inputs = [
            (normalize(batch.images[i : i + size].to(device)), batch.token_ids[i : i + size].to(device))
            for i in range(0, len(batch.images), size)
        ]
        if self.parts > 1 and self.accumulation == "cached":
            return self._cached(batch.step, inputs)
        found, finite = [], True
        for part, pair in enumerate(inputs):
            last = part == len(inputs) - 1
            with contextlib.nullcontext() if last else self.accelerator.no_sync(self.model):
                output = self._forward(batch.step, part, pair)
                terms = self.loss_function(**output, output_dict=True)
                loss = sum(terms.values()) / len(inputs)
                finite = self.all_finite(loss) and finite
                if finite:
                    self.accelerator.backward(loss)
            found.append((_detached(terms), _detached(output)))
        terms = {name: sum(terms[name] for terms, _ in found) / len(found) for name in found[0][0]}
        return terms, _joined([output for _, output in found]), finite

    def _cached(self, step: int, inputs: list) -> tuple[dict[str, Tensor], dict[str, Tensor | None], bool]:
        with torch.no_grad():
            joined = _joined([self._forward(step, part, pair) for part, pair in enumerate(inputs)])
        # The temperature too comes from the model, whose wrapper for several processes has to see all gradients.
        leaves = {name: value.detach().requires_grad_() for name, value in joined.items() if value is not None}
        terms = self.loss_function(**{**joined, **leaves}, output_dict=True)
        loss = sum(terms.values())
        finite = self.all_finite(loss)
        if finite:
            self.accelerator.backward(loss)
            start = 0
            for part, pair in enumerate(inputs):
                last = part == len(inputs) - 1
                with contextlib.nullcontext() if last else self.accelerator.no_sync(self.model):
                    output = self._forward(step, part, pair)
                    size = len(output["image_features"])
                    pieces = {  # of what all samples share, the temperature, the whole gradient once
                        name: leaf.grad[start : start + size] if name in PER_SAMPLE else leaf.grad
                        for name, leaf in leaves.items() if leaf.grad is not None and (name in PER_SAMPLE or last)
                    }  # fmt: skip
                    torch.autograd.backward([output[name] for name in pieces], list(pieces.values()))
                    start += size
        return _detached(terms), _detached(joined), finite

    def _forward(self, step: int, part: int, pair) -> dict[str, Tensor | None]:
        drawn = np.random.SeedSequence((self.seed, 3, step, self.accelerator.process_index, part))
        torch.manual_seed(int(drawn.generate_state(1, np.uint64)[0]))
        return self.model(*pair)

    def all_finite(self, value: Tensor) -> bool:
        """Whether `value` is finite in every process, so that all of them stop at the same step."""
        finite = value.detach().isfinite().float()
        if self.accelerator.num_processes > 1:
            finite = self.accelerator.reduce(finite, reduction="sum") >= self.accelerator.num_processes
        return bool(finite)


def _joined(outputs: list[dict]) -> dict[str, Tensor | None]:
    """Features and Gram matrices of all parts one after another; what is not per sample is the same in all."""
    if len(outputs) == 1:
        return outputs[0]
    return {
        name: torch.cat([output[name] for output in outputs]) if value is not None and name in PER_SAMPLE else value
        for name, value in outputs[0].items()
    }


def _detached(tensors: dict[str, Tensor | None]) -> dict[str, Tensor | None]:
    return {name: None if value is None else value.detach() for name, value in tensors.items()}
