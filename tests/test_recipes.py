"""The recipes can be loaded, their numbers agree with each other, and each has a baseline that differs in the views."""
import dataclasses
from pathlib import Path

import pytest

from mvam_fast.retrieval.config import read_config

RECIPES = Path(__file__).parents[1] / "recipes"
IMAGES = {"coco": 113_287, "flickr30k": 29_000}
NAMES = [f"{data}_{model}" for data in IMAGES for model in ("vit_b32", "vit_b16", "vit_l14")]


def load(name):
    config = read_config(RECIPES / f"{name}.yaml", {"data": "data.json", "images": "images", "out": "out"})
    config.check()
    return config


def test_no_recipe_is_without_its_twin():
    assert {path.stem for path in RECIPES.glob("*.yaml")} == {*NAMES, *(f"{name}_baseline" for name in NAMES)}


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_and_its_baseline(name):
    open_clip = pytest.importorskip("open_clip")
    recipe = load(name)
    assert load(f"{name}_baseline") == dataclasses.replace(recipe, views=0)
    assert recipe.views == 16 and recipe.global_view
    # OpenAI's weights under a name without their activation load with a warning, and give a worse model.
    assert recipe.model.endswith("-quickgelu")
    assert recipe.pretrained in open_clip.list_pretrained_tags_by_model(recipe.model)
    epoch = IMAGES[name.partition("_")[0]] // recipe.batch_size
    assert recipe.eval_every == recipe.save_every == epoch and recipe.steps % epoch == 0
    assert recipe.batch_size % recipe.accumulation_steps == 0 and recipe.warmup == recipe.steps // 10
    assert ("l14" in name) == recipe.grad_checkpointing
