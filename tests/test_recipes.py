"""The recipes can be loaded, their numbers agree with each other, and each has a baseline that differs in the views."""
import dataclasses
import sys
from pathlib import Path

import pytest

from mvam_fast.retrieval.training.config import TrainConfig, read_config

RECIPES = Path(__file__).parents[1] / "recipes"
IMAGES = {"coco": 113_287, "flickr30k": 29_000}
NAMES = [f"{data}_{model}" for data in IMAGES for model in ("vit_b32", "vit_b16", "vit_l14")]


def load(name):
    config = read_config(RECIPES / f"{name}.yaml", {"data": "data.json", "images": "images", "out": "out"})
    config.check()
    return config


def test_no_recipe_is_without_its_twin():
    names = ["scenes", *NAMES]
    assert {path.stem for path in RECIPES.glob("*.yaml")} == {*names, *(f"{name}_baseline" for name in names)}


def test_the_recipe_of_the_scenes_has_the_settings_that_were_measured():
    """Those of the ablation, but for its logs and checkpoints, where the two are as wide."""
    sys.path.insert(0, str(RECIPES.parent / "benchmarks"))
    try:
        from ablation_cells import BASE, MVAM, POOLINGS
    finally:
        sys.path.pop(0)
    free = {"data", "images", "out", "seed", "device", "tensorboard", "eval_every", "save_every"}
    for name, label in (("scenes", MVAM), ("scenes_baseline", "class / end token")):
        measured = {**BASE, **POOLINGS[label], "lr": 5e-4, "steps": 1600}
        recipe = dataclasses.asdict(load(name))
        default = dataclasses.asdict(TrainConfig())
        assert {k: v for k, v in recipe.items() if k not in free} == {
            k: measured.get(k, default[k]) for k in recipe if k not in free
        }


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
