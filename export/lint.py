"""What an exported graph may consist of: valid ONNX, and nothing that TensorRT's parser does not build.

The table follows the operator list of TensorRT's ONNX parser (opsets 9 to 24). It holds what encoders need and leaves
out on purpose: control flow and sequences (If, Loop, Scan), shapes that depend on data (NonZero), CumSum, which
TensorRT has for floating point only, and float64.
"""
from __future__ import annotations

import re
from pathlib import Path

from mvam_fast.export.bundle import ExportError
from mvam_fast.export.pool_node import DOMAIN

from mvam_fast._optional import require

FLOATS = {"FLOAT", "FLOAT16", "BFLOAT16"}
NUMBERS = FLOATS | {"INT32", "INT64"}
ANY = NUMBERS | {"BOOL"}
_TYPES = {
    **dict.fromkeys(
        """Attention AveragePool BatchNormalization Conv Cos Erf Exp Gelu Gemm GlobalAveragePool HardSigmoid HardSwish
        LayerNormalization Log MatMul Reciprocal Relu Sigmoid Sin Softmax Softplus Sqrt Tanh""".split(), FLOATS,
    ),
    **dict.fromkeys("Add Clip Div Max MaxPool Min Mul Neg Pow Range Sub".split(), NUMBERS),
    **dict.fromkeys("ReduceL2 ReduceMax ReduceMean ReduceMin ReduceSum".split(), NUMBERS),
    **dict.fromkeys("And Or Not".split(), {"BOOL"}),
    **dict.fromkeys(
        """ArgMax Cast CastLike Concat Constant ConstantOfShape Equal Expand Flatten Gather GatherElements GatherND
        Greater GreaterOrEqual Identity Less LessOrEqual Pad Reshape Shape Slice Split Squeeze Tile Transpose Unsqueeze
        Where""".split(), ANY,
    ),
}  # fmt: skip
# The operator set of ONNX Runtime's dynamic quantisation, which runs on its CPU provider and not in TensorRT.
_INT8 = {"DynamicQuantizeLinear", "MatMulInteger"}
_BUILD_TIME_AXES = {"ReduceL2", "ReduceMax", "ReduceMean", "ReduceMin", "ReduceSum", "Squeeze", "Unsqueeze"}


def check_graph(path: Path, *, int8: bool = False) -> dict:
    """Full checker, strict shape inference, operators with their types, free dimensions; returns counts.

    `int8`: dynamic quantisation's operators may be there, whose types the table does not have. Raises ExportError.
    """
    onnx, inliner = require("onnx", extra="export"), require("onnx.inliner", extra="export")
    broken = require("google.protobuf.message", extra="export").DecodeError
    try:
        onnx.checker.check_model(str(path), full_check=True)
        model = onnx.load(path, load_external_data=False)
        calls = {node.op_type for node in model.graph.node if node.domain == DOMAIN}
        flat = inliner.inline_local_functions(model) if calls else model
        flat = onnx.shape_inference.infer_shapes(flat, check_type=True, strict_mode=True, data_prop=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ExportError(f"{path.name} is not valid ONNX: {error}") from error
    except broken as error:
        raise ExportError(f"{path.name} cannot be read as ONNX: {error}") from error
    for fault in _faults(flat.graph, _opset(flat), int8, onnx):
        raise ExportError(f"{path.name} {fault}")
    return {
        "nodes": len(model.graph.node), "opset": _opset(model), "ir_version": model.ir_version,
        "functions": sorted(calls),
    }  # fmt: skip


def _opset(model) -> int:
    return next(entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx"))


def _faults(graph, opset: int, int8: bool, onnx):
    """What TensorRT would refuse, one sentence each."""
    allowed = _TYPES.keys() | (_INT8 if int8 else set())
    named = {f"{node.domain}::{node.op_type}" if node.domain else node.op_type for node in graph.node}
    refused = sorted(named - allowed)
    if refused:
        yield f"has operators that TensorRT does not build: {', '.join(refused)}"
    type_name = onnx.TensorProto.DataType.Name
    inputs, outputs = ({value.name for value in values} for values in (graph.input, graph.output))
    types = {tensor.name: type_name(tensor.data_type) for tensor in graph.initializer}
    constants = set(types)
    for value in (*graph.input, *graph.value_info, *graph.output):
        types[value.name] = type_name(value.type.tensor_type.elem_type)
        yield from _free_dimensions(value, io=value.name in inputs | outputs)
    for node in graph.node:
        if node.op_type == "Constant":
            constants.update(node.output)
        kinds = {types[name] for name in (*node.input, *node.output) if name in types}
        if node.op_type == "Cast" and node.input[0] in inputs:
            kinds -= {"UINT8"}  # only as network input
        if node.op_type in _TYPES and not int8 and kinds - ANY:
            yield f"computes in {', '.join(sorted(kinds - ANY))} ({node.op_type} {node.name})"
        data = {types[name] for name in node.output[:1] if name in types} or kinds
        if _TYPES.get(node.op_type) in (FLOATS, NUMBERS) and data - _TYPES[node.op_type] and not int8:
            yield f"has {node.op_type} in {', '.join(sorted(data))}, which TensorRT does not build ({node.name})"
        yield from _restrictions(node, types, constants, opset)
        yield from _islands(node, types)


def _restrictions(node, types: dict, constants: set, opset: int):
    if node.op_type in _BUILD_TIME_AXES and len(node.input) > 1 and node.input[1] and node.input[1] not in constants:
        yield f"has {node.op_type} {node.name} with axes that are not known at build time"
    if node.op_type == "LayerNormalization" and len([name for name in node.output if name]) > 1:
        yield f"has LayerNormalization {node.name} with more than one output"
    if node.op_type == "Conv" and types.get(node.input[0]) == "BFLOAT16" and opset < 22:
        yield f"has Conv {node.name} in bfloat16, which ONNX has from opset 22 on; the graph has {opset}"
    if node.op_type == "Attention":
        given = {attribute.name for attribute in node.attribute}
        if len(node.input) > 4 or "softcap" in given or "qk_matmul_output_mode" in given:
            yield f"has Attention {node.name} with past keys, softcap or a second output"


def _islands(node, types: dict):
    """What stays in float32 in a graph of half precision: softmax, LayerNorm statistics, the final norm."""
    attributes = {attribute.name: attribute.i for attribute in node.attribute}
    half = types.get(node.input[0]) in ("FLOAT16", "BFLOAT16") if node.input else False
    if half and node.op_type in ("Softmax", "ReduceL2"):
        yield f"has {node.op_type} {node.name} in half precision, not in float32"
    if half and node.op_type == "LayerNormalization" and attributes.get("stash_type", 1) != 1:
        yield f"has LayerNormalization {node.name} with statistics in half precision"
    if half and node.op_type == "Attention":
        yield f"has Attention {node.name} in half precision, whose softmax is too"


def _free_dimensions(value, *, io: bool):
    """The batch is the only symbol, and of inputs and outputs the first axis alone."""
    dims = [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]
    symbols = set(re.findall(r"[A-Za-z_]\w*", " ".join(d for d in dims if isinstance(d, str))))
    if symbols - {"batch"}:
        yield f"has {value.name} of shape {dims}; the batch alone may vary"
    elif io and any(isinstance(d, str) for d in dims[1:]):
        yield f"has {value.name} of shape {dims}; of inputs and outputs the first axis alone may vary"
