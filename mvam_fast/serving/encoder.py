"""Encoder: embeds images and texts with a bundle or a checkpoint, whatever runs it."""
from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .._optional import require
from ..export.bundle import TOWERS
from ..preprocess import tokenizer_of
from .decoding import Decoder, make_pool
from .gate import Gate
from .images import ImageRows
from .inputs import TowerInput, as_given
from .loading import Loaded, load
from .staging import Staging


class Encoder:
    """Both towers of a model; make one with `Encoder.load`.

    Several threads may use one Encoder at once. It is a context manager; `close` ends it.

    Attributes:
        width: length F of an embedding; manifest: the content of bundle.json, or the like of it for a checkpoint.
        backend: what runs ("onnxruntime-cpu", "onnxruntime-cuda", "torch", "aoti" or "trt"); reason: why.
        device: where.
    """

    def __init__(self, loaded: Loaded, pool: ThreadPoolExecutor):
        self._runner, self._sessions, self._pool = loaded.runner, loaded.sessions, pool
        self.manifest, self.backend, self.reason = loaded.manifest, loaded.backend, loaded.reason
        self.device, self.width = loaded.runner.device, loaded.manifest["embedding_width"]
        self._inputs = {
            tower: TowerInput(tower, self.manifest["towers"][tower]["input"], self.device) for tower in TOWERS
        }
        self._tokenizing = threading.Lock()
        self._gate = Gate("Encoder")

    @classmethod
    def load(
        cls,
        path: str | Path,
        backend: str = "auto",
        *,
        device: str | torch.device | None = None,
        threads: int | None = None,
        workers: int | None = None,
        buckets: Sequence[int] | None = None,
        graphs: bool = True,
    ) -> Encoder:
        """Opens a bundle, after checking that its files are the ones it was made with, or a checkpoint.

        Args:
            path: a folder that `export/to_onnx.py`, `to_aoti.py` or `to_trt.py` wrote; or `MVAM.save_pretrained`, which
                PyTorch runs.
            backend: "auto" takes what can run the path, on a GPU where there is one. "onnxruntime-cpu",
                "onnxruntime-cuda", "torch", "aoti" and "trt" insist.
            device: "cpu", "cuda" or "cuda:1"; None leaves it to the backend.
            threads: that one operator may use on the CPU; None leaves it to ONNX Runtime or PyTorch. In PyTorch the
                number holds for the whole process.
            workers: threads that read and prepare pictures, 8 or one per processor if there are fewer.
            buckets: batch sizes on a GPU, {1, 2, 4, ..., 64} by default: other batches are padded to the next one, or
                split. Engines of TensorRT and bundles with a fixed batch have their own; on the CPU any size runs as
                it is.
            graphs: record a CUDA graph for each bucket, when it is first needed.
        """
        pool = make_pool(workers)
        return cls(load(path, backend, device=device, threads=threads, buckets=buckets, graphs=graphs), pool)

    def embed_images(self, images: Sequence, *, batch_size: int = 32, progress: bool = False) -> np.ndarray:
        """Paths or PIL images → L2-normalised float32 [n, width]; prepared exactly as in training's evaluation.

        `progress`: show a bar.
        """
        _check_sequence("images", images)
        _check_batch_size(batch_size)
        wrong = next((image for image in images if not isinstance(image, (str, Path)) and not _is_image(image)), None)
        if wrong is not None:
            raise TypeError(f"images holds a {type(wrong).__name__}; it must hold paths or PIL images")
        with self._gate, contextlib.closing(self._decoder.batches(images, batch_size)) as batches:
            return self._embed("image", batches, len(images), progress)

    def embed_texts(self, texts: Sequence[str], *, batch_size: int = 32, progress: bool = False) -> np.ndarray:
        """Strings → L2-normalised float32 [n, width]; what exceeds the tokenizer's context is cut, as in open_clip.

        `progress`: show a bar.
        """
        _check_sequence("texts", texts)
        _check_batch_size(batch_size)
        wrong = next((text for text in texts if not isinstance(text, str)), None)
        if wrong is not None:
            raise TypeError(f"texts holds a {type(wrong).__name__}; it must hold strings")
        with self._gate:
            batches = (self._token_ids(texts[at : at + batch_size]) for at in range(0, len(texts), batch_size))
            return self._embed("text", batches, len(texts), progress)

    def encode_image(self, images: np.ndarray | Tensor) -> np.ndarray | Tensor:
        """Preprocessed images [B,3,H,W] (or [B,H,W,3] uint8, as the manifest says) → L2-normalised float32 [B, width].

        An array gives an array, a tensor a tensor on its device. What is on this Encoder's device, contiguous and of
        the tower's dtype is read in place. Copied first are: read-only arrays, other layouts and devices, and other
        dtypes of the same kind, which are converted.
        """
        return self._encode("image", images)

    def encode_text(self, token_ids: np.ndarray | Tensor) -> np.ndarray | Tensor:
        """Token ids [B,L], integers → L2-normalised float32 [B, width]. Arrays and tensors as in `encode_image`."""
        return self._encode("text", token_ids)

    def session(self, tower: str):
        """ONNX Runtime's InferenceSession of "image" or "text", to bind memory to by yourself, while this is open.

        On a GPU, load with graphs=False for this, since a session that records graphs replays them; and it computes on
        a stream of its own, so that what is bound must be there before it runs.
        """
        if tower not in TOWERS:
            raise ValueError(f"tower is {tower!r}; it must be one of {', '.join(TOWERS)}")
        if not self.backend.startswith("onnxruntime"):
            raise RuntimeError(f"session: backend {self.backend!r} has none; onnxruntime-cpu and onnxruntime-cuda do")
        with self._gate:
            return self._sessions[tower]

    def close(self) -> None:
        """Ends the threads and frees the towers, after the calls that other threads are in. Later calls are errors."""
        if self._gate.close():
            self._pool.shutdown()
            self._sessions = {}
            self._runner.close()

    def __enter__(self) -> Encoder:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def _encode(self, tower: str, value: np.ndarray | Tensor) -> np.ndarray | Tensor:
        with self._gate:
            inputs = self._inputs[tower].tensor(value)
            if len(inputs):
                found = self._runner.run(tower, inputs)
            else:
                found = torch.zeros(0, self.width, device=self.device)
            return as_given(found, value)

    def _embed(self, tower: str, batches: Iterable[Tensor], count: int, progress: bool) -> np.ndarray:
        found, done = np.empty((count, self.width), np.float32), 0
        with _bar(f"{tower}s", count, progress) as bar:
            for batch in batches:
                embeds = self._runner.run(tower, batch.to(self.device, non_blocking=True))
                # Waits for the GPU, which then has also read `batch`, so that it may be filled anew.
                torch.from_numpy(found)[done : done + len(batch)] = embeds
                done += len(batch)
                if bar is not None:
                    bar.update(len(batch))
        return found

    # Made when first needed: preprocessed input takes neither open_clip nor a tokenizer, which may have to be fetched.

    @functools.cached_property
    def _decoder(self) -> Decoder:
        image = self._inputs["image"]
        rows = ImageRows(self.manifest["preprocess"], image.row, image.numpy_dtype)
        return Decoder(rows, Staging(image.row, image.dtype, pinned=self.device.type == "cuda"), self._pool)

    @functools.cached_property
    def _tokenizer(self):
        return tokenizer_of(self.manifest["tokenizer"])

    def _token_ids(self, texts: Sequence[str]) -> Tensor:
        with self._tokenizing:  # Hugging Face's tokenizers are not for several threads at once
            return self._inputs["text"].tensor(self._tokenizer(list(texts)))


def _is_image(value) -> bool:
    return hasattr(value, "convert") and hasattr(value, "load")


def _check_sequence(name: str, value) -> None:
    if isinstance(value, (str, bytes)) or not isinstance(value, Sequence):
        raise TypeError(f"{name} is a {type(value).__name__}; it must be a list")


def _check_batch_size(batch_size: int) -> None:
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; it must be at least 1")


def _bar(name: str, count: int, progress: bool):
    if not progress:
        return contextlib.nullcontext()
    return require("tqdm", extra="train").tqdm(total=count, desc=name, leave=False)
