"""Contrastive training of MVAM, or of its single-vector baseline, on a Karpathy data set."""
from __future__ import annotations

import dataclasses
import json
import math
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch

from .._optional import require
from ..files import read_json, write_json
from ..functional import DIVERSITY_KINDS
from ..loss import MVAMLoss
from ..model import MVAM, create_model_and_transforms, get_tokenizer
from . import checkpoints
from .datasets import ImageStore, KarpathyDataset, PairBatches
from .evaluate import embed_dataset, pick_device
from .metrics import recall_metrics

PRECISIONS = ("fp32", "amp_bf16", "amp_fp16")
# Fields in which a resumed run may differ from the run that it goes on from.
FREE = {
    "out", "resume", "strict", "device", "backend", "cache_images", "workers", "log_every", "eval_every", "save_every",
}  # fmt: skip


def _option(default, help_text: str, **extra):
    return field(default=default, metadata={"help": help_text, **extra})


@dataclass
class TrainConfig:
    """Everything that determines a run; the command line has one flag for each field."""

    data: str = _option("", "Karpathy JSON: dataset_coco.json, dataset_scenes.json, ...", required=True)
    images: str = _option("", "folder of its images", required=True)
    out: str = _option("", "folder of the run", required=True)
    model: str = _option("ViT-B-32", "open_clip model name, or scenes-ViT-T-16")
    pretrained: str | None = _option(None, "open_clip tag or path of weights")
    views: int = _option(16, "learned views; 0 with --global-view is the single-vector baseline")
    global_view: bool = _option(False, "keep the encoder's pooled vector as one more view")
    scoring: str = _option("dot", "how codes score tokens: dot, projected or additive")
    embed_dim: int | None = _option(None, "width of one vector, if not the model's own")
    batch_size: int = _option(128, "images per step")
    steps: int = _option(1000, "optimizer steps")
    lr: float = _option(1e-5, "peak learning rate")
    warmup: int = _option(100, "steps of linear warm-up; a cosine to 0 follows")
    weight_decay: float = _option(0.05, "AdamW's; not on vectors, codes and gates")
    diversity_weight: float = _option(0.01, "weight of the diversity loss of each tower")
    diversity_kind: str = _option("frobenius", "one of " + ", ".join(DIVERSITY_KINDS))
    precision: str = _option("fp32", "one of " + ", ".join(PRECISIONS))
    grad_clip: float = _option(1.0, "largest norm of the gradient; 0 is no limit")
    siblings: int = _option(1, "images of one family per batch, as hard negatives (scenes)")
    augment: bool = _option(False, "open_clip's random crop instead of the evaluation transform")
    seed: int = _option(0, "of weights, batches and captions")
    cache_images: bool = _option(False, "keep decoded images in memory")
    workers: int = _option(0, "threads that decode images")
    log_every: int = _option(10, "steps between rows of metrics.jsonl")
    eval_every: int = _option(0, "steps between evaluations on the val split; 0 = at the end")
    save_every: int = _option(500, "steps between checkpoints")
    resume: bool = _option(False, "go on from the last checkpoint in --out")
    strict: bool = _option(False, "stop at an unreadable image instead of skipping and counting it")
    device: str = _option("auto", "cpu, cuda, ...")
    backend: str = _option("auto", "pooling: auto, triton or torch")

    def check(self) -> None:
        for name in ("batch_size", "steps", "log_every", "save_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision is {self.precision!r}; it must be one of {', '.join(PRECISIONS)}")


def train(config: TrainConfig, *, progress: bool = True) -> Path:
    """Runs the training and returns the folder of the final model, OUT/model.

    OUT also holds config.json, metrics.jsonl (a row per logged step and per evaluation), checkpoints/ and result.json.
    """
    config.check()
    out = Path(config.out)
    if _is_finished(config, out):
        return out / "model"
    device = pick_device(config.device)
    torch.manual_seed(config.seed)
    architecture = {} if config.embed_dim is None else {"embed_dim": config.embed_dim}
    model, preprocess_train, preprocess_val = create_model_and_transforms(
        config.model, config.pretrained, config.views, global_view=config.global_view, scoring=config.scoring,
        backend=config.backend, **architecture,
    )
    model.to(device).train()
    tokenizer = get_tokenizer(config.model)
    train_set = KarpathyDataset(config.data, config.images, "train")
    val_set = KarpathyDataset(config.data, config.images, "val")
    options = {"strict": config.strict, "workers": config.workers}
    preprocess = preprocess_train if config.augment else preprocess_val
    store = ImageStore(train_set, preprocess, cache=config.cache_images, **options)
    val_store = ImageStore(val_set, preprocess_val, cache=config.cache_images, **options)
    batches = PairBatches(train_set, config.batch_size, seed=config.seed, siblings=config.siblings)
    token_ids = tokenizer([caption for captions in train_set.captions for caption in captions])
    loss_function = MVAMLoss(config.diversity_weight, config.diversity_kind)
    optimizer = _optimizer(model, config)
    scaler = torch.amp.GradScaler(device.type, enabled=config.precision == "amp_fp16")
    dtype = {"fp32": None, "amp_bf16": torch.bfloat16, "amp_fp16": torch.float16}[config.precision]

    # Only now is every setting known to work: a run that cannot begin must not claim the folder.
    if not (out / "config.json").exists():
        write_json(out / "config.json", dataclasses.asdict(config))
    log, start, earlier = out / "metrics.jsonl", 0, {}
    checkpoint = checkpoints.newest(out / "checkpoints") if config.resume else None
    if checkpoint:
        start, earlier = checkpoints.load(checkpoint, model, optimizer, scaler)
    checkpoints.cut_log(log, start)
    began, timer, validation = time.monotonic(), time.monotonic(), None
    bar = require("tqdm", extra="train").tqdm(
        total=config.steps, initial=start, desc=out.name, unit="step", disable=not progress, file=sys.stderr
    )
    with bar, open(log, "a", encoding="utf-8") as rows:
        for step in range(start + 1, config.steps + 1):
            lr = learning_rate(config, step)
            for group in optimizer.param_groups:
                group["lr"] = lr
            image_indices, caption_indices = batches.batch(step - 1)
            images, kept = store.load(image_indices)
            ids = token_ids[caption_indices[kept]].to(device)
            with torch.autocast(device.type, dtype, enabled=dtype is not None):
                output = model(store.normalize(images.to(device)), ids)
                terms = loss_function(**output, output_dict=True)
            loss = sum(terms.values())
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            if config.grad_clip:
                scaler.unscale_(optimizer)
                torch.nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip)
            scaler.step(optimizer)
            scaler.update()
            with torch.no_grad():  # as in CLIP: a temperature of at most 100
                model.logit_scale.clamp_(0, math.log(100))
            bar.update()

            if step % config.log_every == 0 or step == config.steps:
                row = {"step": step, "loss": loss.item(), **{name: term.item() for name, term in terms.items()}}
                row |= {"lr": lr, "logit_scale": output["logit_scale"].item()}
                for tower in ("image", "text"):
                    if config.views > 1:
                        row[f"{tower}_view_overlap"] = view_overlap(output[f"{tower}_gram"])
                now = time.monotonic()
                row["images_per_second"] = len(image_indices) * min(config.log_every, step - start) / (now - timer)
                timer = now
                _write_row(rows, row)
                recall = {"rsum": f"{validation['rsum']:.0f}"} if validation else {}
                bar.set_postfix(loss=f"{row['loss']:.3f}", **recall)
            if step == config.steps or (config.eval_every and step % config.eval_every == 0):
                features = embed_dataset(model, val_store, tokenizer, progress=False)
                validation = recall_metrics(*features)
                _write_row(rows, {"step": step, "split": "val", **validation})
                timer = time.monotonic()
            if step % config.save_every == 0 and step < config.steps:
                unreadable = {**earlier, **store.unreadable, **val_store.unreadable}
                checkpoints.save(out / "checkpoints", step, model, optimizer, scaler, unreadable)
                timer = time.monotonic()
    model.save_pretrained(out / "model")
    unreadable = {**earlier, **store.unreadable, **val_store.unreadable}
    write_json(out / "result.json", {
        "steps": config.steps, "validation": validation, "seconds": time.monotonic() - began, "resumed_at": start,
        "parameters": sum(p.numel() for p in model.parameters()), "unreadable": unreadable,
    })  # fmt: skip
    if unreadable:
        where = out / "result.json"
        print(f"{len(unreadable)} unreadable images were skipped; they are listed in {where}", file=sys.stderr)
    return out / "model"


def _is_finished(config: TrainConfig, out: Path) -> bool:
    """Whether OUT holds the very run that is asked for, whole. ValueError if it holds another, or one not to resume."""
    saved = out / "config.json"
    if not saved.exists():
        return False
    if not config.resume:
        raise ValueError(f"out: {out} holds a run already; pass --resume to go on with it, or choose another folder")
    before, now = read_json(saved, "out"), dataclasses.asdict(config)
    for name in {**now, **before}:  # another version's run may have other fields
        if name not in FREE and before.get(name) != now.get(name):
            raise ValueError(
                f"{name} is {now.get(name)!r}, but the run in {out} was begun with {before.get(name)!r}"
            )
    return (out / "result.json").exists()


def _optimizer(model: MVAM, config: TrainConfig) -> torch.optim.AdamW:
    spared = model.no_weight_decay()
    decayed, plain = [], []
    for name, parameter in model.named_parameters():
        (plain if parameter.ndim < 2 or name in spared else decayed).append(parameter)
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, 0.98), fused=True)


def learning_rate(config: TrainConfig, step: int) -> float:
    """Of step 1, 2, ...: linear warm-up, then half a cosine down to 0 at the end."""
    if step <= config.warmup:
        return config.lr * step / config.warmup
    done = (step - config.warmup) / max(config.steps - config.warmup, 1)
    return config.lr * 0.5 * (1 + math.cos(math.pi * done))


def view_overlap(gram: torch.Tensor) -> float:
    """Mean cosine between the attentions of two different views, from their Gram matrices [B,M,M]."""
    unit = gram.detach().diagonal(dim1=1, dim2=2).clamp_min(1e-12).rsqrt()
    cosine = gram.detach() * unit[:, :, None] * unit[:, None, :]
    views = gram.shape[1]
    return ((cosine.sum((1, 2)) - views) / (views * (views - 1))).mean().item()


def _write_row(rows, row: dict) -> None:
    rows.write(json.dumps(row) + "\n")
    rows.flush()
