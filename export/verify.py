"""The gates that an exported graph must pass: it is valid ONNX, it runs in TensorRT's operator set, it agrees."""
from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from mvam_fast.export.bundle import ExportError

from mvam_fast._optional import require

BATCHES = (1, 3, 8)
MAX_ABS = 1e-4
MIN_COSINE = 0.9999
GALLERY = 256
TIE = 1e-5

# What TensorRT's ONNX parser builds and the encoders need. Left out on purpose: control flow, sequences and shapes that
# depend on data (NonZero), none of which an encoder needs, and CumSum, which TensorRT has for floating point only.
OPERATORS = set("""
    Add And ArgMax Attention AveragePool BatchNormalization Cast Clip Concat Constant ConstantOfShape Conv Cos Div Equal
    Erf Exp Expand Flatten Gather GatherElements GatherND Gelu Gemm GlobalAveragePool Greater GreaterOrEqual HardSigmoid
    HardSwish Identity LayerNormalization Less LessOrEqual Log MatMul Max MaxPool Min Mul Neg Not Or Pad Pow Range
    Reciprocal ReduceL2 ReduceMax ReduceMean ReduceMin ReduceSum Relu Reshape Shape Sigmoid Sin Slice Softmax Softplus
    Split Sqrt Squeeze Sub Tanh Tile Transpose Unsqueeze Where
""".split())


def check_graph(path: Path) -> dict:
    """Full checker, strict shape inference, operators; returns counts. The batch is the only free dimension."""
    onnx = require("onnx", extra="export")
    try:
        onnx.checker.check_model(str(path), full_check=True)
        model = onnx.load(path, load_external_data=False)
        onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ExportError(f"{path.name} is not valid ONNX: {error}") from error
    refused = sorted(
        {f"{node.domain}::{node.op_type}" if node.domain else node.op_type for node in model.graph.node} - OPERATORS
    )
    if refused:
        raise ExportError(f"{path.name} has operators that TensorRT does not build: {', '.join(refused)}")
    for value in (*model.graph.input, *model.graph.output):
        dims = [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]
        if not isinstance(dims[0], str) or any(isinstance(d, str) for d in dims[1:]):
            raise ExportError(f"{path.name}: {value.name} has shape {dims}; the batch alone may vary")
    return {"nodes": len(model.graph.node), "opset": model.opset_import[0].version, "ir_version": model.ir_version}


def check_parity(path: Path, encode, inputs: torch.Tensor, *, seed: int = 0) -> dict[str, dict]:
    """ONNX Runtime on the CPU against `encode` (PyTorch) on the first 1, 3 and 8 of `inputs`.

    Per batch size: largest absolute difference, least cosine, and whether each embedding has the same five nearest
    neighbours in a fixed random gallery (neighbours whose scores differ by less than 1e-5 may change places).
    """
    runtime = require("onnxruntime", extra="export")
    session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    report = {}
    for batch in BATCHES:
        with torch.no_grad():
            expected = encode(inputs[:batch])
        found = torch.from_numpy(session.run(None, {name: inputs[:batch].numpy()})[0])
        if found.shape != expected.shape:
            raise ExportError(f"{path.name}: output is {tuple(found.shape)}, PyTorch gives {tuple(expected.shape)}")
        generator = torch.Generator().manual_seed(seed)
        gallery = F.normalize(torch.randn(GALLERY, expected.shape[1], generator=generator), dim=-1)
        report[str(batch)] = {
            "max_abs": float((found - expected).abs().max()),
            "cosine": float(F.cosine_similarity(found.double(), expected.double()).min()),
            "top5": _same_neighbours(found @ gallery.T, expected @ gallery.T),
        }
    bad = {
        batch: row for batch, row in report.items()
        if not (row["max_abs"] <= MAX_ABS and row["cosine"] >= MIN_COSINE and row["top5"])
    }  # fmt: skip
    if bad:
        raise ExportError(
            f"{path.name} disagrees with PyTorch: {bad}; "
            f"allowed are max_abs ≤ {MAX_ABS}, cosine ≥ {MIN_COSINE}, the same top 5"
        )
    return report


def _same_neighbours(found: torch.Tensor, expected: torch.Tensor, k: int = 5) -> bool:
    """Whether the k best by `found` are the k best by `expected`, up to ties."""
    chosen = expected.gather(1, found.topk(k, dim=1).indices)
    return bool(np.allclose(chosen.numpy(), expected.topk(k, dim=1).values.numpy(), rtol=0, atol=TIE))
