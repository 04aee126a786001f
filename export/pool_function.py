"""The pooling node's meaning in standard operators: the ONNX local function that a file carries beside the node.

    mvam::MultiViewPool(tokens [B,N,D], codes [M,D], mask [B,N] int32) → pooled [B,M,D]

It is `mvam_fast.reference` without a Gram matrix, written out: the logits are a product in the tokens' dtype, the
softmax is float32's, tokens that take no part are zeroed before they are multiplied and have probability 0, so a sample
without a valid token gives 0. Whatever knows no plugin of the name runs this.
"""
from __future__ import annotations

import numpy as np
from mvam_fast.export.pool_node import DOMAIN, NAME, PLUGIN

from mvam_fast._optional import require

LOWEST_OPSET = 18


def function_proto(opset: int):
    """The `onnx.FunctionProto`, in the operators of `opset`. Of its attributes only `scale` means anything here.

    A model that has it imports the domain "mvam", version 1, and the standard operators at this `opset`.
    """
    onnx = require("onnx", extra="export")
    if opset < LOWEST_OPSET:
        raise ValueError(f"opset is {opset}; the pooling's function needs {LOWEST_OPSET} or newer")
    helper = onnx.helper
    lowest = float(np.finfo(np.float32).min)  # not -inf: a row without a valid token would be NaN

    def constant(name: str, values, kind=onnx.TensorProto.FLOAT, dims=()):
        return helper.make_node("Constant", [], [name], value=helper.make_tensor(name, kind, dims, values))

    scale = helper.make_node("Constant", [], ["scale"])
    scale.attribute.add(name="value_float", ref_attr_name="scale", type=onnx.AttributeProto.FLOAT)
    nodes = [
        scale, constant("zero", [0.0]), constant("lowest", [lowest]),
        constant("one", [1], onnx.TensorProto.INT64, [1]), constant("two", [2], onnx.TensorProto.INT64, [1]),
        helper.make_node("Cast", ["mask"], ["valid"], to=onnx.TensorProto.BOOL),
        helper.make_node("Unsqueeze", ["valid", "one"], ["valid_columns"]),  # [B,1,N]
        helper.make_node("Unsqueeze", ["valid", "two"], ["valid_rows"]),  # [B,N,1]
        helper.make_node("CastLike", ["zero", "tokens"], ["nothing"]),
        helper.make_node("Where", ["valid_rows", "tokens", "nothing"], ["kept"]),  # 0 · NaN must not arise
        helper.make_node("Transpose", ["kept"], ["keys"], perm=[0, 2, 1]),
        helper.make_node("MatMul", ["codes", "keys"], ["products"]),  # [B,M,N]
        helper.make_node("Cast", ["products"], ["exact_products"], to=onnx.TensorProto.FLOAT),
        helper.make_node("Mul", ["exact_products", "scale"], ["all_logits"]),
        helper.make_node("Where", ["valid_columns", "all_logits", "lowest"], ["logits"]),
        helper.make_node("Softmax", ["logits"], ["all_weights"], axis=-1),
        helper.make_node("Where", ["valid_columns", "all_weights", "zero"], ["exact_weights"]),
        helper.make_node("CastLike", ["exact_weights", "tokens"], ["weights"]),
        helper.make_node("MatMul", ["weights", "kept"], ["pooled"]),
    ]  # fmt: skip
    for node in nodes:
        node.input[:], node.output[:] = _own(node.input), _own(node.output)
    return helper.make_function(
        DOMAIN, NAME, _own(["tokens", "codes", "mask"]), _own(["pooled"]), nodes, [helper.make_opsetid("", opset)],
        ["scale", *PLUGIN], doc_string="Multi-view attention pooling in standard operators.",
    )  # fmt: skip


def _own(names) -> list[str]:
    """TensorRT's parser keeps one table of tensors for graph and functions: a name must not be in it already."""
    return [f"mvam_pool_{name}" for name in names]
