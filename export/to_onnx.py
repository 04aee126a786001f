"""Checkpoint → bundle of two ONNX encoders.

    python export/to_onnx.py SOURCE --out BUNDLE

SOURCE is a folder that training or `MVAM.save_pretrained` wrote, a folder with an open_clip_config.json, or the name of
an open_clip model. BUNDLE gets image.onnx and text.onnx (batch of any size in, L2-normalised float32 embedding out),
samples.safetensors (inputs with PyTorch's answers) and bundle.json. A graph that does not agree with PyTorch, or holds
what TensorRT does not build, leaves no bundle, and the exit code is 1.
"""
from __future__ import annotations

import argparse
import copy
import dataclasses
import sys
from pathlib import Path

import torch
from mvam_fast.export import samples
from mvam_fast.export.bundle import PRECISIONS, TOWERS, ExportError, new_bundle, write_manifest
from mvam_fast.export.command import add_source_arguments, summary
from mvam_fast.export.describe import stamp, tower_entry, write_samples
from mvam_fast.export.graph import write_graph
from mvam_fast.export.lint import check_graph
from mvam_fast.export.onnx_run import parity_of
from mvam_fast.export.quantize import quantize
from mvam_fast.export.recall import RecallData, recall_cost
from mvam_fast.export.serving_repo import write_model_repository
from mvam_fast.export.source import DTYPES, Source, Tower, given_source
from mvam_fast.export.verify import BATCHES, check_half_arithmetic

from mvam_fast._optional import require

LOWEST_OPSET = 20  # the first that has Gelu; below 19 Cast is another
BF16_OPSET = 22  # the first whose Conv takes bfloat16
POOLINGS = ("plain", "node")
IMAGE_INPUTS = ("float", "uint8")


def export_bundle(
    source: str | Path | Source,
    out: str | Path,
    *,
    pretrained: str | None = None,
    fuse_poolers: bool = False,
    opset: int | None = None,
    precision: str = "fp32",
    pooling: str = "plain",
    batch: int | None = None,
    image_input: str = "float",
    external_data: bool = False,
    recall: RecallData | None = None,
    progress: bool = True,
) -> dict:
    """Writes the bundle and returns the content of its bundle.json, parity included.

    Args:
        source, pretrained, fuse_poolers: see `source.open_source`; or a `Source` of a model in memory.
        out: a new folder, or an older bundle, which is replaced.
        opset: of the graphs, by default 20 (22 in bfloat16); from 23 on, float32 graphs have the Attention operator.
        precision: "fp32"; "fp16" or "bf16": weights and products in half precision, but softmax, LayerNorm statistics
            and the final normalisation in float32; "int8": dynamic quantisation, for ONNX Runtime on CPUs only.
        pooling: "plain" operators, or "node": mvam::MultiViewPool with a function body, which ONNX Runtime runs and for
            which TensorRT can take the fused kernel.
        batch: a fixed batch size; None leaves it free.
        image_input: "float" [B,3,H,W] as training's transform gives it, or "uint8" [B,H,W,3], normalised in the graph.
        external_data: weights beside the graphs, as is always done above 2 GB.
        recall: a data set to measure recall on, in PyTorch and as exported.

    Raises ExportError when a gate fails; `out` then is as it was before.
    """
    opset = _check(opset, precision, pooling, batch, image_input)
    if recall is not None and precision == "bf16":
        raise ValueError("recall cannot be measured in bf16: ONNX Runtime has no kernels for it on a CPU")
    if external_data and precision == "int8":
        raise ValueError("external_data is True, but an int8 graph is written as one file")
    with new_bundle(out) as folder:
        found = given_source(source, pretrained, fuse_poolers, progress)
        kept = write_samples(found, folder, progress)
        cast, dtype = found, DTYPES.get(precision, torch.float32)
        if dtype != torch.float32:
            cast = dataclasses.replace(found, model=copy.deepcopy(found.model).to(dtype))
        manifest = {
            "kind": "onnx", "precision": precision, "opset": opset,
            "towers": {
                name: tower_entry(name, found, kept, f"{name}.onnx", batch=batch, image_input=image_input)
                for name in TOWERS
            },
            **found.facts(kept["text_embeds"].shape[1]),
            "pooling": {}, "graphs": {}, "parity": {},
        }  # fmt: skip
        for name in TOWERS:
            path = folder / manifest["towers"][name]["file"]
            if progress:
                print(f"exporting {path.name}", file=sys.stderr, flush=True)
            tower = Tower(cast, name, dtype, image_input == "uint8").eval()
            example = torch.from_numpy(samples.inputs_of(name, kept, manifest, batch or 2))
            manifest["pooling"][name] = write_graph(
                tower, example, path, name, opset=opset, pooling=pooling, batch=batch, external_data=external_data,
            )  # fmt: skip
            quantised = quantize(path) if precision == "int8" else 0
            manifest["graphs"][name] = check_graph(path, int8=precision == "int8")
            if quantised:
                manifest["graphs"][name]["int8_products"] = quantised
            if manifest["graphs"][name]["opset"] != opset:
                raise ExportError(f"{path.name} has opset {manifest['graphs'][name]['opset']}; {opset} was asked for")
            manifest["parity"][name] = parity_of(path, name, kept, manifest, (batch,) if batch else BATCHES)
        if dtype != torch.float32:
            manifest["half_arithmetic"] = {
                name: check_half_arithmetic(Tower(cast, name, dtype).eval(), name, kept, manifest) for name in TOWERS
            }
        written = write_manifest(folder, manifest | stamp("onnx", "onnxruntime", "onnxscript", "open_clip"))
        if recall is not None:
            written = write_manifest(folder, written | {"recall": recall_cost(found, folder, recall, progress)})
    return written


def _check(opset: int | None, precision: str, pooling: str, batch: int | None, image_input: str) -> int:
    """Clear errors, and the opset that is meant."""
    choices = {"precision": (precision, PRECISIONS), "pooling": (pooling, POOLINGS)}
    choices["image_input"] = (image_input, IMAGE_INPUTS)
    for name, (value, allowed) in choices.items():
        if value not in allowed:
            raise ValueError(f"{name} is {value!r}; it must be one of {', '.join(allowed)}")
    if opset is None:
        opset = BF16_OPSET if precision == "bf16" else 20
    highest = require("onnx", extra="export").defs.onnx_opset_version()
    if not LOWEST_OPSET <= opset <= highest:
        raise ValueError(f"opset is {opset}; it must be from {LOWEST_OPSET} to {highest}")
    if precision == "bf16" and opset < BF16_OPSET:
        raise ValueError(f"opset is {opset}; bfloat16 needs {BF16_OPSET} or later, before which Conv does not take it")
    if batch is not None and batch < 1:
        raise ValueError(f"batch is {batch}; it must be at least 1, or None for any")
    return opset


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add_source_arguments(parser)
    parser.add_argument("--opset", type=int, help="20, in bfloat16 22; from 23 on with the Attention operator (fp32)")
    parser.add_argument("--precision", choices=PRECISIONS, default="fp32", help="of weights and products")
    parser.add_argument("--pooling", choices=POOLINGS, default="plain", help="operators, or one node with a body")
    parser.add_argument("--batch", type=int, help="fix the batch size (default: any)")
    parser.add_argument("--image-input", choices=IMAGE_INPUTS, default="float", help="uint8: [B,H,W,3], not normalised")
    parser.add_argument("--external-data", action="store_true", help="weights beside the graphs, as above 2 GB")
    parser.add_argument("--recall-data", help="Karpathy JSON: measure recall, in PyTorch and as exported")
    parser.add_argument("--recall-images", help="folder of its images")
    parser.add_argument("--recall-split", default="test", help="split of it")
    parser.add_argument("--serving", metavar="DIR", help="write a model repository of Triton Inference Server, too")
    options = vars(parser.parse_args(arguments))
    serving = options.pop("serving")
    data, images, split = (options.pop(f"recall_{name}") for name in ("data", "images", "split"))
    if (data is None) != (images is None):
        parser.error("--recall-data and --recall-images belong together")
    try:
        manifest = export_bundle(recall=RecallData(data, images, split) if data else None, **options)
        served = write_model_repository(options["out"], serving) if serving else []
    except (ExportError, ValueError, TypeError, OSError, ImportError) as error:
        print(f"to_onnx: error: {error}", file=sys.stderr)
        return 1
    for line in summary(manifest):
        print(line)
    print(*served, options["out"], sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
