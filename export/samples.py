"""Inputs with PyTorch's answers, kept inside a bundle: what every exported form of an encoder is checked against.

Images are 8-bit pictures of soft colour fields with some noise; texts are sentences of many lengths. In the bundle:

    pixels [n,H,W,3] uint8, token_ids [n,L] int64, image_embeds and text_embeds [n,F] float32
"""
from __future__ import annotations

from pathlib import Path

import numpy as np
from mvam_fast.export.bundle import OUTPUT_NAMES, SAMPLES

from mvam_fast._optional import require

# Real sentences: the end-of-text rule would not be exercised by random ids. One is cut at the context's end, one starts
# with "!", whose id in CLIP's vocabulary is that of padding.
SENTENCES = (
    "a photo of a cat", "hi!", "two dogs run across a field of snow", "!~",
    "a small red circle left of a large striped blue square at the top right of the picture",
    "nothing", " ".join(["a very long sentence that does not fit"] * 12), "an orange bar and a white cross",
    "a man in a blue shirt is standing on a ladder cleaning a window", "three zebras", "ein kleines Boot auf dem See",
    "a kitchen with a stove, a sink, two windows and a table set for breakfast", "x", "people waiting for a train",
    "the left half is green; the right half is purple", "a bus", "an old photograph of a bridge over a river at night",
)  # fmt: skip


def pictures(count: int, height: int, width: int, *, seed: int = 0) -> np.ndarray:
    """[count,height,width,3] uint8: colour fields of 6 × 6 random corners, with noise of a few levels on top."""
    generator = np.random.default_rng(seed)
    corners = generator.uniform(0, 255, (count, 6, 6, 3))
    rows, columns = (np.linspace(0, 4.999, side) for side in (height, width))
    top, left = rows.astype(int), columns.astype(int)
    down, right = (rows - top)[:, None, None], (columns - left)[None, :, None]

    def at(y, x):
        return corners[:, y][:, :, x]

    fields = (at(top, left) * (1 - right) + at(top, left + 1) * right) * (1 - down)
    fields += (at(top + 1, left) * (1 - right) + at(top + 1, left + 1) * right) * down
    fields += generator.normal(0, 8, fields.shape)
    return fields.round().clip(0, 255).astype(np.uint8)


def normalised(pixels: np.ndarray, preprocess: dict) -> np.ndarray:
    """[n,3,H,W] float32 of pixels [n,H,W,3] uint8, by the mean and std of an open_clip preprocess_cfg."""
    mean, std = (np.asarray(preprocess[name], np.float32) for name in ("mean", "std"))
    return np.ascontiguousarray(((pixels.astype(np.float32) / 255 - mean) / std).transpose(0, 3, 1, 2))


def save(folder: Path, pixels: np.ndarray, token_ids: np.ndarray, embeds: dict[str, np.ndarray]) -> None:
    """Writes samples.safetensors; `embeds` by tower."""
    tensors = {"pixels": pixels, "token_ids": token_ids}
    tensors |= {OUTPUT_NAMES[tower]: found for tower, found in embeds.items()}
    # safetensors writes memory as it lies, whatever the strides.
    tensors = {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}
    (folder / SAMPLES).write_bytes(require("safetensors.numpy", extra="export").save(tensors))


def load(bundle: str | Path) -> dict[str, np.ndarray]:
    return require("safetensors.numpy", extra="export").load_file(Path(bundle) / SAMPLES)


def inputs_of(tower: str, samples: dict[str, np.ndarray], manifest: dict, batch: int) -> np.ndarray:
    """`batch` rows of input in the dtype and layout that the tower takes; samples repeat when they run out."""
    take = np.arange(batch) % len(samples["token_ids"])
    wanted = manifest["towers"][tower]["input"]
    if tower == "text":
        return samples["token_ids"][take].astype(wanted["dtype"])
    pixels = samples["pixels"][take]
    return pixels if wanted["dtype"] == "uint8" else normalised(pixels, manifest["preprocess"]).astype(wanted["dtype"])


def expected(tower: str, samples: dict[str, np.ndarray], batch: int) -> np.ndarray:
    """The embeddings [batch,F] that PyTorch gave those rows in float32."""
    found = samples[OUTPUT_NAMES[tower]]
    return found[np.arange(batch) % len(found)]
