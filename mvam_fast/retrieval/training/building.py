"""What a training is made of: model, loss, and the data it is validated on."""
from __future__ import annotations

from pathlib import Path

from ..._optional import require
from ...factory import create_model_and_transforms
from ...loss import MVAMLoss
from ...model import MVAM
from ..data.datasets import open_dataset
from .config import TrainConfig


def make_model(config: TrainConfig):
    architecture = {} if config.embed_dim is None else {"embed_dim": config.embed_dim}
    model, preprocess_train, preprocess_val = create_model_and_transforms(
        config.model, config.pretrained, config.views, global_view=config.global_view, scoring=config.scoring,
        code_std=config.code_std, projection=config.projection, view_dim=config.view_dim, max_width=config.max_width,
        backend=config.backend, **architecture,
    )  # fmt: skip
    for pool in (model.image_pool, model.text_pool):
        if pool is not None:
            pool.codes.requires_grad_(config.train_codes)
    if config.grad_checkpointing:
        model.set_grad_checkpointing()
    return model.train(), preprocess_train, preprocess_val


def make_loss(config: TrainConfig, model: MVAM, rank: int, world: int) -> MVAMLoss:
    kind = config.loss
    if kind == "auto":
        kind = "clip" if model.logit_bias is None else "siglip"
    if kind == "siglip" and model.logit_bias is None:
        raise ValueError(f"loss is 'siglip', but the model {config.model} has no bias for it; it must be clip or auto")
    shared = {"rank": rank, "world_size": world}
    sigmoid = require("open_clip.loss", extra="train").SigLipLoss(**shared) if kind == "siglip" else None
    return MVAMLoss(
        config.diversity_weight, config.diversity_kind, towers=config.diversity_towers, contrastive=sigmoid, **shared
    )


def validation_data(config: TrainConfig):
    if config.val_data is None:
        if Path(config.data).suffix.lower() != ".json":
            raise ValueError(f"val_data is not given, and data {config.data} has no splits; it must be given")
        return open_dataset(config.data, config.images, config.val_split)
    if config.val_images is None and Path(config.val_data).suffix.lower() == ".json":
        raise ValueError(f"val_images is not given, but val_data {config.val_data} needs the folder of its images")
    return open_dataset(config.val_data, config.val_images, config.val_split)
