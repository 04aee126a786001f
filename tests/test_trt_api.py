"""The calls into TensorRT, compared with NVIDIA's own bindings of the first, a middle and the newest version.

This proves names and signatures only: that every class, enum, property and method that the code uses is there, can be
set where it is set, and takes the arguments that it is given. No engine is built here and none is run; that is
test_trt_engine.py's, which needs TensorRT's libraries and a GPU.
"""
from __future__ import annotations

import re
from pathlib import Path

import pytest
from trt_api import check, describe
from trt_bindings import VERSIONS, run_with

ROOT = Path(__file__).resolve().parent.parent
FILES = ["export/trt_build.py", "export/trt_library.py", "mvam_fast/serving/trt_runner.py"]
BUILD, LIBRARY, RUNNER = ((ROOT / name).read_text() for name in FILES)
NEWEST = VERSIONS[-1]
PLUGIN = [str(path.relative_to(ROOT)) for path in (ROOT / "export").glob("*plugin*.py")]  # its own tests run it

# Without these the comparison would be of nothing.
COMPARED = {
    "export/trt_build.py": """Builder.__init__() Builder.create_network() Builder.create_builder_config()
        Builder.create_optimization_profile() Builder.build_serialized_network() OnnxParser.__init__()
        OnnxParser.parse_from_file() OnnxParser.get_error() OnnxParser.num_errors OnnxParserRefitter.get_error()
        ParserError.desc() ParserError.node_name() INetworkDefinition.num_inputs INetworkDefinition.get_input()
        ITensor.shape ITensor.name IOptimizationProfile.set_shape() IBuilderConfig.add_optimization_profile()
        IBuilderConfig.clear_flag() IBuilderConfig.set_flag() IBuilderConfig.set_memory_pool_limit()
        IBuilderConfig.hardware_compatibility_level IBuilderConfig.builder_optimization_level
        IBuilderConfig.create_timing_cache() IBuilderConfig.set_timing_cache() ITimingCache.serialize()
        BuilderFlag.TF32 BuilderFlag.STRIP_PLAN HardwareCompatibilityLevel.AMPERE_PLUS MemoryPoolType.WORKSPACE""",
    "export/trt_library.py": "trt.ILogger trt.__version__ ILogger.Severity ILogger.Severity.ERROR",
    "mvam_fast/serving/trt_runner.py": """Runtime.__init__() Runtime.deserialize_cuda_engine()
        Runtime.engine_host_code_allowed ICudaEngine.create_execution_context() ICudaEngine.device_memory_size_v2
        ICudaEngine.num_io_tensors ICudaEngine.get_tensor_name() ICudaEngine.get_tensor_dtype()
        IExecutionContext.set_device_memory() IExecutionContext.set_optimization_profile_async()
        IExecutionContext.set_input_shape() IExecutionContext.infer_shapes() IExecutionContext.get_tensor_shape()
        IExecutionContext.set_tensor_address() IExecutionContext.execute_async_v3() Refitter.__init__()
        OnnxParserRefitter.__init__() OnnxParserRefitter.refit_from_file() Refitter.refit_cuda_engine()
        Refitter.get_missing_weights() DataType.BF16 ExecutionContextAllocationStrategy.USER_MANAGED""",
}


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("name", [*FILES, *PLUGIN])
def test_what_the_code_uses_is_there(name, version):
    report = check((ROOT / name).read_text(), describe(version), [describe(other) for other in VERSIONS])
    assert report.problems == []
    assert set(COMPARED.get(name, "").split()) <= report.seen


MISTAKES = {
    "an enum's member": (BUILD, "BuilderFlag.TF32", "BuilderFlag.TF23", "BuilderFlag has no TF23"),
    "an enum": (BUILD, "trt.MemoryPoolType", "trt.MemoryPools", "trt has no MemoryPools"),
    "a class": (BUILD, "trt.OnnxParser(", "trt.OnnxReader(", "trt has no OnnxReader"),
    "a method": (BUILD, "create_network(", "make_network(", "Builder has no make_network"),
    "a method of what a method returns": (BUILD, ".set_shape(", ".set_shapes(", "Profile has no set_shapes"),
    "a method of what an annotation names": (BUILD, ".set_timing_cache(", ".use_cache(", "Config has no use_cache"),
    "a method of a list's element": (BUILD, "error.desc()", "error.describe()", "ParserError has no describe"),
    "a property": (BUILD, "network.num_inputs", "network.inputs", "INetworkDefinition has no inputs"),
    "a property that is set": (BUILD, "builder_optimization_level =", "optimization_level =", "no optimization_level"),
    "a property that cannot be set": (BUILD, ".builder_optimization_level =", ".num_optimization_profiles =",
                                      "IBuilderConfig.num_optimization_profiles cannot be set"),
    "an argument left out": (BUILD, "set_timing_cache(cache, False)", "set_timing_cache(cache)",
                             "set_timing_cache does not take"),
    "an argument too many": (BUILD, "trt.Builder(log)", "trt.Builder(log, 1)", "Builder.__init__ does not take"),
    "a keyword": (BUILD, "max=high", "most=high", "set_shape does not take"),
    "arguments that cannot be compared": (BUILD, "get_input(index)", "get_input(*index)", "with .* or"),
    "a member of a nested enum": (LIBRARY, "Severity.WARNING", "Severity.WARN", "ILogger.Severity has no WARN"),
    "a class without annotation": (RUNNER, "engine: trt.ICudaEngine, bundle", "engine, bundle",
                                   "the class of 'engine' is not known"),
    "a method of an attribute's class": (RUNNER, "context.execute_async_v3(", "context.execute_async_v4(",
                                         "IExecutionContext has no execute_async_v4"),
    "a flag that 11 removed": (BUILD, "trt.BuilderFlag.REFIT)", "trt.BuilderFlag.FP16)", "BuilderFlag has no FP16"),
    "a name that was guarded": (BUILD, 'if hasattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED")', "if True",
                                ""),
    "a guarded name of no version": (BUILD, "STRONGLY_TYPED", "STRICTLY_TYPED", "in any version"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_found(mistake):
    source, right, wrong, message = MISTAKES[mistake]
    assert right in source
    problems = check(source.replace(right, wrong), describe(NEWEST), [describe(NEWEST)]).problems
    if message:
        assert any(re.search(message, problem) for problem in problems), problems
    else:
        assert problems == []  # STRONGLY_TYPED is still there in the newest


def test_a_name_that_some_versions_lack_needs_its_guard():
    guarded = "def f(trt):\n    if hasattr(trt.BuilderFlag, 'FP16'):\n        return trt.BuilderFlag.FP16\n"
    oldest, newest = describe(VERSIONS[0]), describe(NEWEST)
    assert check(guarded, newest, [oldest, newest]).problems == []
    assert "no FP16 in any version" in check(guarded, newest, [newest]).problems[0]
    unguarded = "def f(trt):\n    return trt.BuilderFlag.FP16\n"
    assert check(unguarded, oldest).problems == [] and check(unguarded, newest, [oldest]).problems


# With the real module: what needs no library behind it must work, and what does must fail as it is meant to.
GENUINE = """
import itertools, pathlib
import tensorrt as trt
from mvam_fast.export import trt_build, trt_library
from mvam_fast.export.bundle import ExportError
from mvam_fast.export.trt_settings import HARDWARE, Settings

Strong = trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED
for version_compatible, refit, strip, plugin, hardware in itertools.product(*[[False, True]] * 4, HARDWARE):
    settings = Settings(version_compatible=version_compatible, refit=refit, strip=strip, plugin=plugin,
                        hardware_compatibility=hardware)
    flags = trt_build.builder_flags(settings, trt)
    assert all(isinstance(flag, trt.BuilderFlag) for flag in flags)
    assert (trt.BuilderFlag.STRIP_PLAN in flags) == strip and (trt.BuilderFlag.REFIT in flags) == refit
    assert (trt.BuilderFlag.REFIT_IDENTICAL in flags) == (strip and not refit)
    assert isinstance(trt_build.hardware_level(settings, trt), trt.HardwareCompatibilityLevel)
    bits = trt_build.network_flags(settings, trt)
    assert bits >> int(Strong) & 1
    assert bits >> int(trt.NetworkDefinitionCreationFlag.PREFER_AOT_PYTHON_PLUGINS) & 1 == plugin

log = trt_library.listen(trt)
assert isinstance(log, trt.ILogger) and log.said() == "TensorRT says nothing more"
log.log(trt.ILogger.Severity.WARNING, "slow")
assert log.said() == "slow"
log.log(trt.ILogger.Severity.ERROR, "no such layer")
log.log(trt.ILogger.Severity.INFO, "hello")
assert log.said() == "no such layer"

assert not trt_library.unsupported(trt.__version__)
try:
    trt_build.build_engine(pathlib.Path("none.onnx"), Settings(), trt)
except ExportError as error:
    print(error)

from mvam_fast.serving import trt_runner
assert len(trt_runner._torch_types(trt)) == 6
try:
    trt_runner._runtime(trt, log, host_code=False)
except RuntimeError as error:
    print(error)
"""


@pytest.mark.parametrize("version", [VERSIONS[0], NEWEST])
def test_settings_become_real_enums_and_a_broken_library_is_told(version):
    first, second = run_with(version, GENUINE).splitlines()
    for line in (first, second):
        assert line.startswith(f"TensorRT {version} does not start here (")
