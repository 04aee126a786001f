"""The plugin in an engine: the one test that needs TensorRT and a GPU."""
import pytest
import torch
from mvam_fast.export.trt_library import Missing, find
from op_cases import Case, error, inputs

from mvam_fast import reference

SCALE = 0.21
CASES = [
    Case(8, 50, 384, 16, dtype=torch.float16),
    Case(8, 197, 768, 16, dtype=torch.float16),
    Case(8, 77, 1024, 33, dtype=torch.bfloat16),
    Case(8, 50, 512, 8, dtype=torch.float32),
]


@pytest.mark.trt
@pytest.mark.parametrize("ampere", [False, True], ids=["this_gpu", "ampere+"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_engine_with_the_plugin_agrees_with_float64(case, ampere, tmp_path):
    """Every batch size of the profile's ends and its middle; the function body, which would do too, is not used."""
    try:
        trt = find(0)
    except Missing as missing:
        pytest.skip(f"not run: {missing}")
    onnx = pytest.importorskip("onnx")
    from mvam_fast.export import plugin
    from mvam_fast.export.trt_build import build_engine
    from mvam_fast.export.trt_settings import Profile, Settings
    from mvam_fast.kernels.plugin_ptx import plugin_ptx
    from test_pool_function import model

    if plugin.blocked(trt.__version__):
        pytest.skip(f"not run: {plugin.blocked(trt.__version__)}")
    major, minor = torch.cuda.get_device_capability()
    plugin.register(10 * major + minor, hardware_compatible=ampere)
    onnx.save(model(case.dtype, case.length, case.width, case.views, scale=SCALE), tmp_path / "pool.onnx")
    plugin_ptx.cache_clear()
    settings = Settings(
        profiles=(Profile(1, 3, case.batch),), plugin=True, hardware_compatibility="ampere+" if ampere else "none"
    )
    plan = build_engine(tmp_path / "pool.onnx", settings, trt)
    assert plugin_ptx.cache_info().misses  # the kernel was asked for while the engine was built

    given = inputs(Case(**{**vars(case), "kind": "mask+garbage"}), "cuda")
    engine = trt.Runtime(trt.Logger(trt.Logger.WARNING)).deserialize_cuda_engine(plan)
    stream = torch.cuda.Stream()
    for batch in (1, 3, case.batch):
        tokens, valid = given["tokens"][:batch].contiguous(), given["mask"][:batch]
        tensors = {"tokens": tokens, "codes": given["codes"], "mask": valid.to(torch.int32) * 5}
        context = engine.create_execution_context()  # one per shape: see plugin.caution
        for name, tensor in tensors.items():
            assert context.set_input_shape(name, tuple(tensor.shape))
            assert context.set_tensor_address(name, tensor.data_ptr())
        assert context.infer_shapes() == []
        pooled = torch.empty(tuple(context.get_tensor_shape("pooled")), dtype=case.dtype, device="cuda")
        assert context.set_tensor_address("pooled", pooled.data_ptr())
        stream.wait_stream(torch.cuda.current_stream())
        assert context.execute_async_v3(stream.cuda_stream)
        stream.synchronize()
        options = {"mask": valid, "scale": SCALE, "need_gram": False}
        exact, _ = reference.multi_view_pool(tokens.double(), given["codes"].double(), **options)
        plain, _ = reference.multi_view_pool(tokens, given["codes"], **options)
        tolerance = 1e-5 if case.dtype == torch.float32 else 2 * error(plain, exact)
        assert error(pooled, exact) <= tolerance, batch
        assert batch == 1 or (pooled[1] == 0).all()  # no valid token
