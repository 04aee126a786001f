"""Settings of a training: the file, the flags over it, and what is refused."""
import dataclasses
from pathlib import Path

import pytest

from mvam_fast.retrieval.training.config import TrainConfig, read_config


def written(tmp_path, text):
    path = tmp_path / "config.yaml"
    path.write_text(text)
    return path


def test_the_file_is_read_and_flags_override_it(tmp_path):
    path = written(tmp_path, "data: d.json\nlr: 1e-4\nviews: 8\nglobal_view: true\nview_dim:\nema: 0\n")
    config = read_config(path, {"views": 4, "out": "o"})
    assert config == TrainConfig(data="d.json", lr=1e-4, views=4, global_view=True, out="o", ema=0.0)
    assert isinstance(config.lr, float) and isinstance(config.ema, float)  # YAML calls 1e-4 a string and 0 an integer
    assert read_config(None, {}) == TrainConfig()
    assert read_config(written(tmp_path, ""), {}) == TrainConfig()


@pytest.mark.parametrize(
    "text, message",
    [
        ("vews: 8", "has the key 'vews', which there is not; did you mean views"),
        ("views: eight", "has views: 'eight'; it must be a int"),
        ("lr: fast", "has lr: 'fast'; it must be a float"),
        ("steps: 1.5", "has steps: 1.5; it must be a int"),
        ("global_view: 1", "has global_view: 1; it must be a bool"),
        ("steps:", "has steps: None; it must be a int"),
        ("- views", "holds a list"),
        ("a: b: c", "is not valid YAML"),
    ],
)
def test_a_wrong_file_is_named(text, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        read_config(written(tmp_path, text), {})
    with pytest.raises(FileNotFoundError, match="config: no such file"):
        read_config(tmp_path / "none.yaml", {})


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"data": ""}, "data is not given; it must be, in the file or as --data"),
        ({"accumulation_steps": 0}, "accumulation_steps is 0; it must be at least 1"),
        ({"warmup": -1}, "warmup is -1; it must be at least 0"),
        ({"ema": 1.0}, "ema is 1.0; it must be in"),
        ({"early_stopping": 3}, "early_stopping is 3, but eval_every is 0"),
        ({"precision": "int8"}, "precision is 'int8'; it must be one of fp32"),
        ({"accumulation": "mean"}, "accumulation is 'mean'; it must be one of cached, separate"),
        ({"diversity_schedule": "cosine"}, "diversity_schedule is 'cosine'; it must be one of constant"),
        ({"device": "tpu"}, "device is 'tpu'; it must be one of auto"),
    ],
)
def test_wrong_settings_are_named(changes, message):
    config = TrainConfig(data="d", out="o")
    config.check()
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(config, **changes).check()


def test_every_setting_is_documented():
    assert all(field.metadata["help"] for field in dataclasses.fields(TrainConfig))


def test_the_page_documents_every_setting():
    """docs/training.md has the row of each, with its default and its help text."""
    page = (Path(__file__).parents[1] / "docs/training.md").read_text(encoding="utf-8")
    rows = {line.split("`")[1]: line for line in page.splitlines() if line.startswith("| `") and line.count("|") == 4}
    fields = {field.name: field for field in dataclasses.fields(TrainConfig)}
    assert fields.keys() <= rows.keys()
    for name, field in fields.items():
        _, _, default, text, _ = (part.strip() for part in rows[name].split("|"))
        shown = "none" if field.default is None else str(field.default)
        shown = shown.lower() if isinstance(field.default, bool) else shown
        assert default == ("" if field.metadata.get("required") else shown), name
        assert text == field.metadata["help"]
