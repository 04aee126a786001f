"""What MVAM.save_pretrained writes beside the encoder's own config: the model's settings and its weights."""
from __future__ import annotations

from pathlib import Path

from torch import nn

from . import encoders
from ._optional import require
from .files import atomic, read_json, write_json
from .version import __version__

MVAM_CONFIG = "mvam_config.json"
WEIGHTS = "model.safetensors"
FORMATS = (1, 2)  # of MVAM_CONFIG: 1 for an encoder of open_clip, 2 where "encoder" says what it is
OPEN_CLIP_ENCODER = {"library": "open_clip", "own_towers": []}


def write_settings(folder: Path, settings: dict, encoder: dict) -> None:
    """Writes the arguments of MVAM, and what the encoder is."""
    kind = {"format": 1} if encoder == OPEN_CLIP_ENCODER else {"format": 2, "encoder": encoder}
    write_json(folder / MVAM_CONFIG, {**kind, **settings, "mvam_fast": __version__})


def settings_of(folder: Path) -> dict:
    """The arguments of MVAM that a checkpoint names, and its "encoder"; ValueError where a newer version wrote it."""
    settings = read_json(folder / MVAM_CONFIG, "folder")
    written_by = settings.pop("mvam_fast", None)
    found = settings.pop("format", 1)  # the first checkpoints did not say
    if found == 1:
        settings["encoder"] = OPEN_CLIP_ENCODER
    known = isinstance(settings.get("encoder"), dict) and settings["encoder"].get("library") in encoders.LIBRARIES
    if found not in FORMATS or not known:
        raise ValueError(
            f"folder: {folder} has format {found!r}, written by mvam_fast {written_by}, with the encoder "
            f"{settings.get('encoder')}; this is {__version__}, which reads formats {FORMATS} with encoders of "
            f"{encoders.LIBRARIES}: update mvam_fast"
        )
    return settings


def write_weights(model: nn.Module, path: Path) -> None:
    """Writes the state dict as safetensors."""
    save_file = require("safetensors.torch", extra="train").save_file
    weights, kept = {}, set()
    for name, tensor in model.state_dict().items():
        memory = tensor.untyped_storage().data_ptr()  # what two names share, the file holds twice
        weights[_stored_name(model, name)] = tensor.clone() if memory in kept else tensor.contiguous()
        kept.add(memory)
    with atomic(path) as temporary:
        save_file(weights, temporary, metadata={"format": "pt"})  # transformers 4 insists on being told


def _stored_name(model: nn.Module, name: str) -> str:
    """What the file of weights calls an entry of the state dict. An encoder of transformers has the names there that
    its library knows, which so can read it from the folder."""
    return name.removeprefix("clip.") if getattr(model, "library", None) == "transformers" else name


def load_weights(model: nn.Module, path: Path) -> None:
    """Strictly: every parameter must be there with its shape; otherwise one error that says what does not fit."""
    load_file = require("safetensors.torch", extra="train").load_file
    if not path.is_file():
        raise FileNotFoundError(f"folder: the checkpoint has no {path.name}: {path}")
    try:
        weights = load_file(path)
    except Exception as error:
        raise ValueError(f"folder: {path} is not a readable safetensors file ({error})") from error
    state = model.state_dict()
    names = {_stored_name(model, name): name for name in state}
    expected = {stored: state[name] for stored, name in names.items()}
    wrong = [f"{name} is missing" for name in expected.keys() - weights.keys()]
    wrong += [f"{name} is not part of the model" for name in weights.keys() - expected.keys()]
    wrong += [
        f"{name} is {tuple(weights[name].shape)}, the model has {tuple(expected[name].shape)}"
        for name in expected.keys() & weights.keys()
        if weights[name].shape != expected[name].shape
    ]
    if wrong:
        shown = "; ".join(sorted(wrong)[:5])
        raise ValueError(f"folder: {path} does not fit the model in {len(wrong)} places: {shown}")
    model.load_state_dict({names[stored]: tensor for stored, tensor in weights.items()})
