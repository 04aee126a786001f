"""What a wheel installs, what importing needs, and what a missing package is told as."""
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    ignore = shutil.ignore_patterns(".venv", ".git", "runs", "build", "*.egg-info", "__pycache__", "tests")
    shutil.copytree(ROOT, source, ignore=ignore)  # a build leaves files in its source
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", folder, source],
        check=True,
    )
    (found,) = folder.glob("*.whl")
    return found


def test_nothing_else_lands_at_the_top(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"mvam_fast"}
    expected = (
        "mvam_fast/__init__.py", "mvam_fast/kernels/pool_forward.py", "mvam_fast/export/to_onnx.py",
        "mvam_fast/retrieval/training/train.py", "mvam_fast/retrieval/evaluation/published.json",
        "mvam_fast/serving/encoder.py", "mvam_fast/configs/scenes-ViT-T-16.json",
    )  # fmt: skip
    assert set(expected) <= set(names)
    (entry,) = (name for name in names if name.endswith("entry_points.txt"))
    assert "mvam-fast = mvam_fast.cli:main" in zipfile.ZipFile(wheel).read(entry).decode()


BLOCKED = """
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        blocked = {"triton", "open_clip", "safetensors", "onnx", "onnxruntime", "tqdm", "PIL", "matplotlib"}
        if name.partition(".")[0] in blocked:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Blocker())
"""


def run_with(wheel, tmp_path, code):
    """The code, with the wheel installed and neither the checkout nor the optional packages in reach."""
    site = tmp_path / "site"
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", site, wheel], check=True)
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "TRITON_INTERPRET")}
    # Beneath site, and with the checkout's own (editable) finder taken off the path hooks.
    start = f"import sys; sys.path.insert(0, {str(site)!r}); sys.meta_path[:] = [f for f in sys.meta_path if "
    start += "'editable' not in str(f) and '_mvam_dev' not in str(f)]\n"
    return subprocess.run(
        [sys.executable, "-c", start + code], capture_output=True, text=True, cwd=tmp_path, env=environment
    )


def test_importing_needs_torch_alone(wheel, tmp_path):
    done = run_with(wheel, tmp_path, BLOCKED + """
import torch, mvam_fast
assert "site" in mvam_fast.__file__, mvam_fast.__file__
tokens, codes = torch.randn(2, 5, 8, requires_grad=True), torch.randn(3, 8)
pooled, gram = mvam_fast.multi_view_pool(tokens, codes)
(pooled.sum() + mvam_fast.diversity_loss(gram)).backward()
mvam_fast.MultiViewPool(8, 4)(tokens)
messages = []
for make in (
    lambda: mvam_fast.create_model_and_transforms("ViT-B-32"),
    lambda: mvam_fast.MVAMLoss(),
    lambda: mvam_fast.get_tokenizer("ViT-B-32"),
):
    try:
        make()
    except ImportError as error:
        messages.append(str(error))
assert len(messages) == 3, messages
assert all("pip install 'mvam_fast[train]'" in m and "open_clip" in m for m in messages), messages
try:
    mvam_fast.multi_view_pool(tokens.cuda() if torch.cuda.is_available() else tokens, codes, backend="triton")
except ValueError as error:
    print(error)
import mvam_fast.export.to_onnx, mvam_fast.serving
try:
    mvam_fast.export.to_onnx.export_bundle("a", "b")
except ImportError as error:
    assert "pip install 'mvam_fast[export]'" in str(error)
print("fine")
""")
    assert done.returncode == 0, done.stderr[-2000:]
    assert "asks for triton, which cannot run here" in done.stdout and done.stdout.endswith("fine\n")


def test_neighbours_import_from_the_checkout():
    """Other libraries look for packages named "kernels" or "export": the folders here must not be taken for them."""
    code = "import open_clip, transformers, timm; import mvam_fast.kernels.tiles, mvam_fast.export.bundle"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def test_a_package_that_is_there_but_broken_is_told_so(tmp_path, monkeypatch):
    from mvam_fast._optional import require

    (tmp_path / "halfway.py").write_text("import not_there_at_all")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ImportError, match="'halfway' here, which is installed but fails to import .*not_there_at_all"):
        require("halfway", extra="train")
    with pytest.raises(ImportError, match=r"'nowhere' here, which is not installed; .* pip install 'mvam_fast\[trt\]'"):
        require("nowhere.module", extra="trt")
