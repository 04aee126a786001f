"""Everything that needs a CUDA GPU, in one go, within a time budget, without a network.

    python3 benchmarks/gpu_suite.py [--minutes 9] [--wheels FOLDER] [--out FOLDER] [--only STAGE ...]
    make gpu MINUTES=9 WHEELS=FOLDER ARGS="--only kernels --shapes vit-b-16"

Stages, the most important first: `tests` (the kernels, not interpreted), `kernels`, `encoders`, `tune` (a launch table
for this GPU), `profile` (Nsight Compute, where there is one). The interpreter needs PyTorch and triton of its own; the
package and the wheels (of what PACKAGES names and it lacks) go into .venv-gpu/. Each stage writes its JSON into FOLDER
as it goes; started again, the suite goes on where it stopped. Exit code: 1 if a stage or a test failed, 2 for a wrong
argument, 3 without a GPU.
"""
from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import bootstrap  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
ENVIRONMENT = ROOT / ".venv-gpu"
BEGAN = "MVAM_GPU_SUITE_BEGAN"  # time.monotonic() at the start, handed on to the suite in its environment
SHARES = {"tests": 38, "kernels": 27, "encoders": 17, "tune": 8, "profile": 10}
# What a few minutes are enough for; the rest by --shapes, --batch, --views, --providers.
KERNELS = {
    "shapes": ["vit-b-16", "vit-l-14-336", "text-512", "so400m-14-384"], "batch": [256], "views": [16],
    "providers": ["naive", "compile", "sdpa", "triton", "norm-naive", "norm-compile", "norm-triton"],
}  # fmt: skip
PACKAGES = {  # besides PyTorch and triton
    "tests": ("pytest", "hypothesis"), "kernels": ("tqdm", "matplotlib"),
    "encoders": ("open_clip", "safetensors", "tqdm", "matplotlib"), "tune": ("tqdm",), "profile": ("tqdm",),
}  # fmt: skip
WRONG_ARGUMENT, NO_GPU = 2, 3


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=9.0, help="time budget (default: %(default)s)")
    parser.add_argument("--only", nargs="+", choices=SHARES, default=list(SHARES), metavar="STAGE",
                        help=f"of {', '.join(SHARES)} (default: all)")  # fmt: skip
    parser.add_argument("--out", type=Path, help="folder (default: benchmarks/results/DATE_DEVICE_COMMIT)")
    parser.add_argument("--wheels", type=Path, help="folder of wheels to install, such as open_clip's")
    for name, value in KERNELS.items():
        number = {"type": int} if isinstance(value[0], int) else {}
        told = f"of the stage kernels, as throughput.py takes it (default: {' '.join(map(str, value))})"
        parser.add_argument(f"--{name}", nargs="+", default=value, help=told, **number)
    options = parser.parse_args(arguments)
    if options.minutes <= 0:
        parser.error(f"--minutes {options.minutes}: it must be more than 0")
    if options.wheels and not options.wheels.is_dir():
        parser.error(f"--wheels {options.wheels}: no such folder")
    return options


def without_gpu() -> str:
    """What is missing for this suite in this interpreter; empty if nothing is."""
    if importlib.util.find_spec("torch") is None:
        return f"PyTorch is not installed in {sys.executable}; name another interpreter: make gpu PYTHON=..."
    import torch

    if not torch.cuda.is_available():
        return f"no CUDA GPU: PyTorch {torch.__version__} of {sys.executable} sees none"
    if importlib.util.find_spec("triton") is None:
        return f"triton is not installed in {sys.executable}"
    return ""


def stages_of(options: argparse.Namespace) -> list:
    """What was asked for, in the order of importance; commands as from the repository's root."""
    from machine import SOURCES, source_sha256
    from stages import FOLDER, Stage

    def script(name: str, *arguments: str) -> tuple[str, ...]:
        return (f"benchmarks/{name}", *arguments)

    out = ("--out", FOLDER, "--resume")
    chosen = [word for name in KERNELS for word in (f"--{name}", *map(str, getattr(options, name)))]
    commands = {
        "tests": (script("gpu_tests.py", *out), "tests.json"),
        "kernels": (script("throughput.py", *chosen, *out), "throughput.json"),
        "encoders": (script("encoders.py", *out), "encoders.json"),
        "tune": (script("tune.py", "--out", f"{FOLDER}/launch_table.json"), "launch_table.json"),
        "profile": (script("ncu.py", *out), "profile.json"),
    }
    skip = {}
    for name, packages in PACKAGES.items():
        missing = [package for package in packages if importlib.util.find_spec(package) is None]
        if missing:
            skip[name] = f"{', '.join(missing)} not installed; give the wheels by --wheels FOLDER"
    if shutil.which("ncu") is None:
        skip["profile"] = "ncu (Nsight Compute) is not on the PATH"
    sources = {"tests": source_sha256((*SOURCES, "tests"))}
    return [
        Stage(name, *commands[name], SHARES[name], sources.get(name) or source_sha256(), skip.get(name, ""))
        for name in SHARES
        if name in options.only
    ]


def report(path: Path) -> tuple[str, list[str]]:
    """One line on a result file, and the names of what failed in it."""
    result = json.loads(path.read_text())
    rows = result["rows"]
    if result.get("kind") == "tests":
        from gpu_tests import counts, failures

        return counts(rows), failures(rows)
    return f"{len(rows)} rows" + ("" if result.get("complete", True) else ", not complete"), []


def main(arguments: list[str] | None = None) -> int:
    began = float(os.environ.pop(BEGAN, time.monotonic()))
    options = parse(arguments)
    missing = without_gpu()
    if missing:
        print(f"gpu_suite.py: {missing}", file=sys.stderr)
        return NO_GPU
    here = Path(sys.prefix).resolve() == ENVIRONMENT.resolve()
    if not here and (options.wheels or not bootstrap.importable(ROOT)):
        python = bootstrap.prepare(ROOT, ENVIRONMENT, options.wheels)
        words = sys.argv[1:] if arguments is None else arguments
        os.environ[BEGAN] = str(began)
        os.execv(python, [str(python), __file__, *words])
    if not bootstrap.importable(ROOT):
        sys.exit(f"mvam_fast does not import from {ROOT} in {ENVIRONMENT}; remove that folder and start again")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that a stage under way is ended
    os.environ.pop("TRITON_INTERPRET", None)
    return run(options, began)


def run(options: argparse.Namespace, began: float) -> int:
    import results
    import torch
    from machine import machine
    from shapes import SHAPES
    from stages import Suite

    unknown = sorted(set(options.shapes) - SHAPES.keys())
    if unknown:
        print(f"gpu_suite.py: --shapes {' '.join(unknown)}: there are {', '.join(SHAPES)}", file=sys.stderr)
        return WRONG_ARGUMENT
    about = machine(torch.device("cuda"))
    folder = (options.out or results.folder_of(about)).resolve()
    settings = {"minutes": options.minutes, "only": options.only}
    suite = Suite(folder, about, settings, report)
    os.chdir(ROOT)
    suite.run(stages_of(options), began + 60 * options.minutes)
    print(suite.summary(options.only))
    return int(suite.failed(options.only))


if __name__ == "__main__":
    sys.exit(main())
