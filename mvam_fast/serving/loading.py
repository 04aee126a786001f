"""A bundle or checkpoint to a runner that takes batches of any size."""
from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from ..export.bundle import MANIFEST, TOWERS, check_files, read_manifest
from ..model_folder import MVAM_CONFIG
from .aoti_runner import AotiRunner
from .buckets import Padded, check_buckets
from .choice import CHECKPOINT, Choice, check_backend, choose
from .graphs import Capture, Graphed, Record
from .onnx_runner import OnnxCpuRunner, OnnxCudaRunner, ProviderError
from .runner import Runner


class Loaded(NamedTuple):
    """`sessions`: ONNX Runtime's, by tower; empty where another backend runs."""

    runner: Runner
    manifest: dict
    backend: str
    reason: str
    sessions: dict


def load(
    path: str | Path,
    backend: str,
    *,
    device: str | torch.device | None,
    threads: int | None,
    buckets: Sequence[int] | None,
    graphs: bool,
) -> Loaded:
    """See `Encoder.load`."""
    check_backend(backend)
    if threads is not None and (type(threads) is not int or threads < 1):
        raise ValueError(f"threads is {threads!r}; it must be at least 1")
    buckets = check_buckets(buckets)
    path = Path(path)
    manifest = _manifest(path)
    choice = choose(path, manifest, backend, device)
    if manifest["kind"] != CHECKPOINT:
        check_files(path, manifest)
    if threads is not None and choice.backend in ("torch", "aoti"):
        torch.set_num_threads(threads)

    if choice.backend.startswith("onnxruntime"):
        return _onnx(path, manifest, choice, threads, buckets, graphs)
    if choice.backend == "trt":
        from .trt_runner import TrtRunner

        # Engines have batch profiles of their own, and this runner pads, splits and records by them.
        runner = TrtRunner(path, manifest, device=choice.device.index, graphs=graphs)
    elif choice.backend == "aoti":
        captured = graphs and choice.device.type == "cuda"
        runner = _batched(AotiRunner(path, manifest, choice.device, captured=captured), manifest, buckets, graphs)
    else:
        from .torch_runner import TorchRunner  # brings open_clip, which a bundle's preprocessed inputs do not need

        runner = TorchRunner(path, choice.device)
        manifest = runner.manifest
        runner = _batched(runner, manifest, buckets, graphs)
    return Loaded(runner, manifest, choice.backend, choice.reason, {})


def _manifest(path: Path) -> dict:
    """Of a checkpoint, only what tells that it is one."""
    if not path.is_dir():
        raise FileNotFoundError(f"path: no such folder: {path}")
    if (path / MVAM_CONFIG).is_file():
        return {"kind": CHECKPOINT}
    if not (path / MANIFEST).is_file():
        raise FileNotFoundError(f"path: {path} is neither a bundle (no {MANIFEST}) nor a checkpoint (no {MVAM_CONFIG})")
    return read_manifest(path)


def _onnx(path: Path, manifest: dict, choice: Choice, threads: int | None, buckets: tuple, graphs: bool) -> Loaded:
    if choice.backend == "onnxruntime-cuda":
        stream = torch.cuda.Stream(choice.device)
        try:
            runner, why_not = _onnx_cuda(path, manifest, stream, threads, graphs)
        except ProviderError as error:
            if choice.insisted:
                raise RuntimeError(f"backend {choice.backend!r}: {error}") from error
            choice = Choice("onnxruntime-cpu", torch.device("cpu"), f"{choice.reason}, but {error}", False)
            warnings.warn(f"{choice.backend} runs {path}: {choice.reason}", RuntimeWarning, stacklevel=4)
        else:
            reason = choice.reason + (f"; without CUDA graphs: {why_not}" if why_not else "")
            batched = _batched(runner, manifest, buckets, graphs and not why_not, stream, runner.record)
            return Loaded(batched, manifest, choice.backend, reason, runner.sessions)
    runner = OnnxCpuRunner(path, manifest, threads=threads)
    return Loaded(_batched(runner, manifest, buckets, graphs), manifest, choice.backend, choice.reason, runner.sessions)


def _onnx_cuda(path: Path, manifest: dict, stream, threads: int | None, graphs: bool) -> tuple[OnnxCudaRunner, str]:
    """The runner, and why it does without graphs although they were asked for."""
    why_not = ""
    if graphs:
        try:
            return OnnxCudaRunner(path, manifest, stream, captured=True, threads=threads), ""
        except ProviderError:
            raise
        except Exception as error:  # ONNX Runtime's own type: some node has no CUDA kernel
            why_not = str(error)
    return OnnxCudaRunner(path, manifest, stream, captured=False, threads=threads), why_not


def _batched(
    runner: Runner,
    manifest: dict,
    buckets: tuple[int, ...],
    graphs: bool,
    stream: torch.cuda.Stream | None = None,
    record: Record | None = None,
) -> Runner:
    """`runner` for batches of any size. On a GPU, batches have one of the `buckets`' sizes; on the CPU any.

    A tower whose batch is fixed has that one. `stream`, `record`: see `Graphed`; made for PyTorch where None.
    """
    fixed = {tower: manifest["towers"][tower]["input"]["shape"][0] for tower in TOWERS}
    sizes = {tower: (batch,) for tower, batch in fixed.items() if isinstance(batch, int)}
    if runner.device.type == "cpu":
        return Padded(runner, sizes) if sizes else runner
    sizes = dict.fromkeys(TOWERS, buckets) | sizes
    if not graphs:
        return Padded(runner, sizes)
    if stream is None:
        stream = torch.cuda.Stream(runner.device)
        record = Capture(runner, stream)
    return Graphed(runner, sizes, manifest["embedding_width"], stream, record)
