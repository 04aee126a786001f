"""Packaging. kernels/ and export/ install as mvam_fast.kernels and mvam_fast.export, never at the top level."""
import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (ROOT / "mvam_fast/version.py").read_text())[1]

TRAIN = [
    "open_clip_torch>=3.0", "safetensors>=0.4", "pillow>=9", "tqdm>=4.60", "matplotlib>=3.7", "accelerate>=1.0",
    "pyyaml>=6", "tensorboard>=2.14",
]  # fmt: skip
# onnxruntime and onnxruntime-gpu are one module under two names; the GPU build also runs on the CPU.
EXPORT = [
    *TRAIN,
    "onnx>=1.17",
    "onnxscript>=0.3",
    "onnxruntime-gpu>=1.20; sys_platform == 'linux' and platform_machine == 'x86_64'",
    "onnxruntime>=1.20; sys_platform != 'linux' or platform_machine != 'x86_64'",
]
EXTRAS = {
    "train": TRAIN,
    "hf": [*TRAIN, "transformers>=4.57"],
    "export": EXPORT,
    "trt": [*EXPORT, "tensorrt>=10.12,!=10.14.*,<12"],
    # What open_clip's own training loop reads its data with.
    "scale": [*TRAIN, "pandas>=2", "webdataset>=0.2.80", "fsspec>=2023.1"],
    "dev": [
        *EXPORT, "timm>=1.0.17", "transformers>=4.57", "pytest>=8", "pytest-xdist>=3.5", "hypothesis>=6.100",
        "jsonschema>=4.18", "tritonclient[grpc]>=2.40", "pandas>=2", "webdataset>=0.2.80", "ruff>=0.6",
        "setuptools>=70", "wheel",
    ],
}

setup(
    name="mvam_fast",
    version=VERSION,
    description="Multi-view attention pooling (MVAM) for CLIP-like models: fused Triton kernels, training, ONNX export",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    # triton comes with torch's own Linux builds; elsewhere the plain PyTorch path runs.
    install_requires=["torch>=2.6", "numpy>=1.24"],
    extras_require=EXTRAS,
    packages=[*find_packages(include=["mvam_fast", "mvam_fast.*"]), "mvam_fast.kernels", "mvam_fast.export"],
    package_dir={"mvam_fast.kernels": "kernels", "mvam_fast.export": "export"},
    package_data={"mvam_fast": ["configs/*.json", "retrieval/evaluation/*.json"]},
    entry_points={"console_scripts": ["mvam-fast = mvam_fast.cli:main"]},
)
