"""The pooling node's function body: valid ONNX in any graph, and the reference's results in ONNX Runtime."""
import numpy as np
import pytest
import torch

from mvam_fast import reference

onnx = pytest.importorskip("onnx")
runtime = pytest.importorskip("onnxruntime")
from mvam_fast.export.lint import check_graph  # noqa: E402
from mvam_fast.export.pool_function import function_proto  # noqa: E402
from mvam_fast.export.pool_node import DOMAIN, NAME, PLUGIN  # noqa: E402

TYPES = {torch.float32: "FLOAT", torch.float16: "FLOAT16", torch.bfloat16: "BFLOAT16"}
SCALE = 0.37


def model(dtype, length=21, width=24, views=5, opset=20, scale=SCALE):
    kind = onnx.TensorProto.DataType.Value(TYPES[dtype])
    value = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node(NAME, ["tokens", "codes", "mask"], ["pooled"], domain=DOMAIN, scale=scale, **PLUGIN)],
        "pool",
        [
            value("tokens", kind, ["batch", length, width]),
            value("codes", kind, [views, width]),
            value("mask", onnx.TensorProto.INT32, ["batch", length]),
        ],
        [value("pooled", kind, ["batch", views, width])],
    )
    imports = [onnx.helper.make_opsetid("", opset), onnx.helper.make_opsetid(DOMAIN, 1)]
    return onnx.helper.make_model(graph, functions=[function_proto(opset)], opset_imports=imports, ir_version=10)


def inputs(dtype, length=21, width=24, views=5, batch=4):
    """Samples with all tokens, none, one, and every other; NaN where a token takes no part."""
    generator = torch.Generator().manual_seed(0)
    mask = torch.zeros(batch, length, dtype=torch.int32)
    mask[0], mask[2, 3], mask[3, ::2] = 1, 7, -1  # any value but 0 takes part
    tokens = torch.randn(batch, length, width, generator=generator)
    tokens = torch.where(mask[..., None] != 0, tokens, torch.nan).to(dtype)
    return tokens, torch.randn(views, width, generator=generator).to(dtype), mask


@pytest.mark.parametrize("opset", [18, 20, 23])
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_passes_the_checker_and_every_rule_for_graphs(dtype, opset, tmp_path):
    """Strict shape inference, the operator table, softmax in float32, no free dimension but the batch."""
    onnx.save(model(dtype, opset=opset), tmp_path / "pool.onnx")
    assert check_graph(tmp_path / "pool.onnx")["functions"] == [NAME]
    inferred = onnx.shape_inference.infer_shapes(model(dtype, opset=opset), check_type=True, strict_mode=True)
    dims = inferred.graph.output[0].type.tensor_type.shape.dim
    assert [d.dim_param or d.dim_value for d in dims] == ["batch", 5, 24]


@pytest.mark.parametrize("opset", [20, 23])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_onnx_runtime_agrees_with_the_reference(dtype, opset):
    session = runtime.InferenceSession(
        model(dtype, opset=opset).SerializeToString(), providers=["CPUExecutionProvider"]
    )
    tokens, codes, mask = inputs(dtype)
    feeds = {"tokens": tokens.numpy(), "codes": codes.numpy(), "mask": mask.numpy()}
    (found,) = session.run(None, feeds)
    valid = mask != 0
    exact, _ = reference.multi_view_pool(tokens.double(), codes.double(), mask=valid, scale=SCALE, need_gram=False)
    plain, _ = reference.multi_view_pool(tokens, codes, mask=valid, scale=SCALE, need_gram=False)
    assert found.dtype == plain.numpy().dtype and not np.isnan(found).any()
    assert (found[1] == 0).all()  # no valid token
    assert (found[2] == tokens[2, 3].numpy()).all()  # a single one
    tolerance = max(2 * float((plain.double() - exact).abs().max()), 1e-6)
    assert np.abs(found.astype(np.float64) - exact.numpy()).max() <= tolerance


def test_an_opset_before_its_operators_is_refused():
    with pytest.raises(ValueError, match="opset is 17; the pooling's function needs 18 or newer"):
        function_proto(17)
