"""The towers of open_clip's `CLIP` and `CustomTextCLIP`, of version 3 and of the coming 4."""
from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from .protocol import Tokens, TowerAdapter, arguments, leave_to_pooling


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

    def tokens(self, inputs: Tensor | Mapping, need_pooled: bool) -> Tokens:
        tower = self.tower
        (images,) = arguments(inputs, "pixel_values")
        hidden = tower.transformer(tower._embeds(images))
        pooled = None
        if need_pooled:
            # The class token alone need not wait for the LayerNorm of all tokens.
            by_class = tower.pool_type == "tok" and not tower.final_ln_after_pool
            pooled = self.project(tower.ln_post(hidden[:, 0]) if by_class else tower._pool(hidden)[0])
        return Tokens(**leave_to_pooling(hidden, tower.ln_post), pooled=pooled)

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

    def tokens(self, inputs: Tensor | Mapping, need_pooled: bool) -> Tokens:
        trunk = self.tower.trunk
        (images,) = arguments(inputs, "pixel_values")
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

    def tokens(self, inputs: Tensor | Mapping, need_pooled: bool) -> Tokens:
        tower = self.tower
        (images,) = arguments(inputs, "pixel_values")
        grid = tower.layer4(tower.layer3(tower.layer2(tower.layer1(tower.stem(images)))))
        pooled = self.pool(grid) if need_pooled else None
        hidden = grid.flatten(2).mT
        hidden = torch.cat([hidden.mean(1, keepdim=True), hidden], 1)
        return Tokens(hidden + self.pool.positional_embedding.to(hidden.dtype), pooled=pooled)

    def project(self, views: Tensor) -> Tensor:
        return self.pool.c_proj(self.pool.v_proj(views))


def _refuse_gaps(attention_mask: Tensor | None, lengths: Tensor | int) -> None:
    """open_clip's own text towers read all tokens up to the end of the text, and take no mask: ValueError where one
    [B,L] leaves out any of the first `lengths` [B]. What it says of those after them changes nothing."""
    if attention_mask is None or torch.compiler.is_compiling():
        return
    positions = torch.arange(attention_mask.shape[1], device=attention_mask.device)
    if isinstance(lengths, Tensor):
        lengths = lengths[:, None]
    if ((positions < lengths) & ~attention_mask.bool()).any():
        raise ValueError(
            "attention_mask leaves out tokens before the end of the text (or of a text of fixed length), but this text "
            "tower reads them all; it must be 1 there, or not be given"
        )


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

    def _embeds(self, token_ids: Tensor) -> tuple[Tensor, Tensor | None]:
        """Tokens [B,L,D] that go into the transformer, and the attention mask [L,L] that goes with them."""
        tower, length = self.tower, token_ids.shape[1]
        positions = tower.positional_embedding
        if length > positions.shape[0]:
            raise ValueError(f"the texts have {length} tokens; this model reads up to {positions.shape[0]}")
        short = length < positions.shape[0]  # open_clip 3 insists on the full length, which changes nothing
        if hasattr(tower, "_embeds"):
            embedded, attn_mask = tower._embeds(token_ids)
        else:  # CLIP holds the same parts itself
            cast, attn_mask = tower.transformer.get_cast_dtype(), tower.attn_mask
            positions = positions[:length] if short else positions
            embedded = tower.token_embedding(token_ids).to(cast) + positions.to(cast)
        return embedded, attn_mask if attn_mask is None or not short else attn_mask[..., :length, :length]

    def tokens(self, inputs: Tensor | Mapping, need_pooled: bool) -> Tokens:
        tower = self.tower
        token_ids, attention_mask = arguments(inputs, "input_ids", "attention_mask")
        end = self.end_of_text(token_ids)
        lengths = None if end is None else end + 1
        _refuse_gaps(attention_mask, token_ids.shape[1] if lengths is None else lengths)
        embedded, attn_mask = self._embeds(token_ids)
        hidden = tower.transformer(embedded, attn_mask=attn_mask)
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
        return Tokens(**leave_to_pooling(hidden, tower.ln_final), lengths=lengths, pooled=pooled)

    def project(self, views: Tensor) -> Tensor:
        projection = self.tower.text_projection
        if projection is None:
            return views
        return projection(views) if isinstance(projection, nn.Linear) else views @ projection


class ModernTextTower:
    """The text tower that came with open_clip 4 (`text_arch="modern"`): every position that is not padding, without the
    registers before them."""

    prefix_tokens, grid = 0, None

    def __init__(self, clip: nn.Module):
        self.tower = clip.text
        self.width = self.tower.width

    def tokens(self, inputs: Tensor | Mapping, need_pooled: bool) -> Tokens:
        tower = self.tower
        token_ids, attention_mask = arguments(inputs, "input_ids", "attention_mask")
        hidden, valid, _ = tower._encode_tokens(token_ids)
        _refuse_gaps(attention_mask, valid.sum(1))
        hidden = hidden[:, tower.num_reg :]
        pooled = None
        if need_pooled:
            pooled = tower.pool(tower.ln_final(hidden), text=token_ids, valid=valid, eos_id=tower.eos_id)
            pooled = self.project(pooled)
        return Tokens(**leave_to_pooling(hidden, tower.ln_final), mask=valid, pooled=pooled)

    def project(self, views: Tensor) -> Tensor:
        return views if self.tower.text_projection is None else self.tower.text_projection(views)


class HFTextTower:
    """open_clip `HFTextEncoder`: every position that is not padding."""

    prefix_tokens, grid = 0, None

    def __init__(self, clip: nn.Module):
        self.tower = clip.text
        config = self.tower.transformer.config
        self.width = getattr(config, "hidden_size", None) or config.d_model

    def tokens(self, inputs: Tensor | Mapping, need_pooled: bool) -> Tokens:
        tower = self.tower
        token_ids, attention_mask = arguments(inputs, "input_ids", "attention_mask")
        mask = token_ids != tower.config.pad_token_id if attention_mask is None else attention_mask.bool()
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
    (("token_embedding", "_encode_tokens", "pool", "ln_final", "num_reg"), ModernTextTower),
    (("transformer", "pooler", "proj", "config"), HFTextTower),
)


def _adapt(clip: nn.Module, tower: nn.Module, name: str, known: tuple):
    for features, adapter in known:
        if all(hasattr(tower, feature) for feature in features):
            return adapter(clip)
    names = ", ".join(adapter.__name__ for _, adapter in known)
    raise ValueError(f"the {name} tower is a {type(tower).__name__}, which MVAM cannot read; it knows: {names}")


def image_tower(clip: nn.Module) -> TowerAdapter:
    return _adapt(clip, clip.visual, "image", _IMAGE_TOWERS)


def text_tower(clip: nn.Module) -> TowerAdapter:
    return _adapt(clip, getattr(clip, "text", clip), "text", _TEXT_TOWERS)
