"""Checkpoint → bundle of two ONNX encoders.

    python export/to_onnx.py CHECKPOINT --out BUNDLE

CHECKPOINT is a folder that training or `MVAM.save_pretrained` wrote. BUNDLE gets image.onnx, text.onnx (batch of any
size in, L2-normalised concatenated embedding out, float32) and bundle.json. A graph that does not agree with PyTorch
leaves no bundle, and the exit code is 1.
"""
from __future__ import annotations

import argparse
import contextlib
import io
import os
import platform
import shutil
import sys
import warnings
from datetime import datetime, timezone
from pathlib import Path

import torch
from mvam_fast.export.bundle import FORMAT, MANIFEST, TOWERS, ExportError, check_replaceable, sha256
from mvam_fast.export.verify import check_graph, check_parity
from torch import nn

from mvam_fast._optional import require
from mvam_fast.files import write_json
from mvam_fast.model import MVAM, WEIGHTS
from mvam_fast.preprocess import TOKENIZER_KEYS, tokenizer_of
from mvam_fast.version import __version__

# Real sentences: the end-of-text rule would not be exercised by random ids. One is cut at the context's end.
SENTENCES = (
    "a photo of a cat", "hi!", "two dogs run across a field of snow", "!~",
    "a small red circle left of a large striped blue square at the top right of the picture",
    "nothing", " ".join(["a very long sentence that does not fit"] * 12), "an orange bar and a white cross",
)  # fmt: skip


# Below this torch's exporter has no operators of its own, and a conversion that fails keeps 18 without an error.
LOWEST_OPSET = 18


class _Tower(nn.Module):
    """One encoder with a normalised output, as a module of its own to export."""

    def __init__(self, encode):
        super().__init__()
        self.encode = encode
        self.model = encode.__self__  # so that its parameters are the graph's

    def forward(self, inputs):
        return self.encode(inputs, normalize=True)


def export_bundle(checkpoint: str | Path, out: str | Path, *, opset: int = 20, progress: bool = True) -> dict:
    """Writes the bundle and returns the content of its bundle.json, parity included.

    `out` may be an older bundle, which is replaced. Raises ExportError when a gate of `verify` fails;
    `out` then is as it was before.
    """
    checkpoint, out = Path(checkpoint), Path(os.path.abspath(out))
    packages = ("onnx", "onnxruntime", "onnxscript", "open_clip")
    versions = {name: require(name, extra="export").__version__ for name in packages}
    highest = require("onnx", extra="export").defs.onnx_opset_version()
    if not LOWEST_OPSET <= opset <= highest:
        raise ValueError(f"opset is {opset}; it must be from {LOWEST_OPSET} to {highest}")
    check_replaceable(out)
    model = MVAM.from_pretrained(checkpoint)
    config = model.open_clip_config
    text_cfg = config["model_cfg"]["text_cfg"]
    tokenizer = {key: text_cfg[key] for key in TOKENIZER_KEYS if key in text_cfg}
    size = config["preprocess_cfg"]["size"]
    height, width = (size, size) if isinstance(size, int) else size
    generator = torch.Generator().manual_seed(0)
    inputs = {
        "image": torch.randn(len(SENTENCES), 3, height, width, generator=generator),
        "text": tokenizer_of(text_cfg)(list(SENTENCES)),
    }
    encoders = {"image": model.encode_image, "text": model.encode_text}

    temporary = out.with_name(f".{out.name}.{os.getpid()}")
    temporary.mkdir(parents=True)
    try:
        parity, graphs = {}, {}
        for tower, (file, input_name, output_name) in TOWERS.items():
            if progress:
                print(f"exporting {file}", file=sys.stderr, flush=True)
            path = temporary / file
            _export(_Tower(encoders[tower]).eval(), inputs[tower][:2], path, input_name, output_name, opset)
            graphs[tower] = check_graph(path)
            if graphs[tower]["opset"] != opset:
                raise ExportError(f"{file} has opset {graphs[tower]['opset']}; {opset} was asked for")
            parity[tower] = check_parity(path, _Tower(encoders[tower]), inputs[tower])
        embedding_width = encoders["text"](inputs["text"][:1]).shape[1]
        manifest = {
            "format": FORMAT,
            "opset": opset,
            "num_views": model.num_views,
            "global_view": model.global_view,
            "num_vectors": model.num_vectors,
            "vector_width": embedding_width // model.num_vectors,
            "embedding_width": embedding_width,
            "logit_scale": model.logit_scale.exp().item(),
            "preprocess": config["preprocess_cfg"],
            "tokenizer": {
                "kind": "open_clip HFTokenizer" if tokenizer.get("hf_tokenizer_name") else "open_clip SimpleTokenizer",
                "context_length": inputs["text"].shape[1], **tokenizer,
            },
            "files": {path.name: sha256(path) for path in sorted(temporary.iterdir())},
            "graphs": graphs,
            "parity": parity,
            "source": {"checkpoint": checkpoint.name, "weights_sha256": sha256(checkpoint / WEIGHTS)},
            "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "versions": {
                "mvam_fast": __version__, "torch": torch.__version__, "python": platform.python_version(), **versions,
            },
        }  # fmt: skip
        write_json(temporary / MANIFEST, manifest)
        _replace(temporary, out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return manifest


def _replace(temporary: Path, out: Path) -> None:
    """Folders cannot be swapped in one step: the old one steps aside, and is deleted only once the new one is there."""
    if not out.exists():
        os.rename(temporary, out)
        return
    aside = temporary.with_name(f"{temporary.name}.old")
    os.rename(out, aside)
    try:
        os.rename(temporary, out)
    except OSError:
        os.rename(aside, out)
        raise
    shutil.rmtree(aside)


def _export(tower: nn.Module, example: torch.Tensor, path: Path, input_name: str, output_name: str, opset: int):
    # The exporter reports its stages on stdout and warns about its own internals; errors are exceptions.
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), torch.no_grad():
        warnings.simplefilter("ignore")
        try:
            program = torch.onnx.export(
                tower, (example,), dynamo=True, dynamic_shapes=({0: torch.export.Dim("batch")},), opset_version=opset,
                input_names=[input_name], output_names=[output_name], verbose=False,
            )  # fmt: skip
        except torch.onnx.errors.OnnxExporterError as error:
            raise ExportError(f"{path.name}: torch cannot export this tower: {error.__cause__ or error}") from error
        for node in program.model.graph.all_nodes():
            node.metadata_props.clear()  # stack traces: paths of this machine, which the bundle's users have no use for
        program.save(path)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("checkpoint", type=Path, help="folder written by training or MVAM.save_pretrained")
    parser.add_argument("--out", type=Path, required=True, help="folder of the bundle")
    parser.add_argument("--opset", type=int, default=20, help="ONNX opset (default: %(default)s)")
    options = parser.parse_args(arguments)
    try:
        manifest = export_bundle(options.checkpoint, options.out, opset=options.opset)
    except (ExportError, ValueError, FileNotFoundError, ImportError) as error:
        print(f"to_onnx: error: {error}", file=sys.stderr)
        return 1
    for tower, report in manifest["parity"].items():
        for batch, row in report.items():
            print(f"{tower:6} batch {batch}: max abs {row['max_abs']:.1e}, cosine {row['cosine']:.7f}, same top 5")
    print(options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
