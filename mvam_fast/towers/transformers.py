"""The towers of transformers' two-stream models: CLIP, MetaCLIP 2, SigLIP, SigLIP 2.

Each tower is run by its own forward, so its hooks, attention implementation and checkpointing stay in force. SigLIP 2's
checkpoints of a fixed resolution are `SiglipModel`s; `Siglip2Model` is the one that takes images of any shape.
"""
from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from .protocol import Tokens, TowerAdapter, arguments, leave_to_pooling, valid_up_to


def _sizes(tower: nn.Module) -> tuple[int, tuple[int, int]]:
    """Width of a vision tower's tokens, and its grid of patches."""
    side = tower.config.image_size // tower.config.patch_size
    return tower.post_layernorm.normalized_shape[0], (side, side)


class CLIPImageTower:
    """Class token and patches. They leave the model before `post_layernorm`, which it applies to the class token only:
    the pooling applies it to all."""

    prefix_tokens = 1

    def __init__(self, clip: nn.Module):
        self.model, self.tower = clip, clip.vision_model
        self.width, self.grid = _sizes(self.tower)

    def tokens(self, inputs: Tensor | Mapping, need_pooled: bool) -> Tokens:
        (images,) = arguments(inputs, "pixel_values")
        output = self.tower(pixel_values=images)
        pooled = self.project(output.pooler_output) if need_pooled else None
        return Tokens(**leave_to_pooling(output.last_hidden_state, self.tower.post_layernorm), pooled=pooled)

    def project(self, views: Tensor) -> Tensor:
        return self.model.visual_projection(views)


class MetaCLIPTextTower:
    """Tokens up to the first end-of-text token, which the model pools. Where there is none it pools the first token,
    and then only that one counts.

    They leave the model after `final_layer_norm`. What goes into it could be had (`output_hidden_states`), but the
    model normalises all tokens in any case.
    """

    prefix_tokens, grid = 0, None

    def __init__(self, clip: nn.Module):
        self.model, self.tower = clip, clip.text_model
        self.width = self.tower.final_layer_norm.normalized_shape[0]

    def end_of_text(self, token_ids: Tensor) -> Tensor:
        """Position [B] of the token that the model pools."""
        return (token_ids == self.tower.eos_token_id).int().argmax(-1)

    def tokens(self, inputs: Tensor | Mapping, need_pooled: bool) -> Tokens:
        token_ids, attention_mask = arguments(inputs, "input_ids", "attention_mask")
        output = self.tower(input_ids=token_ids, attention_mask=attention_mask)
        pooled = self.project(output.pooler_output) if need_pooled else None
        lengths, mask = self.end_of_text(token_ids) + 1, None
        if attention_mask is not None:
            lengths, mask = None, valid_up_to(lengths, attention_mask)
        return Tokens(output.last_hidden_state, lengths=lengths, mask=mask, pooled=pooled)

    def project(self, views: Tensor) -> Tensor:
        return self.model.text_projection(views)


class CLIPTextTower(MetaCLIPTextTower):
    """The same, but for old checkpoints whose config says eos_token_id = 2, which was wrong: for them the model takes
    the highest id for the end of the text."""

    def end_of_text(self, token_ids: Tensor) -> Tensor:
        return token_ids.argmax(-1) if self.tower.eos_token_id == 2 else super().end_of_text(token_ids)


class SiglipImageTower:
    """Patches after `post_layernorm`. The model's own vector comes from its attention head; nothing is projected."""

    prefix_tokens = 0

    def __init__(self, clip: nn.Module):
        self.tower = clip.vision_model
        self.width, self.grid = _sizes(self.tower)

    def tokens(self, inputs: Tensor | Mapping, need_pooled: bool) -> Tokens:
        (images,) = arguments(inputs, "pixel_values")
        output = self.tower(pixel_values=images)
        return Tokens(output.last_hidden_state, pooled=output.pooler_output if need_pooled else None)

    def project(self, views: Tensor) -> Tensor:
        return views


class Siglip2ImageTower:
    """Patches of images of any shape, padded to a common number, after `post_layernorm`; padding does not count."""

    prefix_tokens, grid = 0, None

    def __init__(self, clip: nn.Module):
        self.tower = clip.vision_model
        self.width = self.tower.post_layernorm.normalized_shape[0]

    def tokens(self, inputs: Tensor | Mapping, need_pooled: bool) -> Tokens:
        names = ("pixel_values", "pixel_attention_mask", "spatial_shapes")
        given = arguments(inputs, *names)
        missing = [name for name, tensor in zip(names, given, strict=True) if tensor is None]
        if missing:
            raise ValueError(
                f"inputs lacks {', '.join(missing)}; SigLIP 2 takes what its processor returns: {', '.join(names)}"
            )
        output = self.tower(*given)  # not by name: transformers 4 called them otherwise
        pooled = output.pooler_output if need_pooled else None
        return Tokens(output.last_hidden_state, mask=given[1].bool(), pooled=pooled)

    def project(self, views: Tensor) -> Tensor:
        return views


class SiglipTextTower:
    """All tokens, normalised: the model reads texts of a fixed length, pools the last position whatever it holds, and
    was trained without a mask. An attention mask that is given all the same is obeyed."""

    prefix_tokens, grid = 0, None

    def __init__(self, clip: nn.Module):
        self.tower = clip.text_model
        self.width = self.tower.final_layer_norm.normalized_shape[0]

    def tokens(self, inputs: Tensor | Mapping, need_pooled: bool) -> Tokens:
        token_ids, attention_mask = arguments(inputs, "input_ids", "attention_mask")
        output = self.tower(input_ids=token_ids, attention_mask=attention_mask)
        mask = None if attention_mask is None else attention_mask.bool()
        return Tokens(output.last_hidden_state, mask=mask, pooled=output.pooler_output if need_pooled else None)

    def project(self, views: Tensor) -> Tensor:
        return self.tower.head(views)


# By name: transformers need not be there for open_clip's models, and what pools alike here differs in its rules.
MODELS = {
    "CLIPModel": (CLIPImageTower, CLIPTextTower),
    "MetaClip2Model": (CLIPImageTower, MetaCLIPTextTower),
    "SiglipModel": (SiglipImageTower, SiglipTextTower),
    "Siglip2Model": (Siglip2ImageTower, SiglipTextTower),
}


def adapters(clip: nn.Module) -> tuple[type[TowerAdapter], type[TowerAdapter]] | None:
    """The classes of image and text tower for a model of transformers, or None if it is none of `MODELS`."""
    for cls in type(clip).__mro__:
        if cls.__module__.startswith("transformers.") and cls.__name__ in MODELS:
            return MODELS[cls.__name__]
    return None


def no_weight_decay(encoder: nn.Module) -> set[str]:
    """Names of learned positions and class tokens, as transformers calls them."""
    undecayed = ("position_embedding.weight", "class_embedding")
    return {name for name, _ in encoder.named_parameters() if name.endswith(undecayed)}
