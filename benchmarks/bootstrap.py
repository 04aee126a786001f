"""An environment for a machine that has PyTorch but not this package, and no network.

A virtual environment that sees the packages of the interpreter it was made from, with this checkout installed into it
(kernels/ and export/ are subpackages only once installed) and the wheels of a folder. The standard library only.
"""
from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path


def importable(root: Path) -> bool:
    """Whether mvam_fast and its kernels come from this checkout here."""
    try:
        found = importlib.util.find_spec("mvam_fast.kernels")
    except ImportError:
        return False
    return found is not None and found.origin is not None and Path(found.origin).resolve().is_relative_to(root)


def python_of(folder: Path) -> Path:
    return folder / "bin" / "python"


def prepare(root: Path, folder: Path, wheels: Path | None) -> Path:
    """The interpreter of the environment in `folder`, which is made, or made again if something in it has changed."""
    packages = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    found = wheels_of(wheels)
    # Paths are enough: the parent may itself be a virtual environment, which --system-site-packages would not reach.
    state = {"python": sys.version, "packages": packages, "root": str(root), "wheels": [path.name for path in found]}
    stamp = folder / "prepared.json"
    if stamp.exists() and json.loads(stamp.read_text()) == state:
        return python_of(folder)
    # pip comes with the parent's packages; ensurepip is missing on some systems.
    _run([sys.executable, "-m", "venv", "--clear", "--without-pip", folder])
    (site,) = folder.glob("lib/python3*/site-packages")
    (site / "parent.pth").write_text("".join(f"{path}\n" for path in packages))
    pip = [python_of(folder), "-m", "pip", "install", "--quiet", "--no-index", "--no-deps"]
    if found:
        _run([*pip, "--upgrade", *found])
    _run([*pip, "--no-build-isolation", "--editable", root])
    stamp.write_text(json.dumps(state))
    return python_of(folder)


def wheels_of(folder: Path | None) -> list[Path]:
    if folder is None:
        return []
    found = sorted(folder.glob("*.whl"))
    if not found:
        sys.exit(f"--wheels {folder}: there is no wheel in it")
    return found


def _run(command: list) -> None:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(str(part) for part in command)} failed:\n{done.stdout}{done.stderr}".strip())
