"""Contrastive loss plus the diversity loss of both towers."""
from __future__ import annotations

import torch
from torch import Tensor, nn

from ._optional import require
from .functional import DIVERSITY_KINDS, diversity_loss

DIVERSITY_TOWERS = ("both", "image", "text")


class MVAMLoss(nn.Module):
    """open_clip's symmetric InfoNCE + λ · (diversity of the image views + diversity of the text views).

    The contrastive part *is* `open_clip.ClipLoss`, with its distributed gather (`rank`, `world_size`, `local_loss`,
    `gather_with_grad`), or the open_clip loss that is given. The diversity part is the mean over this process' own
    samples: data-parallel averaging of gradients then gives the mean over the global batch.

    Args:
        diversity_weight: λ ≥ 0. The default is 0, the contrastive loss alone: in this project's own ablation
            (docs/results.md) views were kept apart by every λ above 0 of "frobenius", the paper's form, and no λ of any
            kind gained recall. 0.01 cost little; 0.1 pushes views onto single tokens and cost much.
        kind: see `mvam_fast.diversity_loss`.
        towers: whose views are kept apart, "both", "image" or "text".
        local_loss, gather_with_grad, rank, world_size: passed to `open_clip.ClipLoss`.
        contrastive: an open_clip loss to use instead of `ClipLoss`, such as `open_clip.loss.SigLipLoss()`, that was
            built with its own distributed arguments; the four above then do nothing.
    """

    def __init__(
        self,
        diversity_weight: float = 0.0,
        kind: str = "frobenius",
        *,
        towers: str = "both",
        local_loss: bool = False,
        gather_with_grad: bool = True,
        rank: int = 0,
        world_size: int = 1,
        contrastive: nn.Module | None = None,
    ):
        super().__init__()
        if diversity_weight < 0:
            raise ValueError(f"diversity_weight is {diversity_weight}; it must be ≥ 0")
        if kind not in DIVERSITY_KINDS:
            raise ValueError(f"kind is {kind!r}; it must be one of {', '.join(DIVERSITY_KINDS)}")
        if towers not in DIVERSITY_TOWERS:
            raise ValueError(f"towers is {towers!r}; it must be one of {', '.join(DIVERSITY_TOWERS)}")
        self.diversity_weight = diversity_weight
        self.kind, self.towers = kind, towers
        clip_loss = require("open_clip", extra="train").ClipLoss
        self.contrastive = contrastive if contrastive is not None else clip_loss(
            local_loss=local_loss, gather_with_grad=gather_with_grad, rank=rank, world_size=world_size
        )
        # A gather without gradients gives each process the gradient of the whole loss in its own features alone, which
        # averaging over the processes then divides by their number. The diversity term gets the same factor, so that λ
        # weighs on many processes what it weighs on one.
        gathered = self.contrastive
        own_gradients = isinstance(gathered, clip_loss) and not (gathered.local_loss or gathered.gather_with_grad)
        self.gradient_share = 1 / gathered.world_size if own_gradients else 1.0

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor,
        image_gram: Tensor | None = None,
        text_gram: Tensor | None = None,
        logit_bias: Tensor | None = None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        """Features [B,F] (L2-normalised), Gram matrices [B,M,M] or None: exactly the keys that `MVAM` returns.

        Returns the scalar total, or with `output_dict` its weighted terms, whose sum is the total: the form that
        open_clip's training loop adds up and logs.
        """
        terms = {"contrastive_loss": self.contrastive(image_features, text_features, logit_scale, logit_bias)}
        if self.diversity_weight > 0:
            for name, gram in (("image", image_gram), ("text", text_gram)):
                if gram is not None and self.towers in ("both", name):
                    term = self.diversity_weight * diversity_loss(gram, self.kind)
                    if self.gradient_share < 1:  # of the gradient; the value that is logged stays
                        term = torch.lerp(term.detach(), term, self.gradient_share)
                    terms[f"{name}_diversity_loss"] = term
        return terms if output_dict else sum(terms.values())
