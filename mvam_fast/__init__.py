"""mvam_fast: multi-view attention pooling for fine-grained image-text matching.

Importing this needs torch alone: no GPU, no triton, no open_clip. What needs more is loaded when first used, and an
extra that is missing is named with the pip command that installs it.
"""
from __future__ import annotations

import importlib

from .version import __version__

_HOMES = {
    "multi_view_pool": "functional",
    "view_attention": "functional",
    "diversity_loss": "functional",
    "last_backend": "dispatch",
    "MultiViewPool": "pooling",
    "MVAM": "model",
    "create_model_and_transforms": "factory",
    "get_tokenizer": "factory",
    "MVAMLoss": "loss",
    "fuse_attention_poolers": "converters",
    "restore_attention_poolers": "converters",
    "Encoder": "serving",
}

__all__ = ["__version__", *_HOMES]


def __getattr__(name: str):
    if name in _HOMES:
        value = globals()[name] = getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
