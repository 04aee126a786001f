"""Tokens, masks and projections out of other libraries' encoders, through their own modules: nothing is patched.

One file per library. What a tower must offer is found by its features, not by a version number; a tower that lacks
them is refused by name.
"""
from __future__ import annotations

from torch import nn

from . import open_clip, transformers
from .protocol import Temperature, Tokens, TowerAdapter, own_tower

__all__ = [
    "Temperature", "Tokens", "TowerAdapter", "image_tower", "library_of", "no_weight_decay", "own_tower", "text_tower",
]  # fmt: skip


def library_of(clip: nn.Module) -> str:
    """ "open_clip" or "transformers", whichever this two-stream model is of."""
    if transformers.adapters(clip) is not None:
        return "transformers"
    if hasattr(clip, "visual"):
        return "open_clip"
    raise ValueError(
        f"model is a {type(clip).__name__} without .visual; it must be open_clip's CLIP or CustomTextCLIP, or of "
        f"transformers {', '.join(transformers.MODELS)}; for others pass an image_tower and a text_tower of your own"
    )


def image_tower(clip: nn.Module) -> TowerAdapter:
    """The adapter for the image tower of a two-stream model."""
    return transformers.adapters(clip)[0](clip) if library_of(clip) == "transformers" else open_clip.image_tower(clip)


def text_tower(clip: nn.Module) -> TowerAdapter:
    """The adapter for the text tower of a two-stream model."""
    return transformers.adapters(clip)[1](clip) if library_of(clip) == "transformers" else open_clip.text_tower(clip)


def no_weight_decay(encoder: nn.Module) -> set[str]:
    """Names of the parameters in `encoder` that training should not decay, beyond what all optimizers leave out: its
    learned positions and class tokens. It says so itself, but for transformers' models."""
    if hasattr(encoder, "no_weight_decay"):
        return set(encoder.no_weight_decay())
    return transformers.no_weight_decay(encoder)
