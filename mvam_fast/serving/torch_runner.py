"""A checkpoint in PyTorch itself."""
from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from ..export.bundle import INPUT_NAMES, OUTPUT_NAMES
from ..export.source import of_model
from ..model import MVAM
from ..model_folder import WEIGHTS


class TorchRunner:
    """An MVAM model in PyTorch, in float32.

    Attributes:
        manifest: what bundle.json would say of it, less the files.
    """

    def __init__(self, checkpoint: Path, device: torch.device):
        model = MVAM.from_pretrained(checkpoint, device=device)
        self.device, self.manifest = device, _manifest(model, checkpoint)
        self._encode = {"image": model.encode_image, "text": model.encode_text}

    def run(self, tower: str, inputs: Tensor) -> Tensor:
        with torch.inference_mode():
            found = F.normalize(self._encode[tower](inputs).float(), dim=-1)
        # Outside, this makes an ordinary tensor of it: inference tensors cannot be used in what is differentiated.
        return found.clone()

    def close(self) -> None:
        self._encode = {}


def _manifest(model: MVAM, checkpoint: Path) -> dict:
    source = of_model(model, model.open_clip_config)
    source.origin = {"checkpoint": checkpoint.name}
    facts = source.facts(model.embedding_width(model.open_clip_config["model_cfg"]["embed_dim"]))
    inputs = {
        "image": {"dtype": "float32", "shape": ["batch", 3, *source.image_size]},
        "text": {"dtype": "int64", "shape": ["batch", facts["tokenizer"]["context_length"]]},
    }
    output = {"dtype": "float32", "shape": ["batch", facts["embedding_width"]]}
    return {
        "kind": "checkpoint",
        "precision": "fp32",
        "towers": {
            tower: {
                "file": WEIGHTS,
                "input": {"name": INPUT_NAMES[tower], **inputs[tower]},
                "output": {"name": OUTPUT_NAMES[tower], **output},
            }
            for tower in inputs
        },
        **facts,
    }
