"""Dynamic int8, for ONNX Runtime on CPUs: weights in 8 bits, activations quantised as they come."""
from __future__ import annotations

from pathlib import Path

from mvam_fast._optional import require


def quantize(path: Path) -> int:
    """Quantises the matrix products of the graph at `path` in place, and returns how many; the pooling stays float32.

    What comes after the last LayerNormalization is left: view codes and output projections, a hundredth of the work.
    Weights in 7 bits: without VNNI, the processor's 8-bit products saturate.
    """
    onnx = require("onnx", extra="export")
    quantization = require("onnxruntime.quantization", extra="export")
    nodes = onnx.load(path, load_external_data=False).graph.node
    last = max((i for i, node in enumerate(nodes) if node.op_type == "LayerNormalization"), default=len(nodes))
    products = [node for node in nodes if node.op_type in ("MatMul", "Gemm")]
    # A pooled vector is projected before, by the weights of the views, which may not be in 8 bits in one place alone.
    kept = {name for node in nodes[last:] if node in products for name in node.input[1:]}
    left = [node.name for node in products if kept & set(node.input[1:])]
    target = path.with_suffix(".int8.onnx")
    quantization.quantize_dynamic(
        path, target, weight_type=quantization.QuantType.QInt8, op_types_to_quantize=["MatMul", "Gemm"],
        nodes_to_exclude=left, reduce_range=True, per_channel=True,
        extra_options={"MatMulConstBOnly": True},
    )  # fmt: skip
    path.with_name(f"{path.name}.data").unlink(missing_ok=True)
    target.replace(path)
    return sum(node.op_type == "MatMulInteger" for node in onnx.load(path).graph.node)
