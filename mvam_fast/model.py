"""MVAM: multi-view pooling over both towers of a two-stream model."""
from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import encoders, hf_files, towers
from .model_folder import WEIGHTS, load_weights, settings_of, write_settings, write_weights
from .pooling import MultiViewPool
from .view_projection import ViewProjection, resolve


class MVAM(nn.Module):
    """A two-stream model whose towers are pooled by M view codes each instead of into one vector.

    `encode_image` and `encode_text` give f = normalize(concat_i(P_i W)), an `num_vectors · E` vector, where W is the
    encoder's own pretrained output projection, shared by the views. Inner products, and so every vector index, work
    unchanged.

    Args:
        clip: an open_clip `CLIP` or `CustomTextCLIP` from open_clip's factory, or a `CLIPModel`, `MetaClip2Model`,
            `SiglipModel` or `Siglip2Model` of transformers. It is used through its own modules and neither copied nor
            changed. docs/models.md says what is taken from each.
        num_views: M. 0 (only with `global_view`) is the single-vector model itself, the baseline to compare with.
        global_view: keep the encoder's own pooled vector g as one more view and let the learned views v_i enter as
            g + γ_i (v_i − g), with gates γ that start at 0. All vectors then start equal to g, so a freshly wrapped
            pretrained model has exactly the similarities it had before. This is ours, not the paper's. (Scaling the
            views themselves by a gate of 0 in both towers would be a dead start: the score is a product of the two
            towers' gates, whose gradient at 0 is exactly 0.)
        scoring, key_dim, code_std, backend: see `MultiViewPool`.
        projection, view_dim: what follows the encoder's own projection: "encoder" nothing, "shared" one matrix
            E → view_dim for all views, "per_view" one for each. By default "per_view" if a view_dim is given, else
            "encoder". See `view_projection.ViewProjection` for how they start.
        max_width: the most numbers that an image or text may have; a view_dim is chosen that keeps to it.
        open_clip_config: {"model_cfg": ..., "preprocess_cfg": ...}, what `save_pretrained` needs to rebuild the
            encoder of open_clip; `create_model_and_transforms` fills it in.
        image_tower, text_tower: encoders of your own, each an `nn.Module` that is a `towers.TowerAdapter`: both instead
            of a `clip`, or one of them instead of the one that `clip` has.
    """

    def __init__(
        self,
        clip: nn.Module | None = None,
        num_views: int = 16,
        *,
        global_view: bool = False,
        scoring: str = "dot",
        key_dim: int | None = None,
        code_std: float = 1.0,
        projection: str | None = None,
        view_dim: int | None = None,
        max_width: int | None = None,
        backend: str = "auto",
        open_clip_config: dict | None = None,
        image_tower: nn.Module | None = None,
        text_tower: nn.Module | None = None,
    ):
        super().__init__()
        if num_views < 0 or (num_views == 0 and not global_view):
            raise ValueError(f"num_views is {num_views}; it must be at least 1, or 0 together with global_view=True")
        own = {"image_tower": image_tower, "text_tower": text_tower}
        self.own_towers = [name for name, tower in own.items() if tower is not None]
        if clip is None and len(self.own_towers) < 2:
            missing = " and ".join(name for name in own if name not in self.own_towers)
            raise ValueError(f"clip is None, and {missing} too; without a clip both towers must be given")
        if clip is not None and len(self.own_towers) == 2:
            raise ValueError(f"clip is a {type(clip).__name__}, of which both towers leave nothing; leave it out")
        self.library = None if clip is None else towers.library_of(clip)
        found = {
            name: getattr(towers, name)(clip) if tower is None else towers.own_tower(tower, name)
            for name, tower in own.items()
        }
        device = next((image_tower if clip is None else clip).parameters(), torch.tensor(0)).device
        self.clip = towers.Temperature().to(device) if clip is None else clip
        self.image_tower, self.text_tower = found["image_tower"], found["text_tower"]
        self.num_views, self.global_view = num_views, global_view
        self.open_clip_config = open_clip_config
        self._settings = {
            "num_views": num_views, "global_view": global_view, "scoring": scoring, "key_dim": key_dim,
        }
        self.image_pool = self.text_pool = self.image_gates = self.text_gates = None
        self.image_projection = self.text_projection = self.view_dim = None
        if num_views:
            settings = {"scoring": scoring, "key_dim": key_dim, "code_std": code_std, "backend": backend}
            self.image_pool = MultiViewPool(self.image_tower.width, num_views, device=device, **settings)
            self.text_pool = MultiViewPool(self.text_tower.width, num_views, device=device, **settings)
        if (projection, view_dim, max_width) != (None, None, None):
            self._set_projection(projection, view_dim, max_width, device)
        if num_views and global_view:
            self.image_gates = nn.Parameter(torch.zeros(num_views, device=device))
            self.text_gates = nn.Parameter(torch.zeros(num_views, device=device))

    def _set_projection(self, projection, view_dim, max_width, device) -> None:
        if not self.num_views:
            raise ValueError("num_views is 0; projection, view_dim and max_width are for learned views")
        with torch.no_grad():  # what comes out of the encoders' own projections, E
            widths = [
                tower.project(pool.codes.new_zeros(1, 1, tower.width, dtype=self._dtype())).shape[-1]
                for tower, pool in ((self.image_tower, self.image_pool), (self.text_tower, self.text_pool))
            ]
        if widths[0] != widths[1]:
            raise ValueError(f"the towers project to {widths[0]} and {widths[1]} numbers; they must be as many")
        projection, view_dim = resolve(
            projection, view_dim, max_width, self.num_views, self.global_view, widths[0]
        )
        if projection == "encoder":
            return
        self._settings |= {"projection": projection, "view_dim": view_dim}
        self.view_dim = view_dim
        self.image_projection, self.text_projection = (
            ViewProjection(widths[0], view_dim, self.num_views, projection, device=device) for _ in range(2)
        )

    def _dtype(self) -> torch.dtype:
        """The encoders' (codes and gates are float32 whatever it is)."""
        modules = [getattr(self, name) for name in ["clip", *self.own_towers]]
        return next((p.dtype for module in modules for p in module.parameters() if p.dim() > 0), torch.float32)

    @property
    def num_vectors(self) -> int:
        """Vectors that are concatenated for one image or text. `view_dim` says how wide those of learned views are;
        None where that is the encoder's own width."""
        return self.num_views + self.global_view

    def embedding_width(self, encoder_width: int) -> int:
        """Numbers per image or text, where the encoder's own vector has `encoder_width`."""
        return self.global_view * encoder_width + self.num_views * (self.view_dim or encoder_width)

    @property
    def logit_scale(self) -> nn.Parameter:
        return self.clip.logit_scale

    @property
    def logit_bias(self) -> nn.Parameter | None:
        return getattr(self.clip, "logit_bias", None)

    def encode_image(self, images: Tensor | Mapping, normalize: bool = False) -> Tensor:
        """Preprocessed images [B,3,H,W] → [B, num_vectors·E]. What an image processor of transformers returns will do
        too."""
        return self._encode("image", images, normalize)[0]

    def encode_text(self, token_ids: Tensor | Mapping, normalize: bool = False) -> Tensor:
        """Token ids [B,L] → [B, num_vectors·E]. Tokens after the end-of-text token never take part. What a tokenizer of
        transformers returns will do too."""
        return self._encode("text", token_ids, normalize)[0]

    def get_image_features(self, pixel_values: Tensor, **inputs: Tensor | None) -> Tensor:
        """`encode_image` by the name and arguments of transformers; as there, not normalised.

        Returns a tensor [B, num_vectors·E], as transformers did up to version 4; version 5 returns it in an output, as
        `.pooler_output`.
        """
        return self.encode_image(_given(pixel_values=pixel_values, **inputs))

    def get_text_features(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **inputs: Tensor | None
    ) -> Tensor:
        """`encode_text` by the name and arguments of transformers; as there, not normalised. Returns as
        `get_image_features`."""
        return self.encode_text(_given(input_ids=input_ids, attention_mask=attention_mask, **inputs))

    def forward(self, images: Tensor | None = None, token_ids: Tensor | None = None) -> dict[str, Tensor | None]:
        """Everything a loss needs: normalised features, the temperature, and Gram matrices [B,M,M] (None if M = 0)."""
        output = {"image_features": None, "text_features": None, "logit_scale": self.logit_scale.exp()}
        if self.logit_bias is not None:
            output["logit_bias"] = self.logit_bias
        output["image_gram"] = output["text_gram"] = None
        if images is not None:
            output["image_features"], output["image_gram"] = self._encode("image", images, True, need_gram=True)
        if token_ids is not None:
            output["text_features"], output["text_gram"] = self._encode("text", token_ids, True, need_gram=True)
        return output

    def _encode(self, side: str, inputs, normalize, need_gram=False) -> tuple[Tensor, Tensor | None]:
        tower, pool, gates, projection = (
            getattr(self, f"{side}_{part}") for part in ("tower", "pool", "gates", "projection")
        )
        tokens = tower.tokens(inputs, need_pooled=self.global_view)
        if self.global_view and tokens.pooled is None:
            raise ValueError(f"global_view is True, but the {type(tower).__name__} has no pooled vector of its own")
        vectors, gram = [], None
        if self.global_view:
            vectors.append(tokens.pooled)
        if pool is not None:
            views, gram = pool(
                tokens.hidden, lengths=tokens.lengths, mask=tokens.mask, norm=tokens.norm, need_gram=need_gram
            )
            views = tower.project(views)
            if self.global_view:
                views = torch.lerp(vectors[0][:, None].to(views.dtype), views, gates[:, None].to(views.dtype))
            vectors.append((views if projection is None else projection(views)).flatten(1))
        features = torch.cat(vectors, 1)
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
        """Trades time for memory in both encoders, each in its library's way."""
        for name in [*self.own_towers, *(["clip"] if self.library else [])]:
            _set_checkpointing(getattr(self, name), enable, name)

    def lock_image_tower(self, *args, **kwargs) -> None:
        """Freezes the image encoder as open_clip does (arguments as there); view codes and gates go on learning."""
        self._lock("image_tower", *args, **kwargs)

    def lock_text_tower(self, *args, **kwargs) -> None:
        """Freezes the text encoder as open_clip does (arguments as there); view codes and gates go on learning."""
        self._lock("text_tower", *args, **kwargs)

    def _lock(self, tower: str, *args, **kwargs) -> None:
        if self.library != "open_clip" or tower in self.own_towers:
            raise ValueError(
                f"lock_{tower} is for towers of open_clip, and this one is a {type(getattr(self, tower)).__name__}; "
                "freeze its parameters with requires_grad_(False)"
            )
        getattr(self.clip, f"lock_{tower}")(*args, **kwargs)

    def select_views(self, views: Sequence[int]) -> MVAM:
        """A copy that has only these learned views (0 … num_views − 1), in this order: shorter features, which are the
        corresponding pieces of this model's, normalised anew. The global view, if there is one, stays."""
        views = [int(view) for view in views]
        if not views or len(set(views)) < len(views) or not all(0 <= view < self.num_views for view in views):
            raise ValueError(
                f"views is {views}; it must name at least one of the views 0 to {self.num_views - 1}, each once"
            )
        model = copy.deepcopy(self)
        model.num_views = model._settings["num_views"] = len(views)
        for side in ("image", "text"):
            pool, projection = getattr(model, f"{side}_pool"), getattr(model, f"{side}_projection")
            pool.keep(views)
            if projection is not None:
                projection.keep(views)
            if self.global_view:
                gates = getattr(model, f"{side}_gates")
                setattr(model, f"{side}_gates", nn.Parameter(gates.detach()[views].clone()))
        return model

    @staticmethod
    def is_head(name: str) -> bool:
        """Whether the parameter of that name is MVAM's own (codes, key and view projections, gates), no encoder's."""
        return name.startswith(("image_pool.", "text_pool.", "image_projection.", "text_projection.")) or name in (
            "image_gates", "text_gates",
        )  # fmt: skip

    def no_weight_decay(self) -> set[str]:
        """Parameters that training should not decay: the encoder's own, the view codes and the gates."""
        spared = {name for name, _ in self.named_parameters() if name.endswith((".codes", "_gates"))}
        for name in ["clip", *self.own_towers]:
            spared |= {f"{name}.{inner}" for inner in towers.no_weight_decay(getattr(self, name))}
        return spared

    def save_config(self, folder: str | Path) -> None:
        """Writes the JSON files that say how to build the model: those that `from_pretrained` reads besides weights."""
        folder = Path(folder)
        encoders.write_config(folder, self.library, self.clip, self.open_clip_config)
        write_settings(folder, self._settings, {"library": self.library, "own_towers": self.own_towers})

    def save_pretrained(self, folder: str | Path, *, processor=None, image_processor=None, tokenizer=None) -> None:
        """Writes config and weights (safetensors) into `folder`; `from_pretrained` reads them back.

        For an encoder of open_clip, also the files by which transformers' AutoImageProcessor, AutoTokenizer and
        AutoProcessor read the folder, where such files can say what the model needs. For others give them:

        Args:
            processor, image_processor, tokenizer: objects of transformers that are written into the folder too, by
                their own `save_pretrained`.
        """
        given = {"processor": processor, "image_processor": image_processor, "tokenizer": tokenizer}
        given = {name: tool for name, tool in given.items() if tool is not None}
        for name, tool in given.items():
            if not hasattr(tool, "save_pretrained"):
                raise TypeError(f"{name} is {type(tool).__name__}, without save_pretrained; it must be of transformers")
        folder = Path(folder)
        self.save_config(folder)
        if self.library == "open_clip":
            hf_files.write_open_clip(folder, self.open_clip_config, self.own_towers)
        for tool in given.values():
            tool.save_pretrained(folder)
        write_weights(self, folder / WEIGHTS)

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        *,
        device: str | torch.device = "cpu",
        backend: str = "auto",
        image_tower: nn.Module | None = None,
        text_tower: nn.Module | None = None,
    ) -> MVAM:
        """The model that `save_pretrained` wrote, in float32 and in eval mode.

        `image_tower`, `text_tower`: towers of your own, as they were when the model was made. Their weights are read
        from the folder.
        """
        folder = Path(folder)
        if not folder.is_dir():
            raise FileNotFoundError(f"folder: no such folder: {folder}")
        settings = settings_of(folder)
        encoder = settings.pop("encoder")
        own = {"image_tower": image_tower, "text_tower": text_tower}
        given = [name for name, tower in own.items() if tower is not None]
        if given != encoder["own_towers"]:
            raise ValueError(
                f"folder: the model in {folder} has {_listed(encoder['own_towers'])} of its user's own, and "
                f"{_listed(given)} given to from_pretrained; it needs just those that the model has"
            )
        clip, open_clip_config = encoders.build(folder, encoder["library"])
        model = cls(clip, backend=backend, open_clip_config=open_clip_config, **own, **settings)
        load_weights(model, folder / WEIGHTS)
        return model.to(device).eval()


def _given(**inputs: Tensor | None) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in inputs.items() if tensor is not None}


def _listed(names: list[str]) -> str:
    return " and ".join(names) or "no tower"


def _set_checkpointing(module: nn.Module, enable: bool, name: str) -> None:
    if hasattr(module, "set_grad_checkpointing"):
        module.set_grad_checkpointing(enable)
        return
    for library_name in ("activation_checkpointing", "gradient_checkpointing"):  # transformers' newer one and older
        method = getattr(module, f"{library_name}_{'enable' if enable else 'disable'}", None)
        if method is not None:
            method(*([{"use_reentrant": False}] if enable else []))
            return
    raise ValueError(
        f"{name} is a {type(module).__name__} with neither set_grad_checkpointing nor gradient_checkpointing_enable"
    )
