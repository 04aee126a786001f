"""Contrastive training of MVAM, or of its single-vector baseline, on one process or many."""
from __future__ import annotations

import contextlib
import dataclasses
import math
import shutil
import sys
import time
from pathlib import Path

import torch
from torch import Tensor

from ..._optional import require
from ...factory import get_tokenizer
from ...files import read_json, write_json
from ...model import MVAM
from ..data.datasets import ImageStore, open_dataset
from ..data.loading import Batch, TrainBatches
from ..evaluation.evaluate import embed_dataset
from ..evaluation.metrics import recall_metrics
from . import checkpoints
from .building import make_loss, make_model, validation_data
from .checkpoints import Progress
from .config import FREE, TrainConfig
from .gradients import StepGradients
from .log import MetricsLog
from .optimization import averaged, diversity_weight, make_optimizer, rate_at
from .processes import accelerator_of, check_agreement

COINCIDE = 0.99  # mean cosine of two views' attentions from which on they count as one


class TrainingFailed(RuntimeError):
    """The loss is no number any more."""


def train(config: TrainConfig, *, progress: bool = True) -> Path:
    """Runs the training and returns the folder of the final model, OUT/model.

    Started by `torchrun` or `accelerate launch`, every process takes its share of each batch, and what is computed is
    what one process would compute, but for what dropout draws. OUT, which all processes must see, also holds
    config.json, metrics.jsonl (a row per logged step and per evaluation), tensorboard/, checkpoints/ and result.json.

    Raises:
        ValueError: a wrong setting, or OUT holds another run.
        TrainingFailed: the loss became NaN or infinite; names the step, the images and the last good checkpoint.
        OSError: a checkpoint could not be written; the one before is whole.
    """
    config.check()
    with accelerator_of(config) as accelerator:
        finished = _is_finished(config, Path(config.out))
        check_agreement(accelerator, "whether it is finished", finished)
        if not finished:
            _Training(config, accelerator, progress).run()
    return Path(config.out) / "model"


class _Training:
    def __init__(self, config: TrainConfig, accelerator, progress: bool):
        self.config, self.accelerator, self.out = config, accelerator, Path(config.out)
        main = accelerator.is_main_process
        self.bar_hidden = not (progress and main)
        torch.manual_seed(config.seed)
        self.model, preprocess_train, preprocess_val = make_model(config)
        tokenizer = get_tokenizer(config.model)
        train_set = open_dataset(config.data, config.images, "train")
        val_set = validation_data(config)
        self.val_store = ImageStore(
            val_set, preprocess_val, cache=config.cache_images, strict=config.strict, workers=config.workers
        )
        self.tokenizer = tokenizer
        world = accelerator.num_processes
        if world > 1:
            self._freeze_what_is_not_reached()
        self.optimizer = make_optimizer(self.model, config)
        self.loss_function = make_loss(config, self.model, accelerator.process_index, world)
        self.average = None
        if config.ema:
            self.average = averaged(self.model, config.ema).to(accelerator.device)
        # What is prepared may be wrapped; self.model goes on to be the plain one, on the same parameters.
        self.wrapped, self.prepared_optimizer = accelerator.prepare(self.model, self.optimizer)
        self.progress = Progress()
        checkpoint = checkpoints.newest(self.out / "checkpoints") if config.resume else None
        if checkpoint:
            self.progress = checkpoints.load(
                checkpoint, self.model, self.optimizer, accelerator.scaler, self.average
            )
        self.start = self.progress.step
        check_agreement(accelerator, "the step of its last checkpoint", self.start)
        self.batches = TrainBatches(
            train_set, preprocess_train if config.augment else preprocess_val, tokenizer, config.batch_size,
            seed=config.seed, siblings=config.siblings, start_step=self.start, stop_step=config.steps,
            rank=accelerator.process_index, world_size=world, workers=config.workers, cache=config.cache_images,
            strict=config.strict,
        )  # fmt: skip
        share = config.batch_size // world
        if share % config.accumulation_steps:
            raise ValueError(
                f"accumulation_steps is {config.accumulation_steps}; it must divide the {share} images of a process"
            )
        self.gradients = StepGradients(
            accelerator, self.wrapped, self.loss_function, parts=config.accumulation_steps,
            accumulation=config.accumulation, seed=config.seed,
        )  # fmt: skip
        # Only now is every setting known to work: a run that cannot begin must not claim the folder.
        if main and not (self.out / "config.json").exists():
            write_json(self.out / "config.json", dataclasses.asdict(config))
        self.validation: dict | None = None

    def run(self) -> None:
        config, began = self.config, time.monotonic()
        bar = require("tqdm", extra="train").tqdm(
            total=config.steps, initial=self.start, desc=self.out.name, unit="step", disable=self.bar_hidden,
            file=sys.stderr,
        )  # fmt: skip
        with bar, self._log() as log:
            self.bar, self.log, self.timer, self.timed_step = bar, log, time.monotonic(), self.start
            if config.warmup >= config.steps:
                self._warn(f"warmup is {config.warmup} of {config.steps} steps: lr does not fall again before the end")
            for batch in self.batches:
                self._step(batch)
                if self._evaluate_if_due(batch.step):
                    break
                if batch.step % config.save_every == 0 and batch.step < config.steps:
                    self._save_checkpoint()
        self._gather_unreadable()
        if self.accelerator.is_main_process:
            self._finish(time.monotonic() - began)
        self.accelerator.wait_for_everyone()

    def _freeze_what_is_not_reached(self) -> None:
        """Parameters that no loss depends on, such as an encoder's own pooling where only learned views are kept. They
        would not change anyway, and training on several processes waits for the gradient of every parameter."""
        image = self.val_store.normalize(self.val_store.load([0])[0])
        self.model.eval()  # no running statistics are to move
        output = self.model(image.repeat(2, 1, 1, 1), self.tokenizer(["a", "b"]))
        sum(value.sum() for value in output.values() if value is not None).backward()
        for parameter in self.model.parameters():
            if parameter.grad is None:
                parameter.requires_grad_(False)
        self.model.zero_grad()
        self.model.train()

    def _log(self):
        if not self.accelerator.is_main_process:
            return contextlib.nullcontext()
        return MetricsLog(self.out, self.start, tensorboard=self.config.tensorboard)

    def _step(self, batch: Batch) -> None:
        config, step = self.config, batch.step
        rate = rate_at(config, step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["peak"]
        self.loss_function.diversity_weight = diversity_weight(config, step)
        self.prepared_optimizer.zero_grad()
        terms, output, finite = self.gradients(batch, self.batches.normalize)
        if not finite:
            self._fail(batch, terms, output, "the loss")
        norm = self.accelerator.clip_grad_norm_(self.wrapped.parameters(), config.grad_clip or math.inf)
        # The scaler of float16 skips such a step by itself, and tries the next one with a smaller scale.
        if self.accelerator.scaler is None and not self.gradients.all_finite(norm):
            self._fail(batch, terms, output, "the gradient")
        self.prepared_optimizer.step()
        with torch.no_grad():  # as in CLIP: a temperature of at most 100
            self.model.logit_scale.clamp_(0, math.log(100))
        if self.average is not None:
            self.average.update_parameters(self.model)
        self.progress.step = step
        self.bar.update()
        if step % config.log_every == 0 or step == config.steps:
            self._write_row(step, terms, output, rate)

    def _write_row(self, step: int, terms: dict[str, Tensor], output: dict, rate: float) -> None:
        numbers = {"loss": sum(terms.values()), **terms}
        if self.config.views > 1:
            numbers |= {f"{side}_view_overlap": view_overlap(output[f"{side}_gram"]) for side in ("image", "text")}
        values = torch.stack(list(numbers.values()))
        if self.accelerator.num_processes > 1:  # the diversity and overlap of all processes' samples
            values = self.accelerator.reduce(values, reduction="mean")
        row = {"step": step, **dict(zip(numbers, values.tolist(), strict=True))}
        row |= {"lr": rate * self.config.lr, "logit_scale": output["logit_scale"].item()}
        row["images_per_second"] = self.config.batch_size * (step - self.timed_step) / (time.monotonic() - self.timer)
        self.timer, self.timed_step = time.monotonic(), step
        if self.accelerator.is_main_process:
            self.log.write(row)
            self._warn_of_coinciding_views(row)
        recall = {"rsum": f"{self.validation['rsum']:.0f}"} if self.validation else {}
        self.bar.set_postfix(loss=f"{row['loss']:.3f}", **recall)

    def _warn_of_coinciding_views(self, row: dict) -> None:
        for side in ("image", "text"):
            overlap = row.get(f"{side}_view_overlap", 0.0)
            if overlap > COINCIDE and not any(f"the {side} views" in told for told in self.progress.warnings):
                self._warn(
                    f"the {side} views coincide at step {row['step']}: the mean cosine of their attentions is "
                    f"{overlap:.4f}, so they act as one. Start the codes with code_std near 1 (it is "
                    f"{self.config.code_std:g}); neither loss separates views that are equal"
                )

    def _warn(self, message: str) -> None:
        if message not in self.progress.warnings:
            self.progress.warnings.append(message)
        self.bar.write(f"warning: {message}", file=sys.stderr)

    def _evaluate_if_due(self, step: int) -> bool:
        """Validates where it is time to; whether training should stop."""
        config, state = self.config, self.progress
        if step != config.steps and not (config.eval_every and step % config.eval_every == 0):
            return False
        found = [None]
        if self.accelerator.is_main_process:
            features = embed_dataset(self._kept_model(), self.val_store, self.tokenizer, progress=False)
            found = [recall_metrics(*(feature.to(self.accelerator.device) for feature in features))]
            self.log.write({"step": step, "split": "val", **found[0]})
        if self.accelerator.num_processes > 1:
            require("accelerate.utils", extra="train").broadcast_object_list(found)
        (self.validation,) = found
        self.timer, self.timed_step = time.monotonic(), step
        if not config.early_stopping:
            return False
        if not state.best or self.validation["rsum"] > state.best["rsum"]:
            state.best, state.best_step, state.worse = self.validation, step, 0
            if self.accelerator.is_main_process:
                self._save_model(self.out / f"best-{step:06d}")
        else:
            state.worse += 1
        return state.worse >= config.early_stopping

    def _kept_model(self) -> MVAM:
        """What is evaluated and kept: the average of the weights, if the run has one."""
        return self.model if self.average is None else self.average.module

    def _save_model(self, folder: Path) -> None:
        kept = checkpoints.newest(self.out / "checkpoints")
        with checkpoints.written_whole(folder, f"the last checkpoint is {kept or 'none yet'}; the model") as temporary:
            self._kept_model().save_pretrained(temporary)

    def _save_checkpoint(self) -> None:
        self._gather_unreadable()
        if self.accelerator.is_main_process:
            scaler = self.accelerator.scaler
            checkpoints.save(
                self.out / "checkpoints", self.progress, self.model, self.optimizer, scaler, self.average
            )
            # Only now: a run that resumes at the checkpoint before may still need the model that was best then.
            self._drop_best(besides=self.progress.best_step)
        self.timer, self.timed_step = time.monotonic(), self.progress.step

    def _gather_unreadable(self) -> None:
        """Into the progress, from all processes: each has met those of its own part of the batches."""
        found = [{**self.batches.unreadable, **self.val_store.unreadable}]
        if self.accelerator.num_processes > 1:
            found = require("accelerate.utils", extra="train").gather_object(found)
        for names in found:
            self.progress.unreadable |= names

    def _drop_best(self, besides: int) -> None:
        for folder in self.out.glob("best-*"):
            if folder.name != f"best-{besides:06d}":
                shutil.rmtree(folder)

    def _finish(self, seconds: float) -> None:
        state = self.progress
        if self.config.early_stopping:
            # Copied, not renamed: a run that is cut short before the result is written comes here again.
            with checkpoints.written_whole(self.out / "model", "the model") as temporary:
                shutil.copytree(self.out / f"best-{state.best_step:06d}", temporary, dirs_exist_ok=True)
        else:
            self._save_model(self.out / "model")
        left_out = {"truncated captions": self.batches.truncated, **self.batches.dataset.left_out}
        write_json(self.out / "result.json", {
            "steps": state.step, "best_step": state.best_step or None,
            "validation": state.best or self.validation, "last_validation": self.validation, "seconds": seconds,
            "resumed_at": self.start, "processes": self.accelerator.num_processes,
            "parameters": sum(p.numel() for p in self.model.parameters()), "unreadable": state.unreadable,
            "left_out": {reason: count for reason, count in left_out.items() if count}, "warnings": state.warnings,
            "loss": type(self.loss_function.contrastive).__name__,
        })  # fmt: skip
        self._drop_best(besides=-1)
        where = self.out / "result.json"
        if state.unreadable:
            print(f"{len(state.unreadable)} images could not be read; they are listed in {where}", file=sys.stderr)
        for reason, count in left_out.items():
            if count:
                print(f"{reason}: {count} in the training data", file=sys.stderr)

    def _fail(self, batch: Batch, terms: dict[str, Tensor], output: dict, what: str) -> None:
        bad = [
            not bool(image.isfinite().all() and text.isfinite().all())
            for image, text in zip(output["image_features"], output["text_features"], strict=True)
        ]
        names = self.batches.describe(batch)
        guilty = [name for name, is_bad in zip(names, bad, strict=True) if is_bad]
        if self.accelerator.is_main_process:  # one of the step before has weights that failed at once
            checkpoints.set_aside(self.out / "checkpoints", batch.step - 1)
        self.accelerator.wait_for_everyone()
        kept = checkpoints.newest(self.out / "checkpoints")
        report = {
            "step": batch.step, "loss": {name: str(term.item()) for name, term in terms.items()},
            "process": self.accelerator.process_index, "images_without_finite_features": guilty, "batch": names,
            "last_checkpoint": None if kept is None else str(kept),
        }  # fmt: skip
        path = self.out / f"failure-{self.accelerator.process_index}.json"
        write_json(path, report)
        which = f"{len(guilty)} of its images have no finite features: {', '.join(guilty[:3])}" if guilty else (
            f"its images begin with {', '.join(names[:3])}"
        )
        raise TrainingFailed(
            f"{what} of step {batch.step} is not finite ({report['loss']}); {which}; all are listed in {path}. The "
            f"last good checkpoint is {report['last_checkpoint'] or 'none yet'}: lower lr, or look at the data"
        )


def _is_finished(config: TrainConfig, out: Path) -> bool:
    """Whether OUT holds the very run that is asked for, whole. ValueError if it holds another, or one not to resume."""
    saved = out / "config.json"
    if not saved.exists():
        return False
    if not config.resume:
        raise ValueError(f"out: {out} holds a run already; pass --resume to go on with it, or choose another folder")
    before, now = read_json(saved, "out"), dataclasses.asdict(config)
    free = FREE if config.early_stopping else {*FREE, "eval_every"}
    for name in {**now, **before}:  # another version's run may have other fields
        earlier = before.get(name, getattr(TrainConfig, name, None))  # one that was new since had its default
        if name not in free and earlier != now.get(name):
            raise ValueError(f"{name} is {now.get(name)!r}, but the run in {out} was begun with {earlier!r}")
    return (out / "result.json").exists()


def view_overlap(gram: Tensor) -> Tensor:
    """Mean cosine between the attentions of two different views, from their Gram matrices [B,M,M]: a scalar."""
    unit = gram.diagonal(dim1=1, dim2=2).clamp_min(1e-12).rsqrt()
    cosine = gram * unit[:, :, None] * unit[:, None, :]
    views = gram.shape[1]
    return ((cosine.sum((1, 2)) - views) / (views * (views - 1))).mean()
