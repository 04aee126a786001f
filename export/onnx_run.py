"""An exported graph run by ONNX Runtime on the CPU, to be compared with PyTorch."""
from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
from mvam_fast.export.verify import check_parity

from mvam_fast._optional import require


def parity_of(path: Path, tower: str, kept: dict, manifest: dict, batches: tuple[int, ...]) -> dict[str, dict]:
    """`verify.check_parity` of the graph at `path`.

    ONNX Runtime's CPU has no kernels for bfloat16. Such a graph is run with the same operators and the same rounded
    weights in float32; what its arithmetic costs is `verify.check_half_arithmetic`'s to tell.
    """
    with tempfile.TemporaryDirectory() as folder:
        runnable = _in_float32(path, Path(folder)) if manifest["precision"] == "bf16" else path
        runtime = require("onnxruntime", extra="export")
        session = runtime.InferenceSession(str(runnable), providers=["CPUExecutionProvider"])
        name = manifest["towers"][tower]["input"]["name"]
        return check_parity(
            path.name, lambda inputs: session.run(None, {name: inputs})[0], tower, kept, manifest, batches=batches
        )


def _in_float32(path: Path, folder: Path) -> Path:
    """A copy of a bfloat16 graph in which every bfloat16 is a float32 of the same value."""
    onnx = require("onnx", extra="export")
    half, single = onnx.TensorProto.BFLOAT16, onnx.TensorProto.FLOAT
    model = onnx.load(path)

    def widened(tensor):
        return onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(tensor).astype(np.float32), tensor.name)

    for tensor in model.graph.initializer:
        if tensor.data_type == half:
            tensor.CopyFrom(widened(tensor))
    for value in (*model.graph.value_info, *model.graph.input, *model.graph.output):
        if value.type.tensor_type.elem_type == half:
            value.type.tensor_type.elem_type = single
    for node in (*model.graph.node, *(node for function in model.functions for node in function.node)):
        for attribute in node.attribute:
            if node.op_type == "Cast" and attribute.name == "to" and attribute.i == half:
                attribute.i = single
            if attribute.type == onnx.AttributeProto.TENSOR and attribute.t.data_type == half:
                attribute.t.CopyFrom(widened(attribute.t))
    target = folder / path.name
    onnx.save(model, target, save_as_external_data=model.ByteSize() > onnx.checker.MAXIMUM_PROTOBUF)
    return target
