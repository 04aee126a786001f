"""A "trt" bundle: TensorRT engines on the GPU that they were built for."""
from __future__ import annotations

import threading
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .._optional import require
from ..export.bundle import TOWERS
from ..export.trt_build import parser_errors
from ..export.trt_engine import check_engine, engines_of, profiles_of
from ..export.trt_library import here, listen
from ..export.trt_settings import buckets, profile_at
from .buckets import Padded
from .graphs import Capture, Graphed

if TYPE_CHECKING:
    import tensorrt as trt

ALIGNMENT = 256  # bytes; of what TensorRT reads and writes


class TrtRunner:
    """Both towers at any batch size: padded to one of a few, split where an engine takes no more.

    `graphs`: each of these sizes is recorded as a CUDA graph when first used. Several threads may call `run` at once.

    Attributes:
        device; engines: the towers at the sizes of their profiles; sizes: the batch sizes that are run.
    """

    def __init__(self, bundle: Path, manifest: dict, device: int = 0, graphs: bool = True):
        self.engines = TrtEngines(bundle, manifest, device)
        self.device, self.sizes = self.engines.device, buckets(self.engines.profiles)
        self._width, self._graphs = manifest["embedding_width"], graphs
        self._front = self._new_front()

    def run(self, tower: str, inputs: Tensor) -> Tensor:
        """L2-normalised float32 [B,F] of `inputs` [B,...]: on `device`, contiguous, of exactly the tower's dtype."""
        self.engines.check(tower, inputs)
        with torch.no_grad():
            if len(inputs) == 0:
                return torch.empty(0, self._width, device=self.device)
            return self._front.run(tower, inputs)

    def refit(self, tower: str, onnx_path: Path) -> None:
        """New weights for a tower of a bundle that was built with --refit, out of a graph of the same structure.

        Not while another thread runs it. What was recorded is recorded anew when next used. Where it raises, some
        weights may be new and others old: close the runner then.
        """
        self.engines.refit(tower, onnx_path)
        self._front = self._new_front()

    def close(self) -> None:
        self._front.close()

    def _new_front(self) -> Graphed | Padded:
        engines, sizes = self.engines, dict.fromkeys(TOWERS, self.sizes)
        if not self._graphs:
            return Padded(engines, sizes)
        return Graphed(engines, sizes, self._width, engines.stream, Capture(engines, engines.stream))


class TrtEngines:
    """Both towers, each at the batch sizes that one of its profiles allows.

    All runs are on `stream`, one at a time, and share one block of memory. Every batch size has an execution context of
    its own: a context whose shapes change is slow, cannot stay in a CUDA graph, and leaks with plugins in TensorRT 11.
    """

    def __init__(self, bundle: Path, manifest: dict, device: int = 0):
        trt = require("tensorrt", extra="trt")
        described = engines_of(manifest)
        if not torch.cuda.is_available():
            raise RuntimeError(f"{bundle} holds TensorRT engines, and PyTorch {torch.__version__} sees no CUDA GPU")
        reason = check_engine(described, here(device, trt))
        if reason:
            raise RuntimeError(f"{bundle}: {reason}")
        self.device, self.profiles = torch.device("cuda", device), profiles_of(described)
        self._trt, self._log, self._lock = trt, listen(trt), threading.Lock()
        self._refittable = described["settings"]["refit"]
        self._contexts: dict[tuple[str, int, int], trt.IExecutionContext] = {}
        with torch.cuda.device(self.device):
            self.stream = torch.cuda.Stream(self.device)
            self._runtime = _runtime(trt, self._log, host_code=described["settings"]["version_compatible"])
            self._towers = {
                tower: _Tower(_load(self._runtime, bundle / entry["file"], trt, self._log), bundle, entry, trt)
                for tower, entry in manifest["towers"].items()
            }
            if described["settings"]["strip"]:
                for tower, name in described["graphs"].items():
                    _refit(self._towers[tower].engine, bundle / name, trt, self._log)
            scratch = max(tower.engine.device_memory_size_v2 for tower in self._towers.values())
            with torch.cuda.stream(self.stream):  # whose memory it then is: nothing of another stream may still use it
                self._scratch = torch.empty(max(scratch, 1), dtype=torch.uint8, device=self.device)

    def check(self, tower: str, inputs: Tensor) -> None:
        """TypeError or ValueError unless `tower` can be run with `inputs` [B,...] as they are."""
        if tower not in self._towers:
            raise ValueError(f"tower is {tower!r}; it must be one of {', '.join(self._towers) or 'none: it is closed'}")
        wanted = self._towers[tower]
        if not isinstance(inputs, Tensor) or inputs.dtype != wanted.dtype:
            raise TypeError(f"inputs is a {getattr(inputs, 'dtype', type(inputs))}; it must be a {wanted.dtype} tensor")
        if inputs.device != self.device:
            raise ValueError(f"inputs is on {inputs.device}; it must be on {self.device}")
        if inputs.dim() == 0 or tuple(inputs.shape[1:]) != wanted.row or not inputs.is_contiguous():
            raise ValueError(f"inputs has shape {list(inputs.shape)}; it must be [B, *{list(wanted.row)}], contiguous")

    def run(self, tower: str, inputs: Tensor, *, profile: int | None = None) -> Tensor:
        """Float32 [B,F] of inputs [B,...] as `check` wants them, where B is a size that a profile allows.

        `profile`: the number of the one to use.
        """
        caller = torch.cuda.current_stream(self.device)
        number = profile_at(len(inputs), self.profiles) if profile is None else profile
        # Memory of the caller's stream, which waits below before it can go on to use or reuse it.
        output = torch.empty(len(inputs), self._towers[tower].width, device=self.device)
        with self._lock, torch.cuda.stream(self.stream):
            if caller != self.stream:
                self.stream.wait_stream(caller)
            if inputs.data_ptr() % ALIGNMENT:
                inputs = inputs.clone()
            context = self._context(tower, number, inputs.shape)
            names = self._towers[tower].input, self._towers[tower].output
            for name, tensor in zip(names, (inputs, output), strict=True):
                self._must(context.set_tensor_address(name, tensor.data_ptr()), f"take the address of {name}")
            self._must(context.execute_async_v3(self.stream.cuda_stream), f"run the {tower} tower at {len(inputs)}")
            if caller != self.stream:
                caller.wait_stream(self.stream)
        return output

    def refit(self, tower: str, onnx_path: Path) -> None:
        """Puts the weights of a graph into a tower's engine. Contexts are made anew: they may hold the old ones."""
        if not self._refittable:
            raise ValueError("the engines take no other weights than those they were built with; build with --refit")
        with self._lock, torch.cuda.device(self.device):
            self.stream.synchronize()
            self._contexts = {key: context for key, context in self._contexts.items() if key[0] != tower}
            _refit(self._towers[tower].engine, onnx_path, self._trt, self._log)

    def close(self) -> None:
        with self._lock:
            self.stream.synchronize()
            # Contexts before their engines, engines before what deserialised them.
            self._contexts.clear()
            self._towers.clear()
            self._runtime = self._scratch = None

    def _context(self, tower: str, profile: int, shape: torch.Size) -> trt.IExecutionContext:
        """The context for inputs of this shape in that profile, made when first asked for."""
        trt, known = self._trt, self._contexts.get((tower, profile, shape[0]))
        if known is not None:
            return known
        found, engine = self._towers[tower], self._towers[tower].engine
        context = engine.create_execution_context(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
        self._must(context is not None, "make an execution context")
        context.set_device_memory(self._scratch.data_ptr(), self._scratch.numel())
        chosen = context.set_optimization_profile_async(profile, self.stream.cuda_stream)
        self._must(chosen, f"take profile {profile}")
        self.stream.synchronize()
        self._must(context.set_input_shape(found.input, tuple(shape)), f"take inputs of shape {list(shape)}")
        missing = context.infer_shapes()
        self._must(not missing, f"know the shape of {missing}")
        expected = (shape[0], found.width)
        given = tuple(context.get_tensor_shape(found.output))
        self._must(given == expected, f"give {list(expected)}: its output would be {list(given)}")
        self._contexts[tower, profile, shape[0]] = context
        return context

    def _must(self, done: bool, what: str) -> None:
        if not done:
            raise RuntimeError(f"TensorRT {self._trt.__version__} does not {what}: {self._log.said()}")


class _Tower:
    """An engine with what its one input and output are: names, the input's dtype and row shape, the output's width."""

    def __init__(self, engine: trt.ICudaEngine, bundle: Path, entry: dict, trt: ModuleType):
        self.engine: trt.ICudaEngine = engine
        self.input, self.output = entry["input"]["name"], entry["output"]["name"]
        self.dtype, self.row = getattr(torch, entry["input"]["dtype"]), tuple(entry["input"]["shape"][1:])
        self.width = entry["output"]["shape"][1]
        names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
        found = {name: _torch_types(trt).get(engine.get_tensor_dtype(name)) for name in names}
        wanted = {self.input: self.dtype, self.output: torch.float32}
        # An engine of another program may have other tensors, and what is read from it then would be noise.
        if found != wanted:
            raise ValueError(f"bundle: {bundle / entry['file']} has inputs and outputs {found}, its manifest {wanted}")


def _torch_types(trt: ModuleType) -> dict:
    """Of inputs and outputs; `trt.nptype` has no bfloat16."""
    return {
        trt.DataType.FLOAT: torch.float32,
        trt.DataType.HALF: torch.float16,
        trt.DataType.BF16: torch.bfloat16,
        trt.DataType.INT64: torch.int64,
        trt.DataType.INT32: torch.int32,
        trt.DataType.UINT8: torch.uint8,
    }


def _runtime(trt: ModuleType, log, *, host_code: bool) -> trt.Runtime:
    try:
        runtime = trt.Runtime(log)
    except TypeError as error:  # pybind's word for a null pointer
        raise RuntimeError(f"TensorRT {trt.__version__} does not start here ({error}): {log.said()}") from error
    # A version-compatible plan carries the runtime that it was built with, as code for the host.
    runtime.engine_host_code_allowed = host_code
    return runtime


def _load(runtime: trt.Runtime, path: Path, trt: ModuleType, log) -> trt.ICudaEngine:
    engine = runtime.deserialize_cuda_engine(path.read_bytes())
    if engine is None:
        raise RuntimeError(f"{path} is no engine that TensorRT {trt.__version__} loads, or is damaged: {log.said()}")
    return engine


def _refit(engine: trt.ICudaEngine, onnx_path: Path, trt: ModuleType, log) -> None:
    refitter = trt.Refitter(engine, log)
    parser = trt.OnnxParserRefitter(refitter, log)
    if not parser.refit_from_file(str(onnx_path)):
        raise RuntimeError(f"{onnx_path}: its weights do not fit the engine: {parser_errors(parser) or log.said()}")
    if not refitter.refit_cuda_engine():
        missing = refitter.get_missing_weights()[:5]
        raise RuntimeError(f"{onnx_path}: the engine is not refitted ({log.said()}); weights missing: {missing}")
