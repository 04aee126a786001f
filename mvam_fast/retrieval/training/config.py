"""The settings of a training: one documented list, from which the YAML keys and the command line's flags are made."""
from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from ..._optional import require
from ...functional import DIVERSITY_KINDS
from ...loss import DIVERSITY_TOWERS

PRECISIONS = ("fp32", "amp_bf16", "amp_fp16")
SCHEDULES = ("constant", "rise", "fall")
ACCUMULATIONS = ("cached", "separate")
LOSSES = ("auto", "clip", "siglip")
# Fields in which a resumed run may differ from the run that it goes on from.
FREE = {
    "out", "resume", "strict", "device", "backend", "cache_images", "workers", "log_every", "save_every", "tensorboard",
}  # fmt: skip


def _option(default, help_text: str, **extra):
    return field(default=default, metadata={"help": help_text, **extra})


@dataclass
class TrainConfig:
    """Everything that determines a run. Each field is a key of the YAML file and, with dashes, a flag."""

    data: str = _option("", "Karpathy JSON, open_clip CSV, or webdataset tars (shards-{000..012}.tar)", required=True)
    images: str | None = _option(None, "folder of its images; tars need none, a CSV may do without")
    out: str = _option("", "folder of the run", required=True)
    val_data: str | None = _option(None, "data to validate on; by default another split of the same JSON")
    val_images: str | None = _option(None, "folder of its images")
    val_split: str = _option("val", "split to validate on")

    model: str = _option("ViT-B-32", "open_clip model name, or scenes-ViT-T-16")
    pretrained: str | None = _option(None, "open_clip tag or path of weights")
    embed_dim: int | None = _option(None, "width of the encoder's own vector, if not the model's", kind=int)
    views: int = _option(16, "learned views; 0 with --global-view is the single-vector baseline")
    global_view: bool = _option(False, "keep the encoder's pooled vector as one more view")
    scoring: str = _option("dot", "how codes score tokens: dot, projected or additive")
    projection: str | None = _option(None, "of views after the encoder's own: encoder (none), shared or per_view")
    view_dim: int | None = _option(None, "width of one view, if projected", kind=int)
    max_width: int | None = _option(None, "most numbers per image or text; views are projected to fit", kind=int)
    code_std: float = _option(1.0, "standard deviation that codes start with; far below 1 the views stay equal")
    train_codes: bool = _option(True, "false: codes stay; one view with code_std 0 then is mean pooling")

    batch_size: int = _option(128, "images per step, over all processes")
    steps: int = _option(1000, "optimizer steps")
    lr: float = _option(1e-5, "peak learning rate")
    head_lr: float | None = _option(None, "that of codes, gates and view projections; by default lr", kind=float)
    warmup: int = _option(100, "steps of linear warm-up; a cosine to 0 follows")
    weight_decay: float = _option(0.05, "AdamW's; not on vectors, codes and gates")
    grad_clip: float = _option(1.0, "largest norm of the gradient; 0 is no limit")
    precision: str = _option("fp32", "one of " + ", ".join(PRECISIONS))
    accumulation_steps: int = _option(1, "parts that a process computes its share of a batch in")
    accumulation: str = _option("cached", "cached: all images are negatives of all, as in one part, for a "
                                          "second forward; separate: only those of a part")
    grad_checkpointing: bool = _option(False, "trade time for memory in the encoders")
    ema: float = _option(0.0, "decay of an average of the weights, which is what is evaluated and kept; 0 is none")
    early_stopping: int = _option(0, "evaluations without a better RSUM after which to stop; keeps the best model")

    loss: str = _option("auto", "clip (softmax), siglip (sigmoid), or auto: siglip if the model has a bias for it")
    diversity_weight: float = _option(0.0, "weight of the diversity loss of each tower; see docs/results.md")
    diversity_kind: str = _option("frobenius", "one of " + ", ".join(DIVERSITY_KINDS))
    diversity_towers: str = _option("both", "one of " + ", ".join(DIVERSITY_TOWERS))
    diversity_schedule: str = _option("constant", "of the weight: constant, rise (from 0) or fall (to 0), linearly")

    siblings: int = _option(1, "images of one family per batch, as hard negatives (scenes)")
    augment: bool = _option(False, "open_clip's random crop instead of the evaluation transform")
    seed: int = _option(0, "of weights, batches, captions and augmentation")
    cache_images: bool = _option(False, "keep decoded images in memory")
    workers: int = _option(0, "processes that read images ahead")
    strict: bool = _option(False, "stop at an unreadable image instead of taking another one and telling")

    log_every: int = _option(10, "steps between rows of metrics.jsonl")
    eval_every: int = _option(0, "steps between evaluations on the val split; 0 = at the end")
    save_every: int = _option(500, "steps between checkpoints")
    tensorboard: bool = _option(True, "write the same rows for TensorBoard, to OUT/tensorboard")
    resume: bool = _option(False, "go on from the last checkpoint in --out")
    device: str = _option("auto", "auto, cpu or cuda")
    backend: str = _option("auto", "pooling: auto, triton or torch")

    def check(self) -> None:
        """ValueError that names the first field that is wrong."""
        for name in (f.name for f in dataclasses.fields(self) if f.metadata.get("required")):
            if not getattr(self, name):
                raise ValueError(f"{name} is not given; it must be, in the file or as --{name}")
        for name in ("batch_size", "steps", "log_every", "save_every", "accumulation_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        at_least_0 = ("warmup", "eval_every", "early_stopping", "workers", "weight_decay", "grad_clip", "code_std")
        for name in (*at_least_0, "seed", "views", "diversity_weight"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 0")
        for name in ("lr", "head_lr"):
            rate = getattr(self, name)
            if rate is not None and not 0 < rate < math.inf:
                raise ValueError(f"{name} is {rate}; it must be a positive number")
        if self.views == 0 and not self.global_view:
            raise ValueError("views is 0; it must be at least 1, or 0 together with global_view: the baseline")
        if self.val_images is not None and self.val_data is None:
            raise ValueError(f"val_images is {self.val_images!r}, but val_data is not given; both or val_data alone")
        if not 0 <= self.ema < 1:
            raise ValueError(f"ema is {self.ema}; it must be in [0, 1), such as 0.999")
        if self.early_stopping and not self.eval_every:
            raise ValueError(f"early_stopping is {self.early_stopping}, but eval_every is 0; it needs evaluations")
        for name, allowed in (
            ("precision", PRECISIONS), ("diversity_schedule", SCHEDULES), ("accumulation", ACCUMULATIONS),
            ("device", ("auto", "cpu", "cuda")), ("loss", LOSSES),
        ):  # fmt: skip
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} is {getattr(self, name)!r}; it must be one of {', '.join(allowed)}")


def read_config(path: str | Path | None, overrides: dict) -> TrainConfig:
    """The settings in a YAML file (None: the defaults), with `overrides` in place of what it says.

    ValueError for a key that there is not, with the nearest one, and for a value of another type than the key's.
    """
    given = {}
    if path is not None:
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"config: no such file: {path}")
        yaml = require("yaml", extra="train")
        try:
            given = yaml.safe_load(path.read_text(encoding="utf-8"))
        except yaml.YAMLError as error:
            raise ValueError(f"config: {path} is not valid YAML ({error})") from error
        given = {} if given is None else given
        if not isinstance(given, dict):
            raise ValueError(f"config: {path} holds a {type(given).__name__}; it must be a list of 'key: value'")
    fields = {f.name: f for f in dataclasses.fields(TrainConfig)}
    for key, value in given.items():
        if key not in fields:
            near = difflib.get_close_matches(str(key), fields, 1)
            hint = f"did you mean {near[0]}?" if near else f"the keys are {', '.join(fields)}"
            raise ValueError(f"config: {path} has the key {key!r}, which there is not; {hint}")
        given[key] = _typed(fields[key], value, path)
    return TrainConfig(**{**given, **overrides})


def flags_of(config: TrainConfig) -> list[str]:
    """The command line's flags that give this very config."""
    flags = []
    for option in dataclasses.fields(config):
        value = getattr(config, option.name)
        if value != option.default:
            name = option.name.replace("_", "-")
            flags += [f"--{'' if value else 'no-'}{name}"] if isinstance(value, bool) else [f"--{name}", str(value)]
    return flags


def value_type(option: dataclasses.Field) -> type:
    """What a field holds when it is not None."""
    return option.metadata.get("kind") or (str if option.default is None else type(option.default))


def from_flag(option: dataclasses.Field) -> Callable:
    """What reads a flag's text. "none" is None where the default is, which takes back what the file says."""
    kind = value_type(option)
    if option.default is not None:
        return kind

    def read(text: str):
        return None if text == "none" else kind(text)

    read.__name__ = f"{kind.__name__} (or none)"  # what argparse calls a value that it refuses
    return read


def _typed(option: dataclasses.Field, value, path):
    wanted = value_type(option)
    if value is None and option.default is None:
        return None
    # YAML 1.1 reads 1e-5 (without a point) as a string, and a whole number where any would do as an integer.
    if wanted is float and isinstance(value, (int, str)) and not isinstance(value, bool):
        try:
            return float(value)
        except ValueError:
            pass
    if type(value) is not wanted:
        raise ValueError(f"config: {path} has {option.name}: {value!r}; it must be a {wanted.__name__}")
    return value
