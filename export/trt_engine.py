"""What a bundle says of its engines, and whether they can run here. Kept in the manifest under "engines":

    built_on     {"gpu", "compute_capability", "tensorrt", "cuda", "driver", "platform"}
    settings     as `trt_settings.Settings.resolved` gives them, profiles included
    onnx         {name: SHA-256} of the files that the engines were built from
    graphs       {tower: name of its ONNX file}; with settings.strip, the weights come from there
    build_seconds, latency    per tower; latency per batch size, with CUDA graphs
"""
from __future__ import annotations

from mvam_fast.export.trt_library import numbers, unsupported
from mvam_fast.export.trt_settings import Profile

_KEYS = {
    "built_on": ("gpu", "compute_capability", "tensorrt", "platform"),
    "settings": ("profiles", "hardware_compatibility", "version_compatible", "refit", "strip"),
    "graphs": (),
}
_REBUILD = "build it here: python export/to_trt.py"


def engines_of(manifest: dict) -> dict:
    """manifest["engines"]; ValueError where it lacks what running the engines needs."""
    engines = manifest.get("engines") or {}
    lacking = [f"engines.{key}" for key in _KEYS if key not in engines]
    lacking += [f"engines.{key}.{name}" for key in _KEYS for name in _KEYS[key] if name not in engines.get(key, {name})]
    if lacking:
        raise ValueError(f"bundle: its bundle.json lacks {', '.join(lacking)}")
    return engines


def profiles_of(engines: dict) -> tuple[Profile, ...]:
    return tuple(Profile(**profile) for profile in engines["settings"]["profiles"])


def check_engine(engines: dict, here: dict) -> str:
    """Why engines with this description cannot run `here` (see `trt_library.here`); empty if they can."""
    built, settings = engines["built_on"], engines["settings"]
    if built["platform"] != here["platform"]:
        return f"the engines were built on {built['platform']}, this is {here['platform']}; {_REBUILD}"
    reason = unsupported(here["tensorrt"]) or _version(built, here, settings["version_compatible"])
    return reason or _hardware(built, here, settings["hardware_compatibility"])


def _version(built: dict, here: dict, compatible: bool) -> str:
    if built["tensorrt"] == here["tensorrt"]:
        return ""
    told = f"the engines were built by TensorRT {built['tensorrt']}, here is {here['tensorrt']}"
    if not compatible:
        hint = "--version-compatible makes engines for later versions too"
        return f"{told}; install that version, or {_REBUILD} ({hint})"
    if numbers(here["tensorrt"]) < numbers(built["tensorrt"]):
        return f"{told}: version-compatible engines run on the same or a later version; {_REBUILD}"
    return ""


def _hardware(built: dict, here: dict, compatibility: str) -> str:
    told = f"the engines were built for {built['gpu']} ({built['compute_capability']}), here is {here['gpu']}"
    told += f" ({here['compute_capability']})"
    if compatibility == "ampere+":
        fits = numbers(here["compute_capability"]) >= (8, 0)
        return "" if fits else f"{told}; they need compute capability 8.0 or higher"
    if compatibility == "same":
        fits = here["compute_capability"] == built["compute_capability"]
        return "" if fits else f"{told}; they need the same compute capability; {_REBUILD}"
    fits = here["gpu"] == built["gpu"]
    hint = "--hardware-compatibility same or ampere+ makes engines for other GPUs too"
    return "" if fits else f"{told}; {_REBUILD} ({hint})"
