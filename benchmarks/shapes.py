"""The shapes that are timed, by the name of the encoder that has them."""
from __future__ import annotations

import torch

SHAPES = {  # tokens × width
    "vit-b-32": (50, 768), "vit-b-16": (197, 768), "vit-l-14": (257, 1024), "vit-l-14-336": (577, 1024),
    "vit-h-14": (257, 1280), "so400m-14-384": (729, 1152), "text-512": (77, 512), "text-768": (77, 768),
}  # fmt: skip
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
