"""The bundle: what an exported encoder consists of, and how it says what it is."""
from __future__ import annotations

import hashlib
from pathlib import Path

from mvam_fast.files import read_json

FORMAT = 1
MANIFEST = "bundle.json"
TOWERS = {  # tower: (file, input, output)
    "image": ("image.onnx", "image", "image_embeds"),
    "text": ("text.onnx", "token_ids", "text_embeds"),
}

# What the Encoder cannot do without.
KEYS = ("embedding_width", "preprocess", "tokenizer", "files")


class ExportError(RuntimeError):
    """An exported graph that must not be used; the message says why. No bundle is left behind."""


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def read_manifest(bundle: Path) -> dict:
    """The content of bundle.json; ValueError or FileNotFoundError where `bundle` is none that this version reads."""
    if not bundle.is_dir():
        raise FileNotFoundError(f"bundle: no such folder: {bundle}")
    manifest = read_json(bundle / MANIFEST, "bundle")
    found = manifest.get("format") if isinstance(manifest, dict) else None
    if found != FORMAT:
        raise ValueError(f"bundle: {bundle} has format {found!r}; this version reads {FORMAT}")
    lacking = [key for key in KEYS if key not in manifest]
    lacking += [f"files.{file}" for file, _, _ in TOWERS.values() if file not in (manifest.get("files") or {})]
    if lacking:
        raise ValueError(f"bundle: {bundle / MANIFEST} lacks {', '.join(lacking)}")
    return manifest


def check_replaceable(out: Path) -> None:
    """ValueError unless `out` is new, or a bundle and nothing else: replacing it deletes what is there."""
    if not out.exists():
        return
    present = {path.name for path in out.iterdir()} if out.is_dir() else {out.name}
    try:
        manifest = read_json(out / MANIFEST, "out")
        own = {MANIFEST, *manifest["files"]} if "parity" in manifest else set()
    except (FileNotFoundError, ValueError, TypeError, KeyError):
        own = set()
    if not own:
        raise ValueError(f"out: {out} exists and is no bundle; choose another folder")
    if present - own:
        raise ValueError(f"out: {out} holds more than a bundle ({', '.join(sorted(present - own)[:5])})")
