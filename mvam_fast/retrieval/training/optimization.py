"""Parameter groups, and what changes with the step: learning rates, the diversity loss' weight, averaged weights."""
from __future__ import annotations

import math

import torch
from torch import nn

from ...model import MVAM
from .config import TrainConfig


def make_optimizer(model: MVAM, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW in up to four groups: encoder and head (codes, key and view projections, gates), each with and without
    weight decay. A group's `peak` is its learning rate at the end of the warm-up."""
    spared = model.no_weight_decay()
    peaks = {False: config.lr, True: config.lr if config.head_lr is None else config.head_lr}
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            key = (model.is_head(name), parameter.ndim >= 2 and name not in spared)
            groups.setdefault(key, []).append(parameter)
    listed = [
        {"params": parameters, "weight_decay": config.weight_decay * decayed, "peak": peaks[head]}
        for (head, decayed), parameters in groups.items()
    ]
    return torch.optim.AdamW(listed, lr=config.lr, betas=(0.9, 0.98), fused=True)


def rate_at(config: TrainConfig, step: int) -> float:
    """Share of the peak learning rate at step 1, 2, ...: linear warm-up, then half a cosine down to 0 at the end."""
    if step <= config.warmup:
        return step / config.warmup
    done = (step - config.warmup) / max(config.steps - config.warmup, 1)
    return 0.5 * (1 + math.cos(math.pi * done))


def diversity_weight(config: TrainConfig, step: int) -> float:
    """Of step 1, 2, ...: the config's, times what its schedule says."""
    done = step / config.steps
    return config.diversity_weight * {"constant": 1.0, "rise": done, "fall": 1 - done}[config.diversity_schedule]


def averaged(model: MVAM, decay: float) -> torch.optim.swa_utils.AveragedModel:
    """The exponential moving average of the model's weights, updated by `update_parameters`; `.module` is an MVAM."""
    swa = torch.optim.swa_utils
    return swa.AveragedModel(model, multi_avg_fn=swa.get_ema_multi_avg_fn(decay), use_buffers=False)
