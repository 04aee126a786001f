"""NVIDIA's own TensorRT bindings without TensorRT's libraries: what of the API there is, checked without a GPU.

The wheels `tensorrt-cu12-bindings` hold the extension module and the Python code of `tensorrt.plugin`. The module needs
nine C functions of the libraries to load; here these are compiled to return null. So enums, classes, signatures and the
validation of plugins are genuine, and whatever needs the libraries (`trt.Builder`, the plugin registry) fails as it
would for a caller whose TensorRT is broken. Nothing built with this is an engine.

    folder = bindings("10.16.1.11")            a Path, or a str: the reason why there are none here
    stdout = run_with("11.4.0.106", code)      skips the test for that reason; in `code`, `import tensorrt` works

Wheels are fetched by pip once and kept in pytest's cache, which git ignores: they are NVIDIA's, not this project's.
"""
from __future__ import annotations

import functools
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import pytest

# The first that is supported, one between, and the newest; 11 renumbered enums and removed much.
VERSIONS = ("10.13.3.9", "10.16.1.11", "11.4.0.106")
_ROOT = Path(__file__).resolve().parent.parent
_CACHE = _ROOT / ".pytest_cache" / "d" / "trt_bindings"  # where pytest's cache.mkdir puts folders
_LIBRARIES = ("nvinfer", "nvinfer_plugin", "nvonnxparser")
_SYMBOLS = """
    createInferBuilder_INTERNAL createInferRefitter_INTERNAL createInferRuntime_INTERNAL createNvOnnxParser_INTERNAL
    createNvOnnxParserRefitter_INTERNAL getBuilderPluginRegistry getPluginRegistry getNvOnnxParserVersion
    initLibNvInferPlugins
""".split()

# For code that registers plugins: `tensorrt.plugin` asks for a registry, which is the libraries'. This one keeps what
# it is given in `CREATORS`, {(namespace, name): creator}.
REGISTRY = """
import tensorrt
CREATORS = {}
class _Registry:
    def register_creator(self, creator, namespace):
        CREATORS[namespace, creator.name] = creator
    def get_creator(self, name, version, namespace):
        return CREATORS.get((namespace, name))
tensorrt.get_plugin_registry = _Registry
"""


@functools.cache
def bindings(version: str) -> Path | str:
    """The folder that makes `import tensorrt` this version's bindings; a str says why there is none."""
    found = _CACHE / f"{version}-{sys.implementation.cache_tag}"
    if found.is_dir():
        return found
    compiler = shutil.which(os.environ.get("CC", "cc"))
    if not sys.platform.startswith("linux"):
        return f"TensorRT's bindings are tested on Linux, not on {sys.platform}"
    if compiler is None:
        return "no C compiler to build the stand-ins of TensorRT's libraries"
    _CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=_CACHE) as temporary:
        temporary = Path(temporary)
        reason = _download(version, temporary)
        if reason:
            return reason
        (wheel,) = temporary.glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(temporary / "wheel")
        # Under the name that users import, and that its own modules import.
        package = (temporary / "wheel" / "tensorrt_bindings").rename(temporary / "wheel" / "tensorrt")
        reason = _stand_ins(compiler, version.partition(".")[0], package)
        if reason:
            return reason
        try:
            (temporary / "wheel").rename(found)
        except OSError:  # another process was first
            if not found.is_dir():
                raise
    return found


def _download(version: str, folder: Path) -> str:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--only-binary", ":all:", "--timeout", "20", "--retries", "1", "--dest", str(folder)]
    try:
        done = subprocess.run(
            [*command, f"tensorrt-cu12-bindings=={version}"], capture_output=True, text=True, timeout=180
        )
    except subprocess.TimeoutExpired:
        return f"tensorrt-cu12-bindings {version} did not download within three minutes"
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        return f"tensorrt-cu12-bindings {version} cannot be downloaded here: {last}"
    return ""


def _stand_ins(compiler: str, major: str, package: Path) -> str:
    """Puts libraries of null-returning functions beside the extension module, which looks for them there."""
    source = package / "stand_ins.c"
    source.write_text("".join(f"void *{symbol}(void) {{ return 0; }}\n" for symbol in _SYMBOLS))
    first = package / f"lib{_LIBRARIES[0]}.so.{major}"
    done = subprocess.run(
        [compiler, "-shared", "-fPIC", "-o", str(first), str(source)], capture_output=True, text=True
    )
    if done.returncode:
        return f"{compiler} does not build a library: {done.stderr.strip()[-200:]}"
    for library in _LIBRARIES[1:]:
        shutil.copy(first, package / f"lib{library}.so.{major}")
    return ""


def environment(folder: Path) -> dict[str, str]:
    """The environment of a process in which `import tensorrt` is what `bindings` returned."""
    environment = dict(os.environ)
    for name, path in (("PYTHONPATH", folder), ("LD_LIBRARY_PATH", folder / "tensorrt")):
        environment[name] = os.pathsep.join(filter(None, (str(path), environment.get(name))))
    return environment


def run_with(version: str, code: str, *, timeout: float = 300, **variables: str) -> str:
    """The stdout of `code` in a process whose `tensorrt` is this version's bindings; `variables` are its environment's.

    Skips the calling test where there are no bindings, and fails it where the code does.
    """
    folder = bindings(version)
    if isinstance(folder, str):
        pytest.skip(f"not run: {folder}")
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=timeout, cwd=_ROOT,
        env={**environment(folder), **variables},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout
