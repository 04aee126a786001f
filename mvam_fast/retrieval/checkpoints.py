"""Training checkpoints: whole or absent, and complete enough that a resumed run repeats the uninterrupted one."""
from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import torch
from torch import nn

from .._optional import require
from ..files import read_json, write_json, write_text
from ..model import WEIGHTS, load_weights


def save(
    folder: Path, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, scaler, unreadable: dict[str, str]
) -> Path:
    """Writes FOLDER/step-NNNNNN (a model folder with the state of training beside it); older ones go afterwards.

    `unreadable`: images skipped so far, path to reason, which the end of a resumed run has to tell too.
    """
    final = folder / f"step-{step:06d}"
    temporary = folder / f".{final.name}.{os.getpid()}"
    shutil.rmtree(temporary, ignore_errors=True)  # of a killed run: in a container the next one has the same pid
    temporary.mkdir(parents=True)
    model.save_pretrained(temporary)
    tensors = {"rng.cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        tensors["rng.cuda"] = torch.cuda.get_rng_state()
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"optimizer.{key}.{name}"] = torch.as_tensor(value).detach().contiguous()
    require("safetensors.torch", extra="train").save_file(tensors, temporary / "training.safetensors")
    write_json(temporary / "training.json", {"step": step, "scaler": scaler.state_dict(), "unreadable": unreadable})
    for path in temporary.iterdir():  # on the disk before the name says that it is whole
        with open(path, "rb") as file:
            os.fsync(file.fileno())
    os.rename(temporary, final)
    for old in folder.iterdir():
        if old != final:
            shutil.rmtree(old)
    return final


def newest(folder: Path) -> Path | None:
    """The last whole checkpoint; None if there is none. What a kill left half-written has another name."""
    return max(folder.glob("step-*"), key=lambda path: int(path.name.removeprefix("step-")), default=None)


def load(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, scaler) -> tuple[int, dict[str, str]]:
    """Restores model, optimizer, gradient scaler and random numbers; returns the steps done and `unreadable`."""
    state = read_json(folder / "training.json", "resume")
    load_weights(model, folder / WEIGHTS)
    tensors = require("safetensors.torch", extra="train").load_file(folder / "training.safetensors")
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
    scaler.load_state_dict(state["scaler"])
    torch.set_rng_state(tensors["rng.cpu"])
    if "rng.cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["rng.cuda"])
    return state["step"], state.get("unreadable", {})  # absent in checkpoints of before it was kept


def cut_log(path: Path, step: int) -> None:
    """Drops the rows of a JSON-lines log that belong to steps after `step`, and a row that a kill cut short."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        if row["step"] <= step:
            kept.append(line + "\n")
    write_text(path, "".join(kept))
