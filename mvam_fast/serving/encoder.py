"""Encoder: embeds images and texts with an exported bundle."""
from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from .._optional import require
from ..export.bundle import TOWERS, read_manifest, sha256
from ..preprocess import eval_transform, tokenizer_of
from ..retrieval.datasets import read_image

BACKENDS = ("auto", "onnxruntime-cuda", "onnxruntime-cpu")


class Encoder:
    """Both towers of a bundle in ONNX Runtime; make one with `Encoder.load`.

    Attributes:
        width: length F of an embedding; manifest: the content of bundle.json.
        backend: what runs, "onnxruntime-cuda" or "onnxruntime-cpu"; reason: why.
    """

    def __init__(self, manifest: dict, sessions: dict, backend: str, reason: str):
        self.manifest, self.backend, self.reason = manifest, backend, reason
        self.width = manifest["embedding_width"]
        self._sessions = sessions
        self._transform = eval_transform(manifest["preprocess"])
        self._tokenizer = tokenizer_of(manifest["tokenizer"])

    @classmethod
    def load(cls, bundle: str | Path, backend: str = "auto") -> Encoder:
        """Opens a bundle that `export/to_onnx.py` wrote, after checking that its files are the ones it was made with.

        `backend`: "auto" takes the GPU where this ONNX Runtime can use one, "onnxruntime-cuda" and "onnxruntime-cpu"
        insist.
        """
        if backend not in BACKENDS:
            raise ValueError(f"backend is {backend!r}; it must be one of {', '.join(BACKENDS)}")
        bundle = Path(bundle)
        manifest = read_manifest(bundle)
        for name, digest in manifest["files"].items():
            if not (bundle / name).is_file():
                raise FileNotFoundError(f"bundle: {bundle} lacks its file {name}")
            if sha256(bundle / name) != digest:
                raise ValueError(f"bundle: {bundle / name} is not the file that the bundle was made with")
        runtime = require("onnxruntime", extra="export")
        backend, reason = _choose(backend, runtime)
        provider = "CUDAExecutionProvider" if backend == "onnxruntime-cuda" else "CPUExecutionProvider"
        sessions = {
            tower: runtime.InferenceSession(str(bundle / file), providers=[provider])
            for tower, (file, _, _) in TOWERS.items()
        }
        active = sessions["image"].get_providers()[0]
        if active != provider:
            raise RuntimeError(f"backend {backend!r}: ONNX Runtime could not start {provider} and took {active}")
        return cls(manifest, sessions, backend, reason)

    def embed_images(self, images: Sequence, *, batch_size: int = 32) -> np.ndarray:
        """Paths or PIL images → L2-normalised float32 [n, width]; prepared exactly as in training's evaluation."""
        _check_sequence("images", images)

        def prepare(batch):
            opened = [read_image(image) if isinstance(image, (str, Path)) else image for image in batch]
            wrong = next((image for image in opened if not hasattr(image, "convert")), None)
            if wrong is not None:
                raise TypeError(f"images holds a {type(wrong).__name__}; it must hold paths or PIL images")
            return np.stack([self._transform(image).numpy() for image in opened])

        return self._run("image", images, prepare, batch_size)

    def embed_texts(self, texts: Sequence[str], *, batch_size: int = 32) -> np.ndarray:
        """Strings → L2-normalised float32 [n, width]; what exceeds the tokenizer's context is cut, as in open_clip."""
        _check_sequence("texts", texts)
        wrong = next((text for text in texts if not isinstance(text, str)), None)
        if wrong is not None:
            raise TypeError(f"texts holds a {type(wrong).__name__}; it must hold strings")
        return self._run("text", texts, lambda batch: self._tokenizer(list(batch)).numpy(), batch_size)

    def _run(self, tower: str, items: Sequence, prepare, batch_size: int) -> np.ndarray:
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; it must be at least 1")
        name = TOWERS[tower][1]
        found = [np.empty((0, self.width), np.float32)]
        for start in range(0, len(items), batch_size):
            found.append(self._sessions[tower].run(None, {name: prepare(items[start : start + batch_size])})[0])
        return np.concatenate(found)


def _check_sequence(name: str, value) -> None:
    if isinstance(value, (str, bytes)) or not isinstance(value, Sequence):
        raise TypeError(f"{name} is a {type(value).__name__}; it must be a list")


def _choose(backend: str, runtime) -> tuple[str, str]:
    if backend != "auto":
        return backend, "asked for"
    if "CUDAExecutionProvider" not in runtime.get_available_providers():
        return "onnxruntime-cpu", "this ONNX Runtime is built without CUDA"
    if not require("torch", extra="export").cuda.is_available():
        return "onnxruntime-cpu", "there is no CUDA GPU"
    return "onnxruntime-cuda", "there is a CUDA GPU"
