"""Tokens, masks and projections out of open_clip's towers, through their own modules: nothing is patched or forked.

Every tower becomes a `Tower` with one method for each question the model asks. What a tower must offer is found by
its features, not by a version number; a tower that lacks them is refused by name.
"""
from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn


class Tokens(NamedTuple):
    """What an encoder hands to the pooling.

    `hidden` [B,N,D]; which of them count: `lengths` [B] or `mask` [B,N] or neither; `norm`: the encoder's final
    LayerNorm if `hidden` is what goes into it (the pooling applies it, fused), None if `hidden` is normalised already;
    `pooled` [B,E]: the encoder's own pooled vector, projected as the encoder does, or None if not asked for.
    """

    hidden: Tensor
    lengths: Tensor | None = None
    mask: Tensor | None = None
    norm: nn.LayerNorm | None = None
    pooled: Tensor | None = None


def _leave_to_pooling(hidden: Tensor, norm: nn.Module) -> dict:
    """`hidden` and `norm` of Tokens: a plain LayerNorm is left to the pooling, anything else is applied here."""
    if isinstance(norm, nn.LayerNorm) and norm.elementwise_affine:
        return {"hidden": hidden, "norm": norm}
    return {"hidden": norm(hidden)}


class VisionTransformerTower:
    """open_clip `VisionTransformer`: class token and patches, through `ln_post`."""

    def __init__(self, clip: nn.Module):
        self.tower = tower = clip.visual
        if getattr(tower, "attn_pool", None) is not None:
            raise ValueError(
                "the image tower pools by attention before its LayerNorm (attentional_pool); "
                "MVAM replaces pooling and supports towers without it"
            )
        self.width = tower.ln_post.normalized_shape[0]
        self.grid = tuple(tower.grid_size)
        self.prefix_tokens = 1

    def tokens(self, images: Tensor, need_pooled: bool) -> Tokens:
        tower = self.tower
        hidden = tower.transformer(tower._embeds(images))
        pooled = None
        if need_pooled:
            # The class token alone need not wait for the LayerNorm of all tokens.
            by_class = tower.pool_type == "tok" and not tower.final_ln_after_pool
            pooled = self.project(tower.ln_post(hidden[:, 0]) if by_class else tower._pool(hidden)[0])
        return Tokens(**_leave_to_pooling(hidden, tower.ln_post), pooled=pooled)

    def project(self, views: Tensor) -> Tensor:
        return views if self.tower.proj is None else views @ self.tower.proj


class TimmTower:
    """open_clip `TimmModel` (SigLIP and others): the trunk's final tokens, projected by the model's head."""

    def __init__(self, clip: nn.Module):
        self.tower = clip.visual
        if "pool" in dict(self.tower.head.named_children()):
            raise ValueError("the image tower's head pools by itself (abs_attn or rot_attn); MVAM cannot share it")
        self.width = self.tower.trunk.num_features
        self.prefix_tokens = getattr(self.tower.trunk, "num_prefix_tokens", 0)
        embed = getattr(self.tower.trunk, "patch_embed", None)
        self.grid = tuple(embed.grid_size) if getattr(embed, "grid_size", None) else None

    def tokens(self, images: Tensor, need_pooled: bool) -> Tokens:
        trunk = self.tower.trunk
        hidden = trunk.forward_features(images)
        pooled = self.tower.head(trunk.forward_head(hidden)) if need_pooled else None
        if hidden.dim() == 4:  # a convolutional trunk: [B,D,H,W]
            hidden = hidden.flatten(2).mT
        return Tokens(hidden, pooled=pooled)

    def project(self, views: Tensor) -> Tensor:
        # A classifier inside the trunk (proj="") projects what was pooled; Identity where there is none.
        return self.tower.head(self.tower.trunk.get_classifier()(views))


class ResNetTower:
    """CLIP's ModifiedResNet: the mean token and the grid, with positions; values and output projected by `attnpool`.

    There is no final LayerNorm here. Value and output projection commute with pooling (rows of A sum to 1), so the
    views share the pretrained `c_proj ∘ v_proj`.
    """

    def __init__(self, clip: nn.Module):
        self.tower = clip.visual
        self.pool = self.tower.attnpool
        self.width = self.pool.positional_embedding.shape[1]
        side = round((self.pool.positional_embedding.shape[0] - 1) ** 0.5)
        self.grid, self.prefix_tokens = (side, side), 1

    def tokens(self, images: Tensor, need_pooled: bool) -> Tokens:
        tower = self.tower
        grid = tower.layer4(tower.layer3(tower.layer2(tower.layer1(tower.stem(images)))))
        pooled = self.pool(grid) if need_pooled else None
        hidden = grid.flatten(2).mT
        hidden = torch.cat([hidden.mean(1, keepdim=True), hidden], 1)
        return Tokens(hidden + self.pool.positional_embedding.to(hidden.dtype), pooled=pooled)

    def project(self, views: Tensor) -> Tensor:
        return self.pool.c_proj(self.pool.v_proj(views))


class TextTower:
    """open_clip's text transformer, either inside `CLIP` itself or as `CustomTextCLIP.text`."""

    prefix_tokens, grid = 0, None

    def __init__(self, clip: nn.Module):
        self.tower = tower = getattr(clip, "text", clip)
        if getattr(tower, "cls_emb", None) is not None:
            raise ValueError("the text tower appends a class token (CoCa's embed_cls), which MVAM does not support")
        # Both layouts keep these under different names.
        self.pool_type = getattr(tower, "pool_type", None) or tower.text_pool_type
        self.eos_id = getattr(tower, "eos_id", None) or getattr(tower, "text_eos_id", None)
        self.width = tower.ln_final.normalized_shape[0]

    def end_of_text(self, token_ids: Tensor) -> Tensor | None:
        """Position [B] of the end-of-text token, or None where the tower reads a fixed length (SigLIP)."""
        if self.pool_type == "argmax":  # CLIP's end-of-text has the highest id; 0 is padding *and* the word "!"
            return token_ids.argmax(-1)
        if self.pool_type == "eos":
            return (token_ids == self.eos_id).int().argmax(-1)
        return None

    def tokens(self, token_ids: Tensor, need_pooled: bool) -> Tokens:
        tower = self.tower
        if hasattr(tower, "_embeds"):
            embedded, attn_mask = tower._embeds(token_ids)
        else:  # CLIP holds the same parts itself
            cast = tower.transformer.get_cast_dtype()
            embedded = tower.token_embedding(token_ids).to(cast) + tower.positional_embedding.to(cast)
            attn_mask = tower.attn_mask
        hidden = tower.transformer(embedded, attn_mask=attn_mask)
        end = self.end_of_text(token_ids)
        pooled = None
        if need_pooled:
            position = {"first": 0, "last": -1}.get(self.pool_type)
            if end is not None:
                pooled = hidden[torch.arange(end.shape[0], device=end.device), end]
            elif position is not None:
                pooled = hidden[:, position]
            else:
                raise ValueError(f"the text tower pools by {self.pool_type!r}: there is no pooled vector for a view")
            pooled = self.project(tower.ln_final(pooled))
        lengths = None if end is None else end + 1
        return Tokens(**_leave_to_pooling(hidden, tower.ln_final), lengths=lengths, pooled=pooled)

    def project(self, views: Tensor) -> Tensor:
        projection = self.tower.text_projection
        if projection is None:
            return views
        return projection(views) if isinstance(projection, nn.Linear) else views @ projection


class HFTextTower:
    """open_clip `HFTextEncoder`: every position that is not padding."""

    prefix_tokens, grid = 0, None

    def __init__(self, clip: nn.Module):
        self.tower = clip.text
        config = self.tower.transformer.config
        self.width = getattr(config, "hidden_size", None) or config.d_model

    def tokens(self, token_ids: Tensor, need_pooled: bool) -> Tokens:
        tower = self.tower
        mask = token_ids != tower.config.pad_token_id
        output = tower.transformer(input_ids=token_ids, attention_mask=mask.long())
        pooled = self.project(tower.pooler(output, mask.long())) if need_pooled else None
        return Tokens(output.last_hidden_state, mask=mask, pooled=pooled)

    def project(self, views: Tensor) -> Tensor:
        return self.tower.proj(views)


# What tells a tower: the modules it owns.
_IMAGE_TOWERS = (
    (("_embeds", "_global_pool", "transformer", "ln_post"), VisionTransformerTower),
    (("trunk", "head"), TimmTower),
    (("stem", "layer4", "attnpool"), ResNetTower),
)
_TEXT_TOWERS = (
    (("token_embedding", "transformer", "ln_final"), TextTower),
    (("transformer", "pooler", "proj", "config"), HFTextTower),
)


def _adapt(clip: nn.Module, tower: nn.Module, name: str, known: tuple):
    for features, adapter in known:
        if all(hasattr(tower, feature) for feature in features):
            return adapter(clip)
    names = ", ".join(adapter.__name__ for _, adapter in known)
    raise ValueError(f"the {name} tower is a {type(tower).__name__}, which MVAM cannot read; it knows: {names}")


def image_tower(clip: nn.Module):
    """The adapter for the image tower of an open_clip `CLIP` or `CustomTextCLIP`."""
    if not hasattr(clip, "visual"):
        raise ValueError(f"model is a {type(clip).__name__} without .visual; it must be an open_clip CLIP model")
    return _adapt(clip, clip.visual, "image", _IMAGE_TOWERS)


def text_tower(clip: nn.Module):
    """The adapter for the text tower of an open_clip `CLIP` or `CustomTextCLIP`."""
    return _adapt(clip, getattr(clip, "text", clip), "text", _TEXT_TOWERS)
