"""The model that a command is pointed at: a folder, or an open_clip model as it is."""
from __future__ import annotations

from pathlib import Path

import torch

from ... import hf_files
from ...factory import create_model_and_transforms, get_tokenizer
from ...model import MVAM
from ...preprocess import eval_transform


def pick_device(device: str = "auto") -> torch.device:
    """ "auto" is the GPU if there is one."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(device)


def load_model(model: str | Path, device: str = "auto", *, pretrained: str | None = None):
    """(model, evaluation transform, tokenizer) of a folder that training or `save_pretrained` wrote.

    With `pretrained`, a tag or a file of weights, `model` is an open_clip model name instead, and what comes is that
    model as it is: its own single vector. A name with a schema (hf-hub:, local-dir:) brings its weights itself.
    """
    name, has_schema = str(model), ":" in str(model)
    if Path(model).is_dir():
        if pretrained is not None:
            raise ValueError(f"pretrained is {pretrained!r}, but model {model} is a folder, which has its own weights")
        loaded = MVAM.from_pretrained(model, device=pick_device(device))
        known = loaded.open_clip_config
        preprocess = known["preprocess_cfg"] if known else hf_files.preprocess_cfg(model)
        return loaded, eval_transform(preprocess), get_tokenizer(model)
    if pretrained is None and not has_schema:
        raise FileNotFoundError(
            f"model: no such folder: {name}; if it is the name of an open_clip model, say with which weights: "
            "--pretrained TAG or FILE"
        )
    if pretrained is not None and has_schema:
        raise ValueError(f"pretrained is {pretrained!r}, but model {name} brings its own weights")
    loaded, _, _ = create_model_and_transforms(name, pretrained, 0, global_view=True)
    preprocess = eval_transform(loaded.open_clip_config["preprocess_cfg"])
    return loaded.to(pick_device(device)).eval(), preprocess, get_tokenizer(name)
