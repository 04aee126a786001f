"""Images and texts to model input exactly as open_clip prepares them for evaluation."""
from __future__ import annotations

from ._optional import require

# What of a model's text_cfg decides how text becomes token ids.
TOKENIZER_KEYS = ("context_length", "hf_tokenizer_name", "tokenizer_mode", "tokenizer_kwargs")


def eval_transform(preprocess_cfg: dict):
    """The torchvision transform of a `preprocess_cfg`: size, mean, std, interpolation, resize_mode, fill_color."""
    transform = require("open_clip.transform", extra="train")
    return transform.image_transform_v2(transform.PreprocessCfg(**preprocess_cfg), is_train=False)


def tokenizer_of(text_cfg: dict):
    """The tokenizer of a model's `text_cfg`: the Hugging Face one that it names, else CLIP's own."""
    open_clip = require("open_clip", extra="train")
    length = text_cfg.get("context_length") or 77
    options = text_cfg.get("tokenizer_kwargs") or {}
    name = text_cfg.get("hf_tokenizer_name")
    if "trust_remote_code" in options:  # a configuration is data, and may come from anywhere
        raise ValueError("tokenizer_kwargs holds trust_remote_code; a configuration must not ask to run code")
    if name:
        mode = text_cfg.get("tokenizer_mode")
        tokenizer = require("open_clip.tokenizer", extra="train").HFTokenizer  # not among open_clip's own names
        return tokenizer(name, context_length=length, tokenizer_mode=mode, **options)
    return open_clip.SimpleTokenizer(context_length=length, **options)
