"""How a model folder tells which encoder it holds, and how that is built again from there: offline, without weights."""
from __future__ import annotations

import contextlib
import logging
from pathlib import Path

from torch import nn

from ._optional import require
from .files import read_json, write_json

OPEN_CLIP_CONFIG = "open_clip_config.json"  # open_clip's own name: the folder is also a "local-dir:" of open_clip
TRANSFORMERS_CONFIG = "config.json"  # of the encoder, as transformers writes it
LIBRARIES = ("open_clip", "transformers", None)


def write_config(folder: Path, library: str | None, clip: nn.Module, open_clip_config: dict | None) -> None:
    """Writes what `build` needs besides the library's name. Without a library there is nothing to build."""
    if library == "open_clip":
        if open_clip_config is None:
            raise ValueError(
                "open_clip_config is None, so the encoder could not be rebuilt; pass it to MVAM, "
                "or build the model with mvam_fast.create_model_and_transforms"
            )
        write_json(folder / OPEN_CLIP_CONFIG, open_clip_config)
    elif library == "transformers":
        folder.mkdir(parents=True, exist_ok=True)
        clip.config.save_pretrained(folder)


def build(folder: Path, library: str | None) -> tuple[nn.Module | None, dict | None]:
    """The two-stream model that `write_config` described, in float32, and its open_clip_config."""
    if library == "open_clip":
        config = read_json(folder / OPEN_CLIP_CONFIG, "folder")
        open_clip = require("open_clip", extra="train")
        with _no_weights_yet():
            return open_clip.create_model(f"local-dir:{folder}", load_weights=False, pretrained_text=False), config
    if library == "transformers":
        read_json(folder / TRANSFORMERS_CONFIG, "folder")  # transformers would look for a missing one on the Hub
        transformers = require("transformers", extra="hf")
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
        return transformers.AutoModel.from_config(config).float(), None
    return None, None


@contextlib.contextmanager
def _no_weights_yet():
    """Silences open_clip's warning that the model is random: its weights are loaded right after."""

    def is_other(record):
        return not record.getMessage().startswith("No pretrained weights loaded")

    logging.getLogger().addFilter(is_other)
    try:
        yield
    finally:
        logging.getLogger().removeFilter(is_other)
