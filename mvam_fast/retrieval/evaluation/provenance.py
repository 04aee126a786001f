"""What a result was made of, as hashes: two results of equal hashes can be compared query by query."""
from __future__ import annotations

import hashlib
import importlib.util
import json
from pathlib import Path


def sha256_of_file(path: str | Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def sha256_of_value(value) -> str:
    """Of the value as JSON; what JSON does not know counts as its text."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def code_sha256() -> str:
    """Of this package's sources, kernels included and exporters not: the version of a code that no git may be near.
    A checkout and what is installed of it have the same."""
    package = Path(__file__).parents[2]
    kernels = Path(importlib.util.find_spec("mvam_fast.kernels").origin).parent
    sources = {path.relative_to(package).as_posix(): path for path in package.rglob("*.py")}
    sources |= {f"kernels/{path.relative_to(kernels).as_posix()}": path for path in kernels.rglob("*.py")}
    digest = hashlib.sha256()
    for name in sorted(sources):
        if not name.startswith("export/"):
            digest.update(name.encode() + b"\0" + hashlib.sha256(sources[name].read_bytes()).digest())
    return digest.hexdigest()
