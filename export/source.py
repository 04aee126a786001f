"""What can be exported: an MVAM checkpoint, an open_clip model by name or folder, or a model in memory."""
from __future__ import annotations

import copy
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from mvam_fast.export.bundle import sha256
from torch import Tensor, nn

from mvam_fast.encoders import OPEN_CLIP_CONFIG
from mvam_fast.factory import open_clip_with_own_configs
from mvam_fast.files import read_json
from mvam_fast.model import MVAM
from mvam_fast.model_folder import MVAM_CONFIG, WEIGHTS
from mvam_fast.preprocess import TOKENIZER_KEYS, tokenizer_of

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass
class Source:
    """A two-stream model with what is needed to feed it; `origin` goes into the manifest."""

    model: nn.Module
    preprocess: dict
    text_cfg: dict
    origin: dict

    @property
    def image_size(self) -> tuple[int, int]:
        size = self.preprocess["size"]
        return (size, size) if isinstance(size, int) else tuple(size)

    def tokenizer(self):
        return tokenizer_of(self.text_cfg)

    def facts(self, embedding_width: int) -> dict:
        """The part of the manifest that describes the model."""
        model, bias = self.model, getattr(self.model, "logit_bias", None)
        vectors = getattr(model, "num_vectors", 1)
        named = bool(self.text_cfg.get("hf_tokenizer_name"))
        return {
            "embedding_width": embedding_width,
            "num_views": getattr(model, "num_views", 0),
            "global_view": getattr(model, "global_view", True),
            "num_vectors": vectors,
            "vector_width": getattr(model, "view_dim", None) or embedding_width // vectors,
            "logit_scale": model.logit_scale.exp().item(),
            "logit_bias": None if bias is None else bias.item(),
            "preprocess": self.preprocess,
            "tokenizer": {
                "kind": "open_clip HFTokenizer" if named else "open_clip SimpleTokenizer",
                **{key: self.text_cfg[key] for key in TOKENIZER_KEYS if key in self.text_cfg},
                "context_length": self.text_cfg.get("context_length") or 77,
            },
            "source": self.origin,
        }


def open_source(source: str | Path, *, pretrained: str | None = None, fuse_poolers: bool = False) -> Source:
    """The model that `source` names, in float32 and eval mode.

    `source`: a folder that training or `MVAM.save_pretrained` wrote, a folder with an open_clip_config.json, or the
    name of an open_clip model, whose weights `pretrained` names (a tag or a file; random without). `fuse_poolers`
    replaces attention poolers by the exact conversion of `mvam_fast.fuse_attention_poolers` first.
    """
    folder = Path(source)
    if (folder / MVAM_CONFIG).is_file():
        if pretrained:
            raise ValueError(f"pretrained is {pretrained!r}, but the checkpoint {folder} has its own weights")
        model = MVAM.from_pretrained(folder)
        found = of_model(model, model.open_clip_config)
        found.origin = {"checkpoint": folder.name, "weights_sha256": sha256(folder / WEIGHTS)}
    else:
        found = _open_clip_source(source, pretrained)
    if fuse_poolers:
        _fuse(found)
    return found


def given_source(source: str | Path | Source, pretrained: str | None, fuse_poolers: bool, progress: bool) -> Source:
    """What an exporter was given: `open_source`, or a `Source` as it is."""
    if not isinstance(source, Source):
        if progress:
            print(f"loading {source}", file=sys.stderr, flush=True)
        return open_source(source, pretrained=pretrained, fuse_poolers=fuse_poolers)
    if pretrained:
        raise ValueError(f"pretrained is {pretrained!r}, but the source is a model in memory, which has its weights")
    if fuse_poolers:
        raise ValueError("fuse_poolers is for models that are opened here; call mvam_fast.fuse_attention_poolers first")
    return source


def _fuse(found: Source) -> None:
    from mvam_fast.converters import fuse_attention_poolers

    names = fuse_attention_poolers(found.model)
    if not names:
        left = "; ".join(f"{name}: {reason}" for name, reason in names.left_alone.items()) or "there are none"
        raise ValueError(f"fuse_poolers: no attention pooler of this model can be fused ({left})")
    found.origin["fused_poolers"] = list(names)


def of_model(model: nn.Module, open_clip_config: dict | None) -> Source:
    """A model in memory (MVAM, or open_clip's CLIP and CustomTextCLIP) with its {"model_cfg", "preprocess_cfg"}.

    It is put into eval mode. To be exported it must be in float32 and on the CPU.
    """
    if open_clip_config is None:
        raise ValueError("open_clip_config is None; it must be {'model_cfg': ..., 'preprocess_cfg': ...}")
    for method in ("encode_image", "encode_text"):
        if not hasattr(model, method):
            raise TypeError(f"source is a {type(model).__name__} without {method}; it must be MVAM or of open_clip")
    return Source(
        model.eval(), open_clip_config["preprocess_cfg"], open_clip_config["model_cfg"]["text_cfg"],
        {"model": type(model).__name__},
    )  # fmt: skip


def _open_clip_source(source: str | Path, pretrained: str | None) -> Source:
    open_clip = open_clip_with_own_configs()
    if (Path(source) / OPEN_CLIP_CONFIG).is_file():
        name = f"local-dir:{source}"
        model_cfg = read_json(Path(source) / OPEN_CLIP_CONFIG, "source")["model_cfg"]
        origin = {"checkpoint": Path(source).name}
    elif Path(source).exists():
        raise ValueError(f"source: {source} is no checkpoint: it has neither {MVAM_CONFIG} nor {OPEN_CLIP_CONFIG}")
    else:
        name = str(source).replace("/", "-")
        model_cfg = open_clip.get_model_config(name)
        origin = {"open_clip": name, "pretrained": pretrained}
        if model_cfg is None:
            raise FileNotFoundError(f"source: {source} is neither a folder nor a model that open_clip knows")
    model = open_clip.create_model(name, pretrained)
    found = of_model(
        model, {"model_cfg": copy.deepcopy(model_cfg), "preprocess_cfg": open_clip.get_model_preprocess_cfg(model)}
    )
    found.origin = origin
    return found


class Tower(nn.Module):
    """One encoder as a module to export: input in the form users have it, L2-normalised float32 embedding out.

    The whole encoder computes in `dtype`, but for the final normalisation. `pixels`: an image is uint8 [B,H,W,3] and
    the graph normalises it, in float32 and in the order that training's transform does.
    """

    def __init__(self, source: Source, tower: str, dtype: torch.dtype = torch.float32, pixels: bool = False):
        super().__init__()
        self.model, self.dtype, self.is_image = source.model, dtype, tower == "image"
        self.pixels = pixels and self.is_image
        if self.pixels:
            for name in ("mean", "std"):
                self.register_buffer(name, torch.tensor(source.preprocess[name]), persistent=False)

    def forward(self, inputs: Tensor) -> Tensor:
        if self.pixels:
            inputs = ((inputs.float() / 255 - self.mean) / self.std).permute(0, 3, 1, 2)
        if self.is_image:
            features = self.model.encode_image(inputs.to(self.dtype))
        else:
            features = self.model.encode_text(inputs)
        return F.normalize(features.float(), dim=-1)
