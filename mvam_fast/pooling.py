"""MultiViewPool: the op as a module, with its view codes and scoring functions."""
from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import functional

SCORINGS = ("dot", "projected", "additive")


class MultiViewPool(nn.Module):
    """Pools tokens [B,N,D] into M views [B,M,D] by M learned view codes.

    Scoring of token x by code c (the paper's public text does not state its own; these are this project's):
        "dot"        c·x / sqrt(D). The default: the others were not better than it beyond the spread of seeds
                     (docs/results.md), and it costs the least.
        "projected"  c·(W x) / sqrt(Dk), with the key projection W folded into the codes: C W costs M rows, not N.
        "additive"   c·tanh(W x + b) / sqrt(Dk), the structured self-attention of arXiv 1703.03130.

    Codes start as N(0, 1). This matters: on normalised tokens the logits then have a standard deviation near 1 and
    the views differ from the first step. Codes of standard deviation 0.02 give M equal views that neither the
    contrastive nor the Gram loss ever separates.

    Args:
        dim: token width D.
        num_views: M, 1 to 64 on the Triton path, any number on the others.
        scoring: one of the above.
        key_dim: Dk of "projected" and "additive"; D by default.
        code_std: standard deviation that the codes start with.
        backend: "auto", "triton" or "torch"; see `multi_view_pool`.
    """

    def __init__(
        self,
        dim: int,
        num_views: int = 16,
        *,
        scoring: str = "dot",
        key_dim: int | None = None,
        code_std: float = 1.0,
        backend: str = "auto",
        device=None,
        dtype=None,
    ):
        super().__init__()
        if dim < 1 or num_views < 1:
            raise ValueError(f"dim is {dim} and num_views {num_views}; both must be at least 1")
        if scoring not in SCORINGS:
            raise ValueError(f"scoring is {scoring!r}; it must be one of {', '.join(SCORINGS)}")
        if scoring == "dot" and key_dim not in (None, dim):
            raise ValueError(f"key_dim is {key_dim}; with scoring 'dot' it must be None or dim = {dim}")
        self.dim, self.num_views, self.scoring, self.backend = dim, num_views, scoring, backend
        self.key_dim, self.code_std = key_dim or dim, code_std
        factory = {"device": device, "dtype": dtype}
        self.codes = nn.Parameter(torch.empty(num_views, self.key_dim, **factory))
        self.key_projection = None
        if scoring != "dot":
            self.key_projection = nn.Linear(dim, self.key_dim, bias=scoring == "additive", **factory)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.codes, std=self.code_std)
        if self.key_projection is not None:
            # Variance preserving, so that the logits keep the spread that "dot" has.
            nn.init.normal_(self.key_projection.weight, std=self.dim**-0.5)
            if self.key_projection.bias is not None:
                nn.init.zeros_(self.key_projection.bias)

    def keep(self, views: list[int]) -> None:
        """Drops the codes of all other views."""
        self.num_views = len(views)
        self.codes = nn.Parameter(self.codes.detach()[views].clone())

    def _arguments(self, tokens: Tensor, norm: nn.LayerNorm | None) -> dict:
        """Tokens, codes, keys, scale and LayerNorm that this scoring gives `multi_view_pool`."""
        found = {"tokens": tokens, "codes": self.codes, "scale": self.key_dim**-0.5}
        if self.scoring == "projected":
            found["codes"] = self.codes @ self.key_projection.weight
        if self.scoring == "additive":  # its keys are made of the normalised tokens, so those must exist
            found["tokens"] = tokens = tokens if norm is None else norm(tokens)
            projection = self.key_projection  # its parameters may be of higher precision than the encoder
            weight, bias = projection.weight.to(tokens.dtype), projection.bias.to(tokens.dtype)
            found["keys"] = torch.tanh(F.linear(tokens, weight, bias))
        elif norm is not None:
            found |= {"norm_weight": norm.weight, "norm_bias": norm.bias, "norm_eps": norm.eps}
        return found

    def forward(
        self,
        tokens: Tensor,
        *,
        lengths: Tensor | None = None,
        mask: Tensor | None = None,
        norm: nn.LayerNorm | None = None,
        need_gram: bool = True,
    ) -> tuple[Tensor, Tensor | None]:
        """Views [B,M,D] in the tokens' dtype and their Gram matrix [B,M,M] float32; see `multi_view_pool`.

        `norm`: a LayerNorm to apply to the tokens first, fused into the kernels where they run.
        """
        return functional.multi_view_pool(
            **self._arguments(tokens, norm), lengths=lengths, mask=mask, need_gram=need_gram, backend=self.backend
        )

    def attention(
        self,
        tokens: Tensor,
        *,
        lengths: Tensor | None = None,
        mask: Tensor | None = None,
        norm: nn.LayerNorm | None = None,
    ) -> Tensor:
        """What each view looks at: A [B,M,N] float32; arguments as in `forward`."""
        return functional.view_attention(**self._arguments(tokens, norm), lengths=lengths, mask=mask)

    def extra_repr(self) -> str:
        return f"dim={self.dim}, num_views={self.num_views}, scoring={self.scoring!r}, key_dim={self.key_dim}"
