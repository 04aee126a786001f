"""Training checkpoints: whole or absent, and complete enough that a resumed run repeats the uninterrupted one."""
from __future__ import annotations

import os
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import nn

from .._optional import require
from ..files import read_json, write_json
from ..model import MVAM, WEIGHTS, load_weights

AVERAGE = "average.safetensors"  # the exponential moving average of the weights, where the run keeps one


@dataclass
class Progress:
    """How far a run has come, besides its tensors.

    Attributes:
        step: steps done.
        unreadable: images that could not be read so far, name to reason.
        best_rsum, best_step, worse: the best validation so far, its step (0: none yet), and evaluations since.
    """

    step: int = 0
    unreadable: dict[str, str] = field(default_factory=dict)
    best_rsum: float = float("-inf")
    best_step: int = 0
    worse: int = 0


def save(folder: Path, progress: Progress, model: MVAM, optimizer: torch.optim.Optimizer, scaler, average) -> Path:
    """Writes FOLDER/step-NNNNNN (a model folder with the state of training beside it); older ones go afterwards.

    `scaler`: of mixed precision, or None; `average`: an AveragedModel of the model, or None. If the disk is full or
    fails, OSError tells which checkpoint is still there.
    """
    final = folder / f"step-{progress.step:06d}"
    temporary = folder / f".{final.name}.{os.getpid()}"
    before = newest(folder)
    shutil.rmtree(temporary, ignore_errors=True)  # of a killed run: in a container the next one has the same pid
    save_file = require("safetensors.torch", extra="train").save_file
    full = require("safetensors", extra="train").SafetensorError
    try:
        temporary.mkdir(parents=True)
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
        for path in temporary.iterdir():  # on the disk before the name says that it is whole
            with open(path, "rb") as file:
                os.fsync(file.fileno())
        os.rename(temporary, final)
    except (OSError, full) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        kept = f"the last one, {before}, is whole" if before else "there is none yet"
        raise OSError(f"the checkpoint of step {progress.step} could not be written ({error}); {kept}") from error
    for old in folder.iterdir():
        if old != final:
            shutil.rmtree(old)
    return final


def newest(folder: Path) -> Path | None:
    """The last whole checkpoint; None if there is none. What a kill left half-written has another name."""
    return max(folder.glob("step-*"), key=lambda path: int(path.name.removeprefix("step-")), default=None)


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
