"""MVAM: multi-view pooling over both towers of an open_clip model."""
from __future__ import annotations

import contextlib
import copy
import logging
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ._optional import require
from .files import atomic, read_json, write_json
from .pooling import MultiViewPool
from .preprocess import tokenizer_of
from .towers import image_tower, text_tower
from .version import __version__

OPEN_CLIP_CONFIG = "open_clip_config.json"  # open_clip's own name: the folder is also a "local-dir:" of open_clip
MVAM_CONFIG = "mvam_config.json"
WEIGHTS = "model.safetensors"
FORMAT = 1  # of what save_pretrained writes


class MVAM(nn.Module):
    """A two-stream model whose towers are pooled by M view codes each instead of into one vector.

    `encode_image` and `encode_text` give f = normalize(concat_i(P_i W)), an `num_vectors · E` vector, where W is the
    encoder's own pretrained output projection, shared by the views. Inner products, and so every vector index, work
    unchanged.

    Args:
        clip: an open_clip `CLIP` or `CustomTextCLIP` from open_clip's factory. It is used through its own modules and
            neither copied nor changed.
        num_views: M. 0 (only with `global_view`) is the single-vector model itself, the baseline to compare with.
        global_view: keep the encoder's own pooled vector g as one more view and let the learned views v_i enter as
            g + γ_i (v_i − g), with gates γ that start at 0. All vectors then start equal to g, so a freshly wrapped
            pretrained model has exactly the similarities it had before. This is ours, not the paper's. (Scaling the
            views themselves by a gate of 0 in both towers would be a dead start: the score is a product of the two
            towers' gates, whose gradient at 0 is exactly 0.)
        scoring, key_dim, backend: see `MultiViewPool`.
        open_clip_config: {"model_cfg": ..., "preprocess_cfg": ...}, what `save_pretrained` needs to rebuild the
            encoder; `create_model_and_transforms` fills it in.
    """

    def __init__(
        self,
        clip: nn.Module,
        num_views: int = 16,
        *,
        global_view: bool = False,
        scoring: str = "dot",
        key_dim: int | None = None,
        backend: str = "auto",
        open_clip_config: dict | None = None,
    ):
        super().__init__()
        if num_views < 0 or (num_views == 0 and not global_view):
            raise ValueError(f"num_views is {num_views}; it must be at least 1, or 0 together with global_view=True")
        self.clip = clip
        self.image_tower, self.text_tower = image_tower(clip), text_tower(clip)
        self.num_views, self.global_view = num_views, global_view
        self.open_clip_config = open_clip_config
        self._settings = {
            "num_views": num_views, "global_view": global_view, "scoring": scoring, "key_dim": key_dim,
        }
        device = next(clip.parameters()).device
        self.image_pool = self.text_pool = self.image_gates = self.text_gates = None
        if num_views:
            settings = {"scoring": scoring, "key_dim": key_dim, "backend": backend, "device": device}
            self.image_pool = MultiViewPool(self.image_tower.width, num_views, **settings)
            self.text_pool = MultiViewPool(self.text_tower.width, num_views, **settings)
        if num_views and global_view:
            self.image_gates = nn.Parameter(torch.zeros(num_views, device=device))
            self.text_gates = nn.Parameter(torch.zeros(num_views, device=device))

    @property
    def num_vectors(self) -> int:
        """Vectors that are concatenated for one image or text."""
        return self.num_views + self.global_view

    @property
    def logit_scale(self) -> nn.Parameter:
        return self.clip.logit_scale

    def encode_image(self, images: Tensor, normalize: bool = False) -> Tensor:
        """Preprocessed images [B,3,H,W] → [B, num_vectors·E]."""
        return self._encode(self.image_tower, self.image_pool, self.image_gates, images, normalize)[0]

    def encode_text(self, token_ids: Tensor, normalize: bool = False) -> Tensor:
        """Token ids [B,L] → [B, num_vectors·E]. Tokens after the end-of-text token never take part."""
        return self._encode(self.text_tower, self.text_pool, self.text_gates, token_ids, normalize)[0]

    def forward(self, images: Tensor | None = None, token_ids: Tensor | None = None) -> dict[str, Tensor | None]:
        """Everything a loss needs: normalised features, the temperature, and Gram matrices [B,M,M] (None if M = 0)."""
        output = {"image_features": None, "text_features": None, "logit_scale": self.clip.logit_scale.exp()}
        if getattr(self.clip, "logit_bias", None) is not None:
            output["logit_bias"] = self.clip.logit_bias
        output["image_gram"] = output["text_gram"] = None
        if images is not None:
            output["image_features"], output["image_gram"] = self._encode(
                self.image_tower, self.image_pool, self.image_gates, images, True, need_gram=True
            )
        if token_ids is not None:
            output["text_features"], output["text_gram"] = self._encode(
                self.text_tower, self.text_pool, self.text_gates, token_ids, True, need_gram=True
            )
        return output

    def _encode(self, tower, pool, gates, inputs, normalize, need_gram=False) -> tuple[Tensor, Tensor | None]:
        tokens = tower.tokens(inputs, need_pooled=self.global_view)
        vectors, gram = [], None
        if self.global_view:
            vectors.append(tokens.pooled[:, None])
        if pool is not None:
            views, gram = pool(
                tokens.hidden, lengths=tokens.lengths, mask=tokens.mask, norm=tokens.norm, need_gram=need_gram
            )
            views = tower.project(views)
            if self.global_view:
                views = torch.lerp(vectors[0].to(views.dtype), views, gates[:, None].to(views.dtype))
            vectors.append(views)
        features = torch.cat(vectors, 1).flatten(1)
        return (F.normalize(features, dim=-1) if normalize else features), gram

    def image_attention(self, images: Tensor) -> Tensor:
        """Where each view looks in each image: [B,M,N] float32 over `image_tower.prefix_tokens` special tokens, then
        the patches row by row (`image_tower.grid`)."""
        return self._attention(self.image_tower, self.image_pool, images)

    def text_attention(self, token_ids: Tensor) -> Tensor:
        """Where each view looks in each text: [B,M,L] float32, 0 after the end-of-text token."""
        return self._attention(self.text_tower, self.text_pool, token_ids)

    def _attention(self, tower, pool, inputs) -> Tensor:
        if pool is None:
            raise ValueError("num_views is 0: this model has no learned views, and so no attention to show")
        tokens = tower.tokens(inputs, need_pooled=False)
        return pool.attention(tokens.hidden, lengths=tokens.lengths, mask=tokens.mask, norm=tokens.norm)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.clip.set_grad_checkpointing(enable)

    def no_weight_decay(self) -> set[str]:
        """Parameters that training should not decay: the encoder's own, the view codes and the gates."""
        own = {name for name, _ in self.named_parameters() if name.endswith((".codes", "_gates"))}
        encoder = self.clip.no_weight_decay() if hasattr(self.clip, "no_weight_decay") else set()
        return own | {f"clip.{name}" for name in encoder}

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes config and weights (safetensors) into `folder`; `from_pretrained` reads them back."""
        if self.open_clip_config is None:
            raise ValueError(
                "open_clip_config is None, so the encoder could not be rebuilt; pass it to MVAM, "
                "or build the model with mvam_fast.create_model_and_transforms"
            )
        save_file = require("safetensors.torch", extra="train").save_file
        folder = Path(folder)
        write_json(folder / OPEN_CLIP_CONFIG, self.open_clip_config)
        write_json(folder / MVAM_CONFIG, {"format": FORMAT, **self._settings, "mvam_fast": __version__})
        with atomic(folder / WEIGHTS) as temporary:
            save_file({name: tensor.contiguous() for name, tensor in self.state_dict().items()}, temporary)

    @classmethod
    def from_pretrained(cls, folder: str | Path, *, device: str | torch.device = "cpu", backend: str = "auto") -> MVAM:
        """The model that `save_pretrained` wrote, in eval mode."""
        folder = Path(folder)
        if not folder.is_dir():
            raise FileNotFoundError(f"folder: no such folder: {folder}")
        settings = _settings_of(folder)
        config = read_json(folder / OPEN_CLIP_CONFIG, "folder")
        open_clip = require("open_clip", extra="train")
        with _no_weights_yet():
            clip = open_clip.create_model(f"local-dir:{folder}", load_weights=False, pretrained_text=False)
        model = cls(clip, backend=backend, open_clip_config=config, **settings)
        load_weights(model, folder / WEIGHTS)
        return model.to(device).eval()


def _settings_of(folder: Path) -> dict:
    """The arguments of MVAM that a checkpoint names; ValueError where a newer version wrote it."""
    settings = read_json(folder / MVAM_CONFIG, "folder")
    written_by = settings.pop("mvam_fast", None)
    found = settings.pop("format", 1)  # the first checkpoints did not say
    if found != FORMAT:
        raise ValueError(
            f"folder: {folder} has format {found!r}, written by mvam_fast {written_by}; "
            f"this is {__version__}, which reads format {FORMAT}: update mvam_fast"
        )
    return settings


@contextlib.contextmanager
def _no_weights_yet():
    """Silences open_clip's warning that the model is random: its weights are loaded right after."""

    def is_other(record):
        return not record.getMessage().startswith("No pretrained weights loaded")

    logging.getLogger().addFilter(is_other)
    try:
        yield
    finally:
        logging.getLogger().removeFilter(is_other)


def load_weights(model: nn.Module, path: Path) -> None:
    """Strictly: every parameter must be there with its shape; otherwise one error that says what does not fit."""
    load_file = require("safetensors.torch", extra="train").load_file
    if not path.is_file():
        raise FileNotFoundError(f"folder: the checkpoint has no {path.name}: {path}")
    try:
        weights = load_file(path)
    except Exception as error:
        raise ValueError(f"folder: {path} is not a readable safetensors file ({error})") from error
    expected = model.state_dict()
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
    model.load_state_dict(weights)


def create_model_and_transforms(
    model_name: str,
    pretrained: str | None = None,
    num_views: int = 16,
    *,
    global_view: bool = False,
    scoring: str = "dot",
    key_dim: int | None = None,
    backend: str = "auto",
    **open_clip_arguments,
):
    """`open_clip.create_model_and_transforms` with MVAM on top.

    Args:
        model_name, pretrained: an open_clip model name with a pretrained tag or a path of weights; or this package's
            own small "scenes-ViT-T-16".
        num_views, global_view, scoring, key_dim, backend: see `MVAM`.
        open_clip_arguments: passed on (precision, device, force_image_size, embed_dim, ...).

    Returns:
        (model, preprocess_train, preprocess_val)
    """
    open_clip = open_clip_with_own_configs()
    model_cfg = open_clip.get_model_config(model_name.replace("/", "-") if ":" not in model_name else model_name)
    if model_cfg is None:
        raise ValueError(f"model_name is {model_name!r}; open_clip knows: {', '.join(open_clip.list_models())}")
    clip, train, val = open_clip.create_model_and_transforms(model_name, pretrained, **open_clip_arguments)
    config = {
        "model_cfg": _with_overrides(model_cfg, open_clip_arguments),
        "preprocess_cfg": open_clip.get_model_preprocess_cfg(clip),
    }
    model = MVAM(
        clip, num_views, global_view=global_view, scoring=scoring, key_dim=key_dim, backend=backend,
        open_clip_config=config,
    )
    return model, train, val


# Arguments of open_clip's factory that change the architecture, and where they land in its model config.
_OVERRIDES = {
    "force_quick_gelu": ("quick_gelu",),
    "force_custom_text": ("custom_text",),
    "force_patch_dropout": ("vision_cfg", "patch_dropout"),
    "force_image_size": ("vision_cfg", "image_size"),
    "force_context_length": ("text_cfg", "context_length"),
}
_MODEL_ARGUMENTS = ("embed_dim", "init_logit_scale", "init_logit_bias", "nonscalar_logit_scale")


def _with_overrides(model_cfg: dict, arguments: dict) -> dict:
    model_cfg = copy.deepcopy(model_cfg)
    for name, path in _OVERRIDES.items():
        if arguments.get(name) not in (None, False):
            section = model_cfg if len(path) == 1 else model_cfg[path[0]]
            section[path[-1]] = arguments[name]
    model_cfg.update({name: arguments[name] for name in _MODEL_ARGUMENTS if name in arguments})
    return model_cfg


def get_tokenizer(model_name: str | Path):
    """The tokenizer of an open_clip model name, or of a folder that `MVAM.save_pretrained` wrote."""
    open_clip = open_clip_with_own_configs()
    if (Path(model_name) / OPEN_CLIP_CONFIG).is_file():
        return tokenizer_of(read_json(Path(model_name) / OPEN_CLIP_CONFIG, "model_name")["model_cfg"]["text_cfg"])
    return open_clip.get_tokenizer(str(model_name))


def open_clip_with_own_configs():
    """open_clip, knowing this package's own model configs."""
    open_clip = require("open_clip", extra="train")
    configs = Path(__file__).parent / "configs"
    if not {path.stem for path in configs.glob("*.json")} <= set(open_clip.list_models()):
        open_clip.add_model_config(configs)
    return open_clip
