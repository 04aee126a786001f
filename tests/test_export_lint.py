"""The graph gate: valid ONNX, TensorRT's operators and types, one free dimension, float32 where it matters."""
import numpy as np
import onnx
import pytest
from mvam_fast.export.bundle import ExportError
from mvam_fast.export.lint import check_graph
from onnx import TensorProto as T
from onnx import helper


def write(path, nodes, *, inputs=(("x", T.FLOAT, ["batch", 4]),), output=("y", T.FLOAT, ["batch", 4]), **options):
    constants = [onnx.numpy_helper.from_array(np.asarray(v), n) for n, v in options.get("constants", {}).items()]
    graph = helper.make_graph(
        nodes, "graph", [helper.make_tensor_value_info(*value) for value in inputs],
        [helper.make_tensor_value_info(*output)], constants,
    )  # fmt: skip
    opsets = [helper.make_opsetid("", options.get("opset", 20)), *options.get("more_opsets", [])]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), path / "graph.onnx")
    return path / "graph.onnx"


def node(kind, *inputs, output="y", **attributes):
    return helper.make_node(kind, inputs, [output], **attributes)


def test_a_good_graph_is_counted(tmp_path):
    path = write(tmp_path, [node("Softmax", "x", output="p"), node("Add", "p", "x")])
    assert check_graph(path) == {"nodes": 2, "opset": 20, "ir_version": 10, "functions": []}


HALF = {"inputs": [("x", T.FLOAT16, ["batch", 4])], "output": ("y", T.FLOAT16, ["batch", 4])}
FAULTS = {
    "invalid": ([node("Add", "x", "nowhere")], {}, "is not valid ONNX"),
    "control flow by data": (
        [node("NonZero", "x")], {"output": ("y", T.INT64, [2, "n"])}, "does not build: NonZero",
    ),
    "sum over tokens": (
        [node("CumSum", "x", "axis")], {"constants": {"axis": np.int64(1)}}, "does not build: CumSum",
    ),
    "own operator": (
        [node("pool", "x", domain="else")], {"more_opsets": [helper.make_opsetid("else", 1)]}, "build: else::pool",
    ),
    "float64": (
        [node("Cast", "x", output="d", to=T.DOUBLE), node("Cast", "d", to=T.FLOAT)], {}, "computes in DOUBLE",
    ),
    "product of integers": (
        [node("MatMul", "x", "w")],
        {"inputs": [("x", T.INT64, ["batch", 4])], "output": ("y", T.INT64, ["batch", 4]),
         "constants": {"w": np.eye(4, dtype=np.int64)}}, "MatMul in INT64",
    ),
    "free width": (
        [node("Relu", "x")], {"inputs": [("x", T.FLOAT, ["batch", "n"])], "output": ("y", T.FLOAT, ["batch", "n"])},
        "the batch alone may vary",
    ),
    "batch elsewhere": (
        [node("Transpose", "x", perm=[1, 0])], {"output": ("y", T.FLOAT, [4, "batch"])}, "first axis alone may vary",
    ),
    "axes from an input": (
        [node("ReduceSum", "x", "axes")],
        {"inputs": [("x", T.FLOAT, ["batch", 4]), ("axes", T.INT64, [1])], "output": ("y", T.FLOAT, ["batch", 1])},
        "axes that are not known",
    ),
    "softmax in half": ([node("Softmax", "x")], HALF, "Softmax .*half precision"),
    "norm in half": (
        [node("ReduceL2", "x", "axes")], HALF | {"output": ("y", T.FLOAT16, ["batch", 1]),
         "constants": {"axes": np.array([1])}}, "ReduceL2 .*half precision",
    ),
    "statistics in half": (
        [node("LayerNormalization", "x", "w", stash_type=T.FLOAT16)],
        HALF | {"constants": {"w": np.ones(4, np.float16)}}, "statistics in half precision|not valid ONNX",
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_the_gate_names_what_it_refuses(fault, tmp_path):
    nodes, options, message = FAULTS[fault]
    with pytest.raises(ExportError, match=f"graph.onnx .*({message})"):
        check_graph(write(tmp_path, nodes, **options))


def test_a_bfloat16_convolution_needs_an_opset_that_has_it(tmp_path):
    shape = ["batch", 1, 4, 4]
    options = {
        "inputs": [("x", T.BFLOAT16, shape), ("w", T.BFLOAT16, [1, 1, 1, 1])], "output": ("y", T.BFLOAT16, shape),
    }  # fmt: skip
    check_graph(write(tmp_path, [node("Conv", "x", "w")], opset=22, **options))
    with pytest.raises(ExportError, match="not valid ONNX|bfloat16, which ONNX has from opset 22"):
        check_graph(write(tmp_path, [node("Conv", "x", "w")], opset=20, **options))


def test_a_file_that_is_cut_short_is_told_as_such(tmp_path):
    path = write(tmp_path, [node("Relu", "x")])
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ExportError, match="graph.onnx (cannot be read as|is not valid) ONNX"):
        check_graph(path)


def test_int8_operators_are_for_int8_alone(tmp_path):
    quantise = helper.make_node("DynamicQuantizeLinear", ["x"], ["q", "scale", "zero"])
    path = write(tmp_path, [quantise, node("Cast", "q", to=T.FLOAT)])
    check_graph(path, int8=True)
    with pytest.raises(ExportError, match="DynamicQuantizeLinear"):
        check_graph(path)
