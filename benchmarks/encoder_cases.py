"""One inference case: every model by one backend, for a tower and a batch; gated, and timed in turns as users wait."""
from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from encoder_models import CLIP, FUSED, MODELS, Bundles, Compared, encode
from gate import Wrong, reason
from machine import clocks, clocks_between
from timing import Clock, Step, summary
from torch import Tensor
from torch._inductor.utils import fresh_cache

import mvam_fast

# Allowed distance of an embedding from the float64 one, both of length 1; it bounds 1 - cosine by its half square.
# int8: what the export's own gate allows, a cosine of 0.9. Its cost is told, not promised.
LIMITS = {"float32": 1e-5, "tf32": 5e-3, "float16": 5e-3, "bfloat16": 4e-2, "int8": 0.45}
ROUNDS = 5
P99_NEEDS = 100  # repetitions; with fewer, the largest is told instead


@dataclass
class Made:
    """A backend that is ready: `step()` encodes the inputs and returns the embeddings."""

    step: Callable[[], Tensor]
    precision: str  # of its products: a key of LIMITS
    details: Callable[[], str] = str  # asked after the first result
    earlier_s: float = 0.0  # what was spent on it before it was made


def eager(compared: Compared, bundles: Bundles, model: str, tower: str, inputs: Tensor) -> Made:
    step = _no_grad(encode(compared.served[model], tower), _cast(inputs, compared))
    return Made(step, _precision(compared), _path if model == FUSED else str)


def compiled(compared: Compared, bundles: Bundles, model: str, tower: str, inputs: Tensor) -> Made:
    run = encode(compared.served[model], tower)
    step = _no_grad(torch.compile(lambda given: run(given), dynamic=False), _cast(inputs, compared))
    return Made(step, _precision(compared))


def load_compiler(device: torch.device) -> None:
    """What torch.compile loads when first used is no part of any model's first result."""
    with fresh_cache():  # or it would find this in its cache, and load half of itself
        torch.compile(lambda given: given + 1)(torch.zeros(1, device=device))


def onnx(compared: Compared, bundles: Bundles, model: str, tower: str, inputs: Tensor) -> Made:
    """The exported graph in the session that `mvam_fast.Encoder` runs, its input and output on the device already."""
    earlier = bundles.seconds.get(model, 0.0)  # of an export that an earlier case made
    path = bundles.of(model)
    device = compared.device
    runtime = "onnxruntime-cuda" if device.type == "cuda" else "onnxruntime-cpu"
    encoder = mvam_fast.Encoder.load(path, runtime, graphs=False)
    return Made(
        bound(encoder, tower, inputs), "tf32" if device.type == "cuda" else "float32", lambda: runtime, earlier
    )  # fmt: skip


def bound(encoder: mvam_fast.Encoder, tower: str, inputs: Tensor) -> Callable[[], Tensor]:
    """A step that is `encoder`'s bare session, reading `inputs` and writing its output where they lie."""
    session, device = encoder.session(tower), inputs.device
    output = torch.zeros(len(inputs), encoder.width, device=device)
    binding = session.io_binding()
    where = (device.type, device.index or 0)
    kind = np.float32 if inputs.is_floating_point() else np.int64
    binding.bind_input(session.get_inputs()[0].name, *where, kind, list(inputs.shape), inputs.data_ptr())
    binding.bind_output(session.get_outputs()[0].name, *where, np.float32, list(output.shape), output.data_ptr())

    def step():
        session.run_with_iobinding(binding)
        return output

    return step


@dataclass(frozen=True)
class Backend:
    """A way to run an encoder; `make` may raise anything, which becomes the row's reason."""

    make: Callable[[Compared, Bundles, str, str, Tensor], Made]
    models: tuple[str, ...] = MODELS


BACKENDS = {
    "eager": Backend(eager),
    "onnx": Backend(onnx, (CLIP, FUSED)),  # an exported graph has the plain operators whichever pooling was chosen
    "compile": Backend(compiled),
}


@dataclass
class Candidate:
    model: str
    step: Step | None = None
    reason: str = ""
    facts: dict = field(default_factory=dict)


def measure(
    compared: Compared, bundles: Bundles, backend: str, tower: str, batch: int, seconds: float, tick: Callable
) -> list[dict]:
    """The rows of a case. `tick(text)` is called as the work goes on."""
    torch._dynamo.reset()  # what earlier cases compiled
    inputs = compared.inputs(tower, batch)
    candidates = []
    for model in BACKENDS[backend].models:
        tick(f"{backend} {tower} {batch}: {model}")
        candidates.append(_candidate(model, backend, compared, bundles, tower, inputs))
    tick(f"{backend} {tower} {batch}: timing")
    before = clocks(compared.device)
    blocks = blocks_in_turns(Clock(compared.device), [c for c in candidates if c.step], seconds)
    after = clocks(compared.device)
    rows = []
    for candidate in candidates:
        row = {"work": "inference", "backend": backend, "tower": tower, "batch": batch, "model": candidate.model}
        if candidate.reason:
            rows.append({**row, "reason": candidate.reason})
            continue
        row |= candidate.facts | timed(blocks[candidate.model], batch)
        row["clocks"] = clocks_between(before, after)
        rows.append(row)
    return beside_clip(rows)


def beside_clip(rows: list[dict]) -> list[dict]:
    """`rows` of one case, with `times_clip`: how many times as long as plain CLIP it takes."""
    plain = next((row["median_ms"] for row in rows if row["model"] == CLIP and "median_ms" in row), None)
    for row in rows:
        if plain is not None and "median_ms" in row:
            row["times_clip"] = row["median_ms"] / plain
    return rows


def _candidate(model: str, backend: str, compared: Compared, bundles: Bundles, tower: str, inputs: Tensor) -> Candidate:
    candidate = Candidate(model)
    try:
        exact = compared.exact(model, tower, inputs)
        with fresh_cache():  # the encoders share kernels: with the others' at hand, compiling would look cheap
            began = time.perf_counter()
            made = BACKENDS[backend].make(compared, bundles, model, tower, inputs)
            found = made.step()
            _wait(compared.device)
            first = time.perf_counter() - began + made.earlier_s
        candidate.facts = {
            "precision": made.precision, "details": made.details(), "first_result_s": first,
            "errors": check(found, exact, made.precision),
        }  # fmt: skip
        candidate.step = made.step
    except Exception as error:  # whatever one does, the others are still timed
        candidate.reason = reason(error)
    return candidate


def check(found: Tensor, exact: Tensor, precision: str) -> dict[str, float]:
    """How far the worst embedding is from float64; Wrong if further than its precision may be, or not a number."""
    if found.shape != exact.shape:
        raise Wrong(f"wrong: embeddings are {list(found.shape)}, must be {list(exact.shape)}")
    found = found.to(exact)
    errors = {
        "distance": float((found - exact).norm(dim=1).max()),
        "cosine": float(torch.cosine_similarity(found, exact).min()),
        "max_abs": float((found - exact).abs().max()),
    }
    if not errors["distance"] <= LIMITS[precision]:
        raise Wrong(
            f"wrong: an embedding is off by {errors['distance']:.1e}, allowed {LIMITS[precision]:.0e} in {precision}; "
            f"cosine {errors['cosine']:.6f}"
        )
    return errors


def blocks_in_turns(clock: Clock, candidates: list[Candidate], seconds: float) -> dict[str, list[list[float]]]:
    """Wall clock of step and synchronisation; two calls before each block for warm-up. What fails gets its reason."""
    found: dict[str, list[list[float]]] = {candidate.model: [] for candidate in candidates}
    for _ in range(ROUNDS):
        for candidate in candidates:
            if candidate.reason:
                continue
            try:
                for _ in range(2):
                    candidate.step()
                _wait(clock.device)
                found[candidate.model] += clock.call_blocks_ms(candidate.step, seconds=seconds / ROUNDS, rounds=1)
            except Exception as error:
                candidate.reason = reason(error)
    return found


def timed(blocks: list[list[float]], batch: int) -> dict:
    """What a row says of its repetitions."""
    times = [time for block in blocks for time in block]
    found = {"blocks_ms": blocks, **summary(times), **tail(times), "repetitions": len(times)}
    return found | {"per_s": 1000 * batch / found["median_ms"]}


def tail(times: list[float]) -> dict[str, float]:
    """The 99th percentile where there are repetitions enough to have one, else the largest."""
    if len(times) < P99_NEEDS:
        return {"max_ms": max(times)}
    return {"p99_ms": statistics.quantiles(times, n=100, method="inclusive")[98]}


def _path() -> str:
    path = mvam_fast.last_backend()
    return f"{path.forward}: {path.reason}"


def _no_grad(run: Callable[[Tensor], Tensor], inputs: Tensor) -> Callable[[], Tensor]:
    def step():
        with torch.no_grad():
            return run(inputs)

    return step


def _cast(inputs: Tensor, compared: Compared) -> Tensor:
    return inputs.to(compared.dtype) if inputs.is_floating_point() else inputs


def _precision(compared: Compared) -> str:
    return str(compared.dtype)[6:]


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
