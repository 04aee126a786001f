"""A tower as an ONNX graph: traced by torch.export, its attention written out with the softmax in float32."""
from __future__ import annotations

import contextlib
import io
import math
import warnings
from pathlib import Path

import torch
from mvam_fast.export.bundle import INPUT_NAMES, OUTPUT_NAMES, ExportError
from mvam_fast.export.pool_node import DOMAIN, NodeForm
from mvam_fast.export.source import Tower
from torch import Tensor

from mvam_fast._optional import require
from mvam_fast.dispatch import exporting_as

ATTENTION_SINCE = 23  # ONNX has an operator for attention from this opset on


def write_graph(
    tower: Tower,
    example: Tensor,
    path: Path,
    name: str,
    *,
    opset: int,
    pooling: str = "plain",
    batch: int | None = None,
    external_data: bool | None = None,
) -> str:
    """Exports `tower` ("image" or "text" by `name`); returns how the pooling was written: "plain", "node" or why not.

    `example` [b, ...]: b is the graph's batch if `batch` is given, else any. `external_data`: None puts the weights
    beside the graph only where one file could not hold them.
    """
    form = NodeForm() if pooling == "node" else None
    with contextlib.ExitStack() as stack:
        stack.enter_context(_silence())
        stack.enter_context(torch.no_grad())
        if form:
            stack.enter_context(exporting_as(form))
        # In half precision ONNX Runtime 1.31 crashes on the operator, while it optimises the graph for a CPU.
        as_operator = opset >= ATTENTION_SINCE and tower.dtype == torch.float32
        written = {} if as_operator else {torch.ops.aten.scaled_dot_product_attention.default: _attention}
        try:
            onnx_program = torch.onnx.export(
                tower, (example,), dynamo=True, opset_version=opset, input_names=[INPUT_NAMES[name]],
                output_names=[OUTPUT_NAMES[name]], verbose=False,
                custom_translation_table=written,
                dynamic_shapes=None if batch else ({0: torch.export.Dim("batch")},),
            )  # fmt: skip
        except torch.onnx.errors.OnnxExporterError as error:
            raise ExportError(f"{path.name}: torch cannot export this tower: {error.__cause__ or error}") from error
        model = onnx_program.model
        _tidy(model.graph)
        _cast_pixels_first(model.graph)
        if form and "node" in form.found:
            _add_function(model, opset)
        onnx_program.save(path, external_data=external_data)
    if form is None:
        return "plain"
    return "; ".join(sorted(set(form.found))) or "plain operators: nothing here pools by shared codes"


def _attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
    """ONNX for scaled_dot_product_attention [B,H,L,E]: products in the tensors' dtype, softmax in float32.

    Torch's own translation keeps the softmax in half precision, and computes shapes in the graph that are known before.
    """
    ir = require("onnx_ir", extra="export")
    op = require("onnxscript", extra="export").opset20
    if is_causal or enable_gqa:
        raise NotImplementedError("attention that is causal by a flag, or with grouped queries")
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    scaled = op.Mul(query, op.CastLike(op.Constant(value_float=scale), query))
    logits = op.MatMul(scaled, op.Transpose(key, perm=[0, 1, 3, 2]))
    half = query.dtype != ir.DataType.FLOAT
    if half:
        logits = op.Cast(logits, to=ir.DataType.FLOAT)
    if attn_mask is not None and attn_mask.dtype == ir.DataType.BOOL:
        logits = op.Where(attn_mask, logits, op.Constant(value_float=torch.finfo(torch.float32).min))
    elif attn_mask is not None:
        logits = op.Add(logits, op.Cast(attn_mask, to=ir.DataType.FLOAT) if half else attn_mask)
    weights = op.Softmax(logits, axis=-1)
    return op.MatMul(op.Cast(weights, to=query.dtype) if half else weights, value)


def _tidy(graph) -> None:
    for node in graph.all_nodes():
        node.metadata_props.clear()  # stack traces: paths of this machine, which the bundle's users have no use for
        if node.op_type == "Attention":
            for default in ("softcap", "qk_matmul_output_mode"):  # TensorRT refuses them even at their defaults
                node.attributes.pop(default, None)


def _cast_pixels_first(graph) -> None:
    """TensorRT takes uint8 only as an input that is cast, so the batch size is asked of what the cast gives."""
    ir = require("onnx_ir", extra="export")
    (pixels,) = graph.inputs
    if pixels.dtype != ir.DataType.UINT8:
        return
    cast = next(use.node for use in pixels.uses() if use.node.op_type == "Cast")
    graph.remove(cast)
    graph.insert_before(graph[0], cast)
    for node, index in list(pixels.uses()):
        if node is not cast:
            node.replace_input_with(index, cast.outputs[0])


def _add_function(model, opset: int) -> None:
    from mvam_fast.export.pool_function import function_proto

    ir = require("onnx_ir", extra="export")
    function = ir.serde.deserialize_function(function_proto(opset))
    model.functions[function.identifier()] = function
    model.opset_imports[DOMAIN] = 1


@contextlib.contextmanager
def _silence():
    """The exporter reports its stages on stdout and warns about its own internals; errors are exceptions."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield
