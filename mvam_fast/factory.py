"""Models by open_clip's names, with MVAM on top."""
from __future__ import annotations

import copy
import logging
from pathlib import Path

from . import hf_files
from ._optional import require
from .encoders import OPEN_CLIP_CONFIG
from .files import read_json
from .model import MVAM
from .model_folder import MVAM_CONFIG, OPEN_CLIP_ENCODER, settings_of
from .preprocess import tokenizer_of


def create_model_and_transforms(
    model_name: str,
    pretrained: str | None = None,
    num_views: int = 16,
    *,
    global_view: bool = False,
    scoring: str = "dot",
    key_dim: int | None = None,
    code_std: float = 1.0,
    projection: str | None = None,
    view_dim: int | None = None,
    max_width: int | None = None,
    backend: str = "auto",
    **open_clip_arguments,
):
    """`open_clip.create_model_and_transforms` with MVAM on top.

    Args:
        model_name, pretrained: an open_clip model name with a pretrained tag or a path of weights; or this package's
            own small "scenes-ViT-T-16".
        num_views, global_view, scoring, key_dim, code_std, projection, view_dim, max_width, backend: see `MVAM`.
        open_clip_arguments: passed on (precision, device, force_image_size, embed_dim, ...). force_quick_gelu is set
            for the weights that need it, see `needs_quick_gelu`.

    Returns:
        (model, preprocess_train, preprocess_val)
    """
    open_clip = open_clip_with_own_configs()
    model_cfg = open_clip.get_model_config(model_name.replace("/", "-") if ":" not in model_name else model_name)
    if model_cfg is None:
        raise ValueError(f"model_name is {model_name!r}; open_clip knows: {', '.join(open_clip.list_models())}")
    if needs_quick_gelu(model_name, pretrained):
        logging.info("the weights %r were trained with QuickGELU: %s is built with it", pretrained, model_name)
        open_clip_arguments["force_quick_gelu"] = True
    clip, train, val = open_clip.create_model_and_transforms(model_name, pretrained, **open_clip_arguments)
    config = {
        "model_cfg": _with_overrides(model_cfg, open_clip_arguments),
        "preprocess_cfg": open_clip.get_model_preprocess_cfg(clip),
    }
    model = MVAM(
        clip, num_views, global_view=global_view, scoring=scoring, key_dim=key_dim, code_std=code_std,
        projection=projection, view_dim=view_dim, max_width=max_width, backend=backend, open_clip_config=config,
    )  # fmt: skip
    return model, train, val


def needs_quick_gelu(model_name: str, pretrained: str | None) -> bool:
    """Whether these weights were trained with an activation that the open_clip config of this name lacks, as OpenAI's
    were. open_clip only warns of it, and the model is then another than the one that was published."""
    if pretrained is None or ":" in model_name:  # random weights; a schema such as hf-hub: brings its own config
        return False
    open_clip = open_clip_with_own_configs()
    name = model_name.replace("/", "-")
    weights, config = open_clip.get_pretrained_cfg(name, pretrained), open_clip.get_model_config(name)
    return bool(weights.get("quick_gelu")) and config is not None and not config.get("quick_gelu")


# Arguments of open_clip's factory that change the architecture, and where they land in its model config.
_OVERRIDES = {
    "force_quick_gelu": ("quick_gelu",),
    "force_custom_text": ("custom_text",),
    "force_patch_dropout": ("vision_cfg", "patch_dropout"),
    "force_image_size": ("vision_cfg", "image_size"),
    "force_context_length": ("text_cfg", "context_length"),
}
_MODEL_ARGUMENTS = ("embed_dim", "init_logit_scale", "init_logit_bias", "nonscalar_logit_scale")


def _with_overrides(model_cfg: dict, arguments: dict) -> dict:
    model_cfg = copy.deepcopy(model_cfg)
    for name, path in _OVERRIDES.items():
        if arguments.get(name) not in (None, False):
            section = model_cfg if len(path) == 1 else model_cfg[path[0]]
            section[path[-1]] = arguments[name]
    model_cfg.update({name: arguments[name] for name in _MODEL_ARGUMENTS if name in arguments})
    return model_cfg


def get_tokenizer(model_name: str | Path):
    """The tokenizer of an open_clip model name, or of a folder that `MVAM.save_pretrained` wrote."""
    folder = Path(model_name)
    encoder = settings_of(folder)["encoder"] if (folder / MVAM_CONFIG).is_file() else OPEN_CLIP_ENCODER
    if encoder["library"] != "open_clip" or "text_tower" in encoder["own_towers"]:
        return hf_files.FolderTokenizer(folder)
    if (folder / OPEN_CLIP_CONFIG).is_file():
        text_cfg = read_json(folder / OPEN_CLIP_CONFIG, "model_name")["model_cfg"]["text_cfg"]
        if text_cfg.get("hf_tokenizer_name") and (folder / hf_files.TOKENIZER_CONFIG).is_file():
            text_cfg = {**text_cfg, "hf_tokenizer_name": str(folder)}  # it was saved with the model
        return tokenizer_of(text_cfg)
    return open_clip_with_own_configs().get_tokenizer(str(model_name))


def open_clip_with_own_configs():
    """open_clip, knowing this package's own model configs."""
    open_clip = require("open_clip", extra="train")
    configs = Path(__file__).parent / "configs"
    if not {path.stem for path in configs.glob("*.json")} <= set(open_clip.list_models()):
        open_clip.add_model_config(configs)
    return open_clip
