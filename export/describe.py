"""The parts of a manifest that every exporter writes in the same way, and the samples that go with it."""
from __future__ import annotations

import platform
import sys
from datetime import datetime, timezone
from pathlib import Path

import numpy as np
import torch
from mvam_fast.export import samples
from mvam_fast.export.bundle import INPUT_NAMES, OUTPUT_NAMES, TOWERS
from mvam_fast.export.source import Source, Tower

from mvam_fast._optional import require
from mvam_fast.version import __version__


def stamp(*packages: str) -> dict:
    """When, and with which versions of mvam_fast, torch, Python and `packages`."""
    versions = {"mvam_fast": __version__, "torch": torch.__version__, "python": platform.python_version()}
    versions |= {name: require(name, extra="export").__version__ for name in packages}
    return {"created": datetime.now(timezone.utc).isoformat(timespec="seconds"), "versions": versions}


def write_samples(found: Source, folder: Path, progress: bool) -> dict[str, np.ndarray]:
    """samples.safetensors: inputs, and what PyTorch makes of them in float32."""
    weights = next(found.model.parameters())
    if weights.device.type != "cpu" or weights.dtype != torch.float32:
        raise ValueError(
            f"source: the model is in {weights.dtype} on {weights.device}; exports start from float32 on the CPU, and "
            "their precision is an option"
        )
    if progress:
        print("embedding samples with PyTorch", file=sys.stderr, flush=True)
    pixels = samples.pictures(len(samples.SENTENCES), *found.image_size)
    token_ids = found.tokenizer()(list(samples.SENTENCES))
    inputs = {"image": torch.from_numpy(samples.normalised(pixels, found.preprocess)), "text": token_ids}
    with torch.no_grad():
        embeds = {name: Tower(found, name).eval()(inputs[name]).numpy() for name in TOWERS}
    samples.save(folder, pixels, token_ids.numpy(), embeds)
    return samples.load(folder)


def tower_entry(
    name: str, found: Source, kept: dict, file: str, *, batch: int | None = None, image_input: str = "float"
) -> dict:
    """The manifest's entry of a tower that takes `batch` rows, or any number."""
    size = [*found.image_size]
    shape = kept["token_ids"].shape[1:] if name == "text" else [*size, 3] if image_input == "uint8" else [3, *size]
    dtype = "int64" if name == "text" else {"uint8": "uint8", "float": "float32"}[image_input]
    free = batch or "batch"
    return {
        "file": file,
        "input": {"name": INPUT_NAMES[name], "dtype": dtype, "shape": [free, *shape]},
        "output": {
            "name": OUTPUT_NAMES[name], "dtype": "float32", "shape": [free, kept[OUTPUT_NAMES[name]].shape[1]],
        },
    }  # fmt: skip
