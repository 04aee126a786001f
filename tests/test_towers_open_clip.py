"""open_clip's towers: inputs as transformers' tools give them, short texts, attention masks, and what version 4 brings.

tests/test_model.py tests what they compute.
"""
import open_clip
import pytest
import torch
from open_clip.hf_model import HFTextEncoder
from torch import nn
from transformers import RobertaConfig
from transformers.image_processing_base import BatchFeature
from transformers.tokenization_utils_base import BatchEncoding

from mvam_fast import MVAM, create_model_and_transforms, get_tokenizer
from mvam_fast.towers import TowerAdapter

NAME = "scenes-ViT-T-16"
IMAGES = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def tiny_clip(**overrides):
    torch.manual_seed(0)
    create_model_and_transforms(NAME, num_views=1)  # registers the config
    return open_clip.create_model(NAME, **overrides).eval()


@pytest.fixture(scope="module")
def token_ids():
    return get_tokenizer(NAME)(["a large red circle", "hi!"])


@pytest.mark.parametrize("custom_text", [False, True], ids=["CLIP", "CustomTextCLIP"])
def test_inputs_as_transformers_gives_them(custom_text, token_ids):
    model = MVAM(tiny_clip(force_custom_text=custom_text), num_views=2, global_view=True)
    assert isinstance(model.image_tower, TowerAdapter) and isinstance(model.text_tower, TowerAdapter)
    image, text = model.encode_image(IMAGES), model.encode_text(token_ids)
    assert torch.equal(model.encode_image(BatchFeature({"pixel_values": IMAGES})), image)
    assert torch.equal(model.get_image_features(pixel_values=IMAGES), image)
    lengths = token_ids.argmax(-1, keepdim=True) + 1
    mask = (torch.arange(token_ids.shape[1]) < lengths).long()
    assert torch.equal(model.encode_text(BatchEncoding({"input_ids": token_ids, "attention_mask": mask})), text)
    for all_right in (None, mask, torch.ones_like(mask)):  # what it says after the end changes nothing
        assert torch.equal(model.get_text_features(token_ids, all_right), text)
    mask[0, 1] = 0
    with pytest.raises(ValueError, match="attention_mask leaves out tokens before the end of the text"):
        model.get_text_features(token_ids, mask)
    with pytest.raises(ValueError, match="inputs holds pixel_values, spatial_shapes; this tower takes pixel_values"):
        model.get_image_features(IMAGES, spatial_shapes=torch.ones(2, 2))
    # Padded to the longest text only, by whatever comes after the end of the text.
    short = token_ids[:, :9].clone()
    short[1, lengths[1] :] = 49407
    torch.testing.assert_close(model.encode_text(short), text)
    with pytest.raises(ValueError, match="the texts have 25 tokens; this model reads up to 24"):
        model.encode_text(torch.ones(2, 25, dtype=torch.long))


def test_a_text_of_fixed_length_must_be_read_whole(token_ids):
    text = {"context_length": 24, "width": 96, "heads": 4, "layers": 1, "pool_type": "last", "no_causal_mask": True}
    model = MVAM(tiny_clip(text_cfg=text, force_custom_text=True), num_views=2)
    expected = model.encode_text(token_ids)
    assert torch.equal(model.get_text_features(token_ids, torch.ones_like(token_ids)), expected)
    with pytest.raises(ValueError, match="or of a text of fixed length"):
        model.get_text_features(token_ids, (token_ids != 0).long())


def test_an_hf_text_encoder_takes_the_mask_it_is_given():
    config = RobertaConfig(
        vocab_size=50, hidden_size=24, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    clip = tiny_clip(force_custom_text=True)
    clip.text = HFTextEncoder("roberta", 32, config=config, pooler_type="mean_pooler", proj_type="linear").eval()
    model = MVAM(clip, num_views=2, global_view=True)
    ids = torch.tensor([[0, 5, 6, 2, 1, 1], [0, 7, 2, 1, 1, 1]])  # 1 is RoBERTa's padding
    expected = model.encode_text(ids)
    assert torch.equal(model.get_text_features(ids, (ids != 1).long()), expected)
    mask = torch.tensor([[1, 1, 1, 0, 0, 0], [1, 1, 1, 0, 0, 0]])
    attention = model.text_attention({"input_ids": ids, "attention_mask": mask})
    assert (attention[..., 3:] == 0).all() and (attention[..., :3] > 0).all()


class ModernText(nn.Module):
    """Stands for open_clip 4's ModernTextTransformer: registers in front, padding known by its id, its own pool."""

    def __init__(self, norm: nn.Module, projected: bool, num_reg: int):
        super().__init__()
        self.width, self.num_reg, self.eos_id, self.pad_id = 16, num_reg, 49, 0
        self.token_embedding = nn.Embedding(50, self.width)
        self.reg_tokens = nn.Parameter(torch.randn(1, num_reg, self.width)) if num_reg else None
        self.blocks = nn.ModuleList([nn.Linear(self.width, self.width)])
        self.ln_final = norm
        self.text_projection = nn.Linear(self.width, 32) if projected else None

    def _encode_tokens(self, text, take_indices=None, stop_index=None):
        x = self.token_embedding(text)
        if self.num_reg:
            x = torch.cat([self.reg_tokens.expand(len(text), -1, -1), x], 1)
        return self.blocks[0](x), text != self.pad_id, []

    def pool(self, x, text, valid, eos_id):
        return x[torch.arange(len(text)), (text == eos_id).int().argmax(1)]

    def forward(self, text):
        x, valid, _ = self._encode_tokens(text)
        pooled = self.pool(self.ln_final(x)[:, self.num_reg :], text=text, valid=valid, eos_id=self.eos_id)
        return pooled if self.text_projection is None else self.text_projection(pooled)


@pytest.mark.parametrize(
    "norm, projected, num_reg", [(nn.RMSNorm(16), True, 2), (nn.LayerNorm(16), True, 0), (nn.LayerNorm(16), False, 3)]
)
def test_the_text_tower_of_open_clip_4(norm, projected, num_reg):
    clip = tiny_clip(force_custom_text=True)
    torch.manual_seed(0)
    nn.init.normal_(norm.weight)
    clip.text = ModernText(norm, projected, num_reg).eval()
    model = MVAM(clip, num_views=2, global_view=True)
    ids = torch.tensor([[1, 5, 6, 49, 0, 0], [1, 49, 0, 0, 0, 0]])
    views = model.encode_text(ids).unflatten(1, (3, -1))
    assert torch.equal(views[:, 1], clip.encode_text(ids))
    tokens = model.text_tower.tokens(ids, need_pooled=False)
    assert (tokens.norm is norm) == isinstance(norm, nn.LayerNorm) and tokens.hidden.shape == (2, 6, 16)
    attention = model.text_attention(ids)
    assert (attention.transpose(1, 2)[ids == 0] == 0).all() and (attention.transpose(1, 2)[ids != 0] > 0).all()
    assert torch.equal(model.get_text_features(ids, (ids != 0).long()), model.encode_text(ids))
    with pytest.raises(ValueError, match="attention_mask leaves out tokens"):
        model.get_text_features(ids, torch.zeros_like(ids))


def test_a_text_tower_of_a_shape_not_seen_yet_is_refused_by_name():
    clip = tiny_clip(force_custom_text=True)
    clip.text = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="the text tower is a Linear, which MVAM cannot read; it knows: TextTower"):
        MVAM(clip, num_views=1)
