"""An "onnx" bundle in ONNX Runtime, on the CPU or on a CUDA GPU, its inputs and outputs in PyTorch's memory."""
from __future__ import annotations

import itertools
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .._optional import require

CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"


class ProviderError(RuntimeError):
    """ONNX Runtime did without the provider that it was to use."""


def open_sessions(bundle: Path, manifest: dict, provider: str, options: dict, threads: int | None) -> dict:
    """{tower: InferenceSession}."""
    runtime = require("onnxruntime", extra="export")
    settings = runtime.SessionOptions()
    if threads is not None:
        settings.intra_op_num_threads = threads
    sessions = {}
    for tower, entry in manifest["towers"].items():
        path = str(bundle / entry["file"])
        sessions[tower] = session = runtime.InferenceSession(path, settings, providers=[(provider, options)])
        active = session.get_providers()[0]
        if active != provider:
            raise ProviderError(f"ONNX Runtime could not start {provider} and took {active}")
    return sessions


class OnnxCpuRunner:
    """Arrays and tensors share their memory on the CPU, so that a call is the session's and some microseconds."""

    def __init__(self, bundle: Path, manifest: dict, *, threads: int | None = None):
        self.device = torch.device("cpu")
        self.sessions = open_sessions(bundle, manifest, CPU, {}, threads)
        self._names = _names(manifest)

    def run(self, tower: str, inputs: Tensor) -> Tensor:
        name, output = self._names[tower]
        return torch.from_numpy(self.sessions[tower].run([output], {name: inputs.numpy()})[0])

    def close(self) -> None:
        self.sessions = {}


class OnnxCudaRunner:
    """Sessions on a GPU that compute on `stream` and read and write PyTorch's memory in place.

    `captured`: the sessions record CUDA graphs, by `record`; `run` is then not for use.
    """

    def __init__(
        self, bundle: Path, manifest: dict, stream: torch.cuda.Stream, *, captured: bool, threads: int | None = None
    ):
        runtime = require("onnxruntime", extra="export")
        self.device, self._stream, self._lock = stream.device, stream, threading.Lock()
        self._names, self._width = _names(manifest), manifest["embedding_width"]
        options = {
            "device_id": str(self.device.index), "user_compute_stream": str(stream.cuda_stream),
            "enable_cuda_graph": str(int(captured)),
        }  # fmt: skip
        self.sessions = open_sessions(bundle, manifest, CUDA, options, threads)
        # Whoever reads the output waits by its stream; the host need not.
        self._run_options = runtime.RunOptions()
        self._run_options.add_run_config_entry("disable_synchronize_execution_providers", "1")
        # ONNX Runtime keeps its graphs per thread, so that one thread must record and replay them all.
        self._thread = ThreadPoolExecutor(1, "onnx-cuda-graphs") if captured else None
        self._graph_numbers = itertools.count(1)  # 0 is what runs get that name none

    def run(self, tower: str, inputs: Tensor) -> Tensor:
        caller = torch.cuda.current_stream(self.device)
        output = torch.empty(len(inputs), self._width, device=self.device)
        binding = self._bound(tower, inputs, output)
        with self._lock:
            self._stream.wait_stream(caller)
            self.sessions[tower].run_with_iobinding(binding, self._run_options)
            caller.wait_stream(self._stream)
        return output

    def record(self, tower: str, inputs: Tensor) -> Callable[[], Tensor]:
        """A `graphs.Record`. The first run warms up and captures."""
        options = require("onnxruntime", extra="export").RunOptions()
        options.add_run_config_entry("gpu_graph_id", str(next(self._graph_numbers)))
        output = torch.zeros(len(inputs), self._width, device=self.device)
        session, binding = self.sessions[tower], self._bound(tower, inputs, output)

        def replay() -> Tensor:
            self._thread.submit(session.run_with_iobinding, binding, options).result()
            return output

        self._stream.synchronize()
        replay()
        return replay

    def _bound(self, tower: str, inputs: Tensor, output: Tensor):
        binding = self.sessions[tower].io_binding()
        for bind, name, tensor in zip(
            (binding.bind_input, binding.bind_output), self._names[tower], (inputs, output), strict=True
        ):
            kind = np.dtype(str(tensor.dtype)[6:]).type
            bind(name, self.device.type, self.device.index, kind, list(tensor.shape), tensor.data_ptr())
        return binding

    def close(self) -> None:
        self._stream.synchronize()
        if self._thread is not None:
            self._thread.shutdown()
        self.sessions = {}


def _names(manifest: dict) -> dict[str, tuple[str, str]]:
    return {tower: (entry["input"]["name"], entry["output"]["name"]) for tower, entry in manifest["towers"].items()}
