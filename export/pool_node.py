"""The pooling as one node `mvam::MultiViewPool`, for exported graphs: (tokens, codes, mask) → P.

ONNX Runtime runs the node by the function body that the file carries; TensorRT's parser takes the plugin of that name
where one is registered, and the function body else. The three last attributes are what it knows the plugin by.
"""
from __future__ import annotations

import torch
from torch import Tensor

DOMAIN, NAME = "mvam", "MultiViewPool"
PLUGIN = {"plugin_namespace": DOMAIN, "plugin_version": "1", "aot": 1}
MAX_VIEWS, MAX_WIDTH = 64, 2048  # of the kernels


def int_mask(tokens: Tensor, valid: Tensor | None) -> Tensor:
    """[B,N] int32, 1 where a token of `tokens` [B,N,D] takes part; None: all do."""
    if valid is not None:
        return valid.to(torch.int32)
    batch, length, _ = tokens.shape
    return torch.ones(length, dtype=torch.int32, device=tokens.device).expand(batch, length)


class NodeForm:
    """A form for `dispatch.exporting_as`. `found` lists what became of each pooling: "node", or why not."""

    def __init__(self):
        self.found: list[str] = []

    def __call__(self, tokens: Tensor, codes: Tensor, valid: Tensor | None, scale: float) -> Tensor | None:
        batch, _, width = tokens.shape
        views = codes.shape[0]
        if views > MAX_VIEWS or width > MAX_WIDTH:
            self.found.append(f"plain operators: {views} views of width {width} are more than the kernels take")
            return None
        self.found.append("node")
        return torch.onnx.ops.symbolic(
            f"{DOMAIN}::{NAME}", (tokens, codes, int_mask(tokens, valid)), attrs={"scale": scale, **PLUGIN},
            dtype=tokens.dtype, shape=(batch, views, width), version=1,
        )  # fmt: skip
