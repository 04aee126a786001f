"""ONNX → TensorRT engine: the calls into the builder, valid from 10.12 to 11.x.

Networks are strongly typed: every tensor has the type that the graph gives it, and no builder flag lowers a precision
(11 has no such flags any more). Numbers of enums moved between 10 and 11, so that none is written here.
"""
from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from mvam_fast.export.bundle import ExportError
from mvam_fast.export.trt_library import listen
from mvam_fast.export.trt_settings import Settings

from mvam_fast.files import atomic

if TYPE_CHECKING:
    import tensorrt as trt


def build_engine(onnx_path: Path, settings: Settings, trt: ModuleType) -> bytes:
    """The serialised engine, built for the CUDA device that is current; ExportError with TensorRT's own words.

    With `settings.timing_cache` that file is read first, and replaced by what was timed now and before.
    """
    log = listen(trt)
    try:
        builder = trt.Builder(log)
    except TypeError as error:  # pybind's word for a null pointer
        raise ExportError(f"TensorRT {trt.__version__} does not start here ({error}): {log.said()}") from error
    network = builder.create_network(network_flags(settings, trt))
    config = builder.create_builder_config()
    if network is None or config is None:
        raise ExportError(f"TensorRT {trt.__version__} makes no network: {log.said()}")
    parser = trt.OnnxParser(network, log)
    # By path, not by content: weights may lie in a file beside it.
    if not parser.parse_from_file(str(onnx_path)):
        raise ExportError(f"{onnx_path.name}: TensorRT's parser refuses it: {parser_errors(parser) or log.said()}")
    _configure(config, settings, trt)
    _add_profiles(builder, network, config, settings, log)
    cache = _attach_timing_cache(config, settings.timing_cache, log)  # alive until the engine is built
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise ExportError(f"{onnx_path.name}: TensorRT builds no engine: {log.said()}")
    if cache is not None:
        _keep_timing_cache(cache, settings.timing_cache)
    return bytes(plan)


def network_flags(settings: Settings, trt: ModuleType) -> int:
    """For `create_network`, a bit each."""
    flags = 0
    # Needed up to 10, where weak typing is the default; without effect in 11, whose later versions may drop the name.
    if hasattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED"):
        flags |= 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    if settings.plugin:
        flags |= 1 << int(trt.NetworkDefinitionCreationFlag.PREFER_AOT_PYTHON_PLUGINS)
    return flags


def builder_flags(settings: Settings, trt: ModuleType) -> list[trt.BuilderFlag]:
    """The flags to set.

    A stripped plan gets back the weights that it was built with, from the bundle: refitting identical weights costs no
    speed, and spares the faults that NVIDIA lists for REFIT in 11.3 (a GEMM's bias may be dropped).
    """
    flags = []
    if settings.version_compatible:
        flags.append(trt.BuilderFlag.VERSION_COMPATIBLE)
    if settings.strip:
        flags.append(trt.BuilderFlag.STRIP_PLAN)
    if settings.refit:
        flags.append(trt.BuilderFlag.REFIT)
    elif settings.strip:
        flags.append(trt.BuilderFlag.REFIT_IDENTICAL)
    return flags


def hardware_level(settings: Settings, trt: ModuleType) -> trt.HardwareCompatibilityLevel:
    return {
        "none": trt.HardwareCompatibilityLevel.NONE,
        "ampere+": trt.HardwareCompatibilityLevel.AMPERE_PLUS,
        "same": trt.HardwareCompatibilityLevel.SAME_COMPUTE_CAPABILITY,
    }[settings.hardware_compatibility]


def parser_errors(parser: trt.OnnxParser | trt.OnnxParserRefitter) -> str:
    """What the parser complains of, with the node's name."""
    errors = [parser.get_error(index) for index in range(parser.num_errors)]
    return "; ".join(f"{error.desc()} (node {error.node_name()!r}, {error.node_operator()})" for error in errors)


def _configure(config: trt.IBuilderConfig, settings: Settings, trt: ModuleType) -> None:
    # On by default: float32 products of inputs whose mantissas are cut to 10 bits. Who asks for float32 means it.
    config.clear_flag(trt.BuilderFlag.TF32)
    for flag in builder_flags(settings, trt):
        config.set_flag(flag)
    config.hardware_compatibility_level = hardware_level(settings, trt)
    if settings.workspace_bytes is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, settings.workspace_bytes)
    if settings.optimization_level is not None:
        config.builder_optimization_level = settings.optimization_level


def _add_profiles(
    builder: trt.Builder, network: trt.INetworkDefinition, config: trt.IBuilderConfig, settings: Settings, log
) -> None:
    for batches in settings.profiles:
        profile = builder.create_optimization_profile()
        for index in range(network.num_inputs):
            tensor = network.get_input(index)
            row = tuple(tensor.shape)[1:]
            low, middle, high = ((size, *row) for size in (batches.min, batches.opt, batches.max))
            try:
                profile.set_shape(tensor.name, min=low, opt=middle, max=high)
            except ValueError as error:
                raise ExportError(f"batch: {tensor.name} cannot be {low}, {middle} and {high}: {error}") from error
        if config.add_optimization_profile(profile) < 0:
            raise ExportError(f"batch: TensorRT refuses the profile {batches.batches}: {log.said()}")


def _attach_timing_cache(config: trt.IBuilderConfig, path: Path | None, log) -> trt.ITimingCache | None:
    """One that the file holds, if it is of this device and version; else a new one, with a warning."""
    if path is None:
        return None
    content = path.read_bytes() if path.exists() else b""
    cache = config.create_timing_cache(content)
    if cache is None or not config.set_timing_cache(cache, False):
        if content:
            _warn(f"timing-cache: {path} is of another device or version, or damaged; it is ignored and replaced")
        cache = config.create_timing_cache(b"")
        if cache is None or not config.set_timing_cache(cache, False):
            raise ExportError(f"timing-cache: TensorRT takes none here: {log.said()}")
    return cache


def _keep_timing_cache(cache: trt.ITimingCache, path: Path) -> None:
    """A failure here costs time on the next build, not the engine that took minutes."""
    content = cache.serialize()
    try:
        if content is None:
            raise OSError("TensorRT does not serialise it")
        with atomic(path) as temporary:
            temporary.write_bytes(bytes(content))
    except OSError as error:
        _warn(f"timing-cache: {path} is not written: {error}")


def _warn(message: str) -> None:
    print(f"to_trt: warning: {message}", file=sys.stderr, flush=True)
