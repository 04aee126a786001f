"""Training checkpoints: whole or absent, and complete enough that a resumed run repeats the uninterrupted one."""
from __future__ import annotations

import contextlib
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import nn

from ..._optional import require
from ...files import read_json, write_json
from ...model import MVAM
from ...model_folder import WEIGHTS, load_weights

AVERAGE = "average.safetensors"  # the exponential moving average of the weights, where the run keeps one
_WHOLE, _TEMPORARY = re.compile(r"step-(\d+)"), re.compile(r"\.step-\d+\.\d+")


@dataclass
class Progress:
    """How far a run has come, besides its tensors.

    Attributes:
        step: steps done.
        unreadable: images that could not be read so far, name to reason.
        warnings: what was warned of so far.
        best, best_step: metrics of the best validation so far and its step (0: none yet); for early stopping.
        worse: evaluations since then.
    """

    step: int = 0
    unreadable: dict[str, str] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    best: dict[str, float] = field(default_factory=dict)
    best_step: int = 0
    worse: int = 0


@contextlib.contextmanager
def written_whole(final: Path, what: str) -> Iterator[Path]:
    """Yields a temporary folder that takes the place of `final` when the block ends. If the disk is full or fails it is
    removed again, and OSError says that `what` could not be written."""
    temporary = final.with_name(f".{final.name}.{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)  # of a killed run: in a container the next one has the same pid
    full = require("safetensors", extra="train").SafetensorError
    try:
        temporary.mkdir(parents=True)
        yield temporary
        for path in temporary.iterdir():  # on the disk before the name says that it is whole
            with open(path, "rb") as file:
                os.fsync(file.fileno())
        if final.exists():
            shutil.rmtree(final)
        os.rename(temporary, final)
    except (OSError, full) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise OSError(f"{what} could not be written to {final} ({error})") from error


def save(folder: Path, progress: Progress, model: MVAM, optimizer: torch.optim.Optimizer, scaler, average) -> Path:
    """Writes FOLDER/step-NNNNNN, a model folder with the state of training beside it, and keeps the one before: until
    another step has had a finite loss nobody knows whether the new one is any good.

    `scaler`: of mixed precision, or None; `average`: an AveragedModel of the model, or None. If the disk is full,
    OSError tells which checkpoint is still there.
    """
    before = newest(folder)
    kept = f"the last one, {before}, is whole" if before else "there is none yet"
    final = folder / f"step-{progress.step:06d}"
    with written_whole(final, f"{kept}; the checkpoint of step {progress.step}") as temporary:
        save_file = require("safetensors.torch", extra="train").save_file
        model.save_pretrained(temporary)
        tensors = {}
        for name, parameter in model.named_parameters():
            for key, value in optimizer.state.get(parameter, {}).items():
                tensors[f"optimizer.{key}.{name}"] = torch.as_tensor(value).detach().contiguous()
        save_file(tensors, temporary / "training.safetensors")
        if average is not None:
            weights = {name: value.contiguous() for name, value in average.module.state_dict().items()}
            save_file({**weights, "n_averaged": average.n_averaged}, temporary / AVERAGE)
        write_json(temporary / "training.json", {
            "scaler": {} if scaler is None else scaler.state_dict(), "progress": asdict(progress),
        })  # fmt: skip
    for old in folder.iterdir():
        if old not in (final, before) and (_WHOLE.fullmatch(old.name) or _TEMPORARY.fullmatch(old.name)):
            shutil.rmtree(old)
    return final


def newest(folder: Path) -> Path | None:
    """The last whole checkpoint; None if there is none. What a kill left half-written has another name."""
    whole = [path for path in folder.glob("step-*") if _WHOLE.fullmatch(path.name)]
    return max(whole, key=_step_of, default=None)


def set_aside(folder: Path, step: int) -> None:
    """Renames the checkpoints of `step` and later, after which training failed, so that no run goes on with them."""
    for path in list(folder.glob("step-*")):
        if _WHOLE.fullmatch(path.name) and _step_of(path) >= step:
            os.replace(path, path.with_name(f"failed-{path.name}"))


def _step_of(path: Path) -> int:
    return int(_WHOLE.fullmatch(path.name)[1])


def load(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, scaler, average) -> Progress:
    """Restores what `save` was given."""
    state = read_json(folder / "training.json", "resume")
    if "progress" not in state:
        raise ValueError(f"resume: {folder} was written by an older mvam_fast, whose runs this one cannot go on with")
    load_weights(model, folder / WEIGHTS)
    load_file = require("safetensors.torch", extra="train").load_file
    tensors = load_file(folder / "training.safetensors")
    for name, parameter in model.named_parameters():
        saved = {
            key.split(".")[1]: value for key, value in tensors.items()
            if key.startswith("optimizer.") and key.split(".", 2)[2] == name
        }  # fmt: skip
        # Adam's step counter lives where the optimizer put it; its moments live with the parameter.
        if saved:
            optimizer.state[parameter] = {
                key: value if key == "step" and not parameter.is_cuda else value.to(parameter.device)
                for key, value in saved.items()
            }
    if average is not None:
        weights = load_file(folder / AVERAGE)
        average.n_averaged.copy_(weights.pop("n_averaged"))
        average.module.load_state_dict(weights)
    if scaler is not None:
        scaler.load_state_dict(state["scaler"])
    return Progress(**state["progress"])
