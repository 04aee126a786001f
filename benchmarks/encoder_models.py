"""What encoders.py compares: plain CLIP, MVAM pooled by plain PyTorch, and MVAM, all over the same random weights."""
from __future__ import annotations

import copy
import random
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from machine import source_sha256
from torch import Tensor, nn

from mvam_fast import MVAM, MultiViewPool, create_model_and_transforms, get_tokenizer, reference
from mvam_fast.files import read_json, write_json

CLIP, NAIVE, FUSED = MODELS = ("clip", "mvam naive", "mvam")
TOWERS = ("image", "text")
CHUNK = 32  # samples that are encoded at once in float64
WORDS = (
    "a the two small large red green striped wooden old dog cat bus plate street table man woman child is are on near "
    "under beside holding riding looking standing with and of at"
).split()


class NaivePool(MultiViewPool):
    """The same pooling by plain PyTorch and its autograd, in steps: `reference` itself."""

    def forward(self, tokens, *, lengths=None, mask=None, norm=None, need_gram=True):
        given = self._arguments(tokens, norm)
        return reference.multi_view_pool(**given, lengths=lengths, mask=mask, need_gram=need_gram)


def random_model(name: str, views: int) -> MVAM:
    """MVAM over an open_clip model, with the same random weights each time: a resumed run goes on with them."""
    torch.manual_seed(0)
    return create_model_and_transforms(name, num_views=views)[0].eval()


def variants(model: MVAM) -> dict[str, nn.Module]:
    """`model` and its two rivals by name; all three own the same parameters."""
    naive = MVAM(model.clip, model.num_views)
    for tower in TOWERS:
        pool = NaivePool(getattr(model, f"{tower}_tower").width, model.num_views)
        pool.codes = getattr(model, f"{tower}_pool").codes
        setattr(naive, f"{tower}_pool", pool)
    return {CLIP: model.clip, NAIVE: naive, FUSED: model}


def encode(model: nn.Module, tower: str) -> Callable[[Tensor], Tensor]:
    return partial(getattr(model, f"encode_{tower}"), normalize=True)


class Compared:
    """The models as they are served (`served`, in `dtype`), trained (`trained`, float32), and judged by (float64)."""

    def __init__(self, name: str, views: int, device: torch.device, dtype: torch.dtype):
        model = random_model(name, views).to(device)
        self.name, self.views, self.device, self.dtype = name, views, device, dtype
        self.trained = variants(model)
        self.served = self.trained if dtype == torch.float32 else variants(copy.deepcopy(model).to(dtype))
        self._exact = variants(copy.deepcopy(model).double())
        self._tokenizer = get_tokenizer(name)

    def inputs(self, tower: str, batch: int) -> Tensor:
        """Noise as images, float32; captions of 6 to 16 words as token ids."""
        if tower == "image":
            size = self.trained[FUSED].open_clip_config["preprocess_cfg"]["size"]
            height, width = (size, size) if isinstance(size, int) else size
            generator = torch.Generator().manual_seed(batch)
            return torch.randn(batch, 3, height, width, generator=generator).to(self.device)
        drawn = random.Random(batch)
        captions = [" ".join(drawn.choices(WORDS, k=drawn.randint(6, 16))) for _ in range(batch)]
        return self._tokenizer(captions).to(self.device)

    def exact(self, model: str, tower: str, inputs: Tensor) -> Tensor:
        """What `model` should give, in float64; MVAM's by plain PyTorch."""
        run = encode(self._exact[CLIP if model == CLIP else NAIVE], tower)
        inputs = inputs.double() if inputs.is_floating_point() else inputs
        with torch.no_grad():
            return torch.cat([run(part) for part in inputs.split(CHUNK)])


class Bundles:
    """Exported models: each is exported once, and what that took is kept (`seconds`) for every result that needs it.

    `resume`: bundles that the same code left in `folder` are taken too.
    """

    def __init__(self, folder: Path, compared: Compared, *, resume: bool):
        self.folder, self.compared = folder, compared
        self._source = source_sha256()
        self.seconds = {model: self._earlier(model) for model in MODELS if resume and self._earlier(model)}
        self._failed: dict[str, Exception] = {}

    def _record(self, model: str) -> Path:
        return self.folder / f"{self._path(model).name}.json"

    def _earlier(self, model: str) -> float | None:
        if not (self._record(model).is_file() and self._path(model).is_dir()):
            return None
        record = read_json(self._record(model), "out")
        return record["seconds"] if record["source_sha256"] == self._source else None

    def _path(self, model: str) -> Path:
        views = 0 if model == CLIP else self.compared.views
        return self.folder / f"{self.compared.name.replace('/', '-')}-{views}-views"

    def of(self, model: str) -> Path:
        """The bundle of a model, with both towers; an export that failed once is not tried again."""
        if model in self._failed:
            raise self._failed[model]
        if model not in self.seconds:
            began = time.perf_counter()
            try:
                self._export(model)
            except Exception as error:
                self._failed[model] = error
                raise
            self.seconds[model] = time.perf_counter() - began
            write_json(self._record(model), {"seconds": self.seconds[model], "source_sha256": self._source})
        return self._path(model)

    def _export(self, name: str) -> None:
        from mvam_fast.export.to_onnx import export_bundle

        model = self.compared.trained[FUSED]
        if name == CLIP:  # no view but the encoder's own vector: exactly CLIP
            model = MVAM(model.clip, 0, global_view=True, open_clip_config=model.open_clip_config)
        with TemporaryDirectory() as checkpoint:
            model.save_pretrained(checkpoint)
            export_bundle(checkpoint, self._path(name), progress=False)
