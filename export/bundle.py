"""The bundle: what an exported encoder consists of, and how it says what it is."""
from __future__ import annotations

import hashlib
from pathlib import Path

FORMAT = 1
MANIFEST = "bundle.json"
TOWERS = {  # tower: (file, input, output)
    "image": ("image.onnx", "image", "image_embeds"),
    "text": ("text.onnx", "token_ids", "text_embeds"),
}


class ExportError(RuntimeError):
    """An exported graph that must not be used; the message says why. No bundle is left behind."""


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
