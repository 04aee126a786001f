"""Images to model input exactly as open_clip prepares them for evaluation."""
from __future__ import annotations

from ._optional import require


def eval_transform(preprocess_cfg: dict):
    """The torchvision transform of a `preprocess_cfg`: size, mean, std, interpolation, resize_mode, fill_color."""
    transform = require("open_clip.transform", extra="train")
    return transform.image_transform_v2(transform.PreprocessCfg(**preprocess_cfg), is_train=False)
