"""Checkpoint → bundle of two AOTInductor packages: compiled encoders that need PyTorch's libraries but no model code.

    python export/to_aoti.py SOURCE --out BUNDLE

SOURCE as for to_onnx.py. BUNDLE gets image.pt2 and text.pt2 (batch of any size in, L2-normalised float32 embedding
out), samples.safetensors and bundle.json; Python runs them through `mvam_fast.Encoder`, C++ through libtorch's
AOTIModelPackageLoader. On a GPU the pooling is the fused Triton kernel, compiled in; on a CPU it is plain operators. A
package that does not agree with PyTorch leaves no bundle, and the exit code is 1.
"""
from __future__ import annotations

import argparse
import contextlib
import copy
import dataclasses
import sys
import warnings
from pathlib import Path

import torch
from mvam_fast.export import samples
from mvam_fast.export.bundle import TOWERS, ExportError, new_bundle, write_manifest
from mvam_fast.export.command import add_source_arguments, summary
from mvam_fast.export.describe import stamp, tower_entry, write_samples
from mvam_fast.export.source import DTYPES, Source, Tower, given_source
from mvam_fast.export.verify import check_parity

from mvam_fast.dispatch import exporting_as
from mvam_fast.serving.aoti_runner import cpu_here

PRECISIONS = tuple(DTYPES)
DEVICES = ("cpu", "cuda")


def export_bundle(
    source: str | Path | Source,
    out: str | Path,
    *,
    pretrained: str | None = None,
    fuse_poolers: bool = False,
    precision: str = "fp32",
    device: str = "cpu",
    progress: bool = True,
) -> dict:
    """Writes the bundle and returns the content of its bundle.json, parity included.

    `source`, `pretrained`, `fuse_poolers`: see `source.open_source`; or a `Source` of a model in memory. `precision`:
    "fp32", "fp16" or "bf16", the final normalisation always in float32. `device`: "cpu" or "cuda"; a package runs only
    where it was compiled for. Raises ExportError when a gate fails; `out` then is as it was before.
    """
    for name, value, allowed in (("precision", precision, PRECISIONS), ("device", device, DEVICES)):
        if value not in allowed:
            raise ValueError(f"{name} is {value!r}; it must be one of {', '.join(allowed)}")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device is 'cuda', but there is no CUDA GPU: packages are compiled where they will run")
    with new_bundle(out) as folder:
        found = given_source(source, pretrained, fuse_poolers, progress)
        kept = write_samples(found, folder, progress)
        dtype = DTYPES[precision]
        cast = found
        if (device, dtype) != ("cpu", torch.float32):
            cast = dataclasses.replace(found, model=copy.deepcopy(found.model).to(device, dtype))
        manifest = {
            "kind": "aoti", "precision": precision, "device": device, "compiled_for": compiled_for(device),
            "towers": {name: tower_entry(name, found, kept, f"{name}.pt2") for name in TOWERS},
            **found.facts(kept["text_embeds"].shape[1]),
            "pooling": {}, "parity": {},
        }  # fmt: skip
        for name in TOWERS:
            path = folder / f"{name}.pt2"
            if progress:
                print(f"compiling {path.name}, a minute or so", file=sys.stderr, flush=True)
            example = torch.from_numpy(samples.inputs_of(name, kept, manifest, 2)).to(device)
            manifest["pooling"][name] = compile_package(Tower(cast, name, dtype).eval(), example, path)
            manifest["parity"][name] = check_parity(path.name, _runner(path, device), name, kept, manifest)
        return write_manifest(folder, manifest | stamp("open_clip"))


def compiled_for(device: str) -> dict:
    """What a package takes for granted of the machine it runs on."""
    if device == "cpu":
        return cpu_here()
    major, minor = torch.cuda.get_device_capability()
    return {"gpu": torch.cuda.get_device_name(), "compute_capability": f"{major}.{minor}"}


def compile_package(tower: torch.nn.Module, example: torch.Tensor, path: Path) -> str:
    """Traces and compiles `tower` for any batch of inputs like `example` [2,...]; returns how it pools."""
    from torch._inductor import aoti_compile_and_package

    form = None
    if example.is_cuda:
        from mvam_fast.export.pool_triton import TritonForm

        form = TritonForm()
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # of the compiler's own internals; errors are exceptions
        try:
            with exporting_as(form) if form else contextlib.nullcontext():
                batch = torch.export.Dim("batch", min=1)
                program = torch.export.export(tower, (example,), dynamic_shapes=({0: batch},), strict=False)
            aoti_compile_and_package(program, package_path=str(path))
        except Exception as error:  # of many kinds: tracing, code generation, the C++ compiler
            raise ExportError(f"{path.name}: torch cannot compile this tower: {error}") from error
    return "plain" if form is None else "; ".join(sorted(set(form.found))) or "plain"


def _runner(path: Path, device: str):
    from torch._inductor import aoti_load_package

    package = aoti_load_package(str(path))
    return lambda inputs: package(torch.from_numpy(inputs).to(device)).cpu().numpy()


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add_source_arguments(parser)
    parser.add_argument("--precision", choices=PRECISIONS, default="fp32", help="of weights and products")
    parser.add_argument("--device", choices=DEVICES, default="cpu", help="what it is compiled for; it must be here")
    options = vars(parser.parse_args(arguments))
    try:
        manifest = export_bundle(**options)
    except (ExportError, ValueError, TypeError, OSError, ImportError) as error:
        print(f"to_aoti: error: {error}", file=sys.stderr)
        return 1
    for line in summary(manifest):
        print(line)
    print(options["out"])
    return 0


if __name__ == "__main__":
    sys.exit(main())
