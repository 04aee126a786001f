"""The bundle: a folder that holds both encoders in one exported form, and bundle.json, which says how to feed them.

A bundle is of one `kind`: "onnx" (to_onnx.py), "aoti" (to_aoti.py) or "trt" (to_trt.py). Its manifest has

    format, kind, precision           "fp32", "fp16", "bf16" or "int8"
    towers                            {"image": {"file", "input": {"name", "dtype", "shape"}, "output": {...}}, "text":
                                      ...}; shapes are lists, "batch" stands for the free dimension
    embedding_width, vector_width, num_vectors, num_views, global_view, logit_scale, logit_bias
    preprocess, tokenizer             open_clip's preprocess_cfg, and what of text_cfg decides the token ids
    files                             {name: SHA-256} of every other file of the folder
    parity                            what was compared with PyTorch, and how close it came
    source, created, versions         where it came from

and, for its kind, what only that kind has (graphs, engines, ...). `samples.safetensors` holds inputs with the
embeddings that PyTorch gave them in float32 (`samples.py`), so that any copy of the bundle can be checked anywhere,
without the checkpoint.
"""
from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mvam_fast.files import read_json, write_json

FORMAT = 2
MANIFEST = "bundle.json"
SAMPLES = "samples.safetensors"
KINDS = ("onnx", "aoti", "trt")
PRECISIONS = ("fp32", "fp16", "bf16", "int8")
INPUT_NAMES = {"image": "image", "text": "token_ids"}
OUTPUT_NAMES = {"image": "image_embeds", "text": "text_embeds"}
TOWERS = tuple(INPUT_NAMES)

# What the Encoder cannot do without.
KEYS = ("kind", "precision", "towers", "embedding_width", "preprocess", "tokenizer", "files")


class ExportError(RuntimeError):
    """An exported graph that must not be used; the message says why. No bundle is left behind."""


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def read_manifest(bundle: str | Path, *, kind: str | None = None) -> dict:
    """The content of bundle.json; ValueError or FileNotFoundError where `bundle` is none that this version reads.

    `kind`: the only one that will do.
    """
    bundle = Path(bundle)
    if not bundle.is_dir():
        raise FileNotFoundError(f"bundle: no such folder: {bundle}")
    manifest = read_json(bundle / MANIFEST, "bundle")
    found = manifest.get("format") if isinstance(manifest, dict) else None
    if found != FORMAT:
        newer = isinstance(found, int) and found > FORMAT
        hint = "a newer mvam_fast wrote it: update" if newer else "export the checkpoint again"
        raise ValueError(f"bundle: {bundle} has format {found!r}; this version reads {FORMAT} ({hint})")
    lacking = [key for key in KEYS if key not in manifest]
    towers, files = (value if isinstance(value, dict) else {} for value in map(manifest.get, ("towers", "files")))
    lacking += [f"towers.{tower}" for tower in TOWERS if "file" not in (towers.get(tower) or {})]
    lacking += [f"files.{tower['file']}" for tower in towers.values() if tower.get("file") not in files]
    lacking += ["device"] if manifest.get("kind") == "aoti" and "device" not in manifest else []
    if lacking:
        raise ValueError(f"bundle: {bundle / MANIFEST} lacks {', '.join(lacking)}")
    if manifest["kind"] not in KINDS:
        raise ValueError(f"bundle: {bundle} is of kind {manifest['kind']!r}; it must be one of {', '.join(KINDS)}")
    outside = [name for name in files if Path(name).name != name]
    if outside:
        raise ValueError(f"bundle: {bundle / MANIFEST} names files outside of the bundle: {', '.join(outside)}")
    if kind is not None and manifest["kind"] != kind:
        raise ValueError(f"bundle: {bundle} is of kind {manifest['kind']!r}; it must be {kind!r}")
    return manifest


def check_files(bundle: str | Path, manifest: dict) -> None:
    """FileNotFoundError or ValueError unless the bundle's files are the ones that it was made with."""
    for name, digest in manifest["files"].items():
        path = Path(bundle) / name
        if not path.is_file():
            raise FileNotFoundError(f"bundle: {bundle} lacks its file {name}")
        if sha256(path) != digest:
            raise ValueError(f"bundle: {path} is not the file that the bundle was made with")


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


@contextmanager
def new_bundle(out: str | Path) -> Iterator[Path]:
    """Yields an empty folder to write into; it becomes `out` when the block ends without an exception.

    `out` may be an older bundle, which is replaced only then; whatever goes wrong leaves it as it was.
    """
    out = Path(os.path.abspath(out))
    check_replaceable(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        yield temporary
        os.chmod(temporary, 0o777 & ~_umask())  # mkdtemp's are for their owner alone
        replace_folder(temporary, out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_manifest(folder: Path, manifest: dict) -> dict:
    """Completes `manifest` by format and file hashes, writes it into `folder`, and returns it."""
    files = {path.name: sha256(path) for path in sorted(folder.iterdir()) if path.name != MANIFEST}
    manifest = {"format": FORMAT, **manifest, "files": files}
    write_json(folder / MANIFEST, manifest)
    return manifest


def replace_folder(temporary: Path, out: Path) -> None:
    """`temporary` takes the place of `out`. Folders cannot be swapped in one step: the old one steps aside, and is
    deleted only once the new one is there."""
    if not out.exists():
        os.rename(temporary, out)
        return
    aside = out.with_name(f"{temporary.name}.old")
    os.rename(out, aside)
    try:
        os.rename(temporary, out)
    except OSError:
        os.rename(aside, out)
        raise
    shutil.rmtree(aside, ignore_errors=True)  # the new one is in its place: nothing has failed


def _umask() -> int:
    mask = os.umask(0o022)  # there is no way to ask but to set it
    os.umask(mask)
    return mask
