"""An "aoti" bundle: towers that AOTInductor compiled for the CPU or for CUDA."""
from __future__ import annotations

import platform
from pathlib import Path

import torch
from torch import Tensor

# Instructions that a compiler uses where it may use all that the CPU has, as AOTInductor lets it.
_INSTRUCTIONS = ("avx", "amx", "fma", "f16c", "bmi", "sse4", "sve", "asimd", "vaes", "gfni")


def cpu_here() -> dict:
    """What a package that is compiled here may take for granted: {"machine", "instructions"}."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        text = ""
    line = next((line for line in text.splitlines() if line.lower().startswith(("flags", "features"))), "")
    found = sorted(flag for flag in line.partition(":")[2].split() if flag.startswith(_INSTRUCTIONS))
    return {"machine": platform.machine(), "instructions": found}


class AotiRunner:
    """The bundle's .pt2 packages.

    `captured`: CUDA graphs will be recorded of its calls, which then come one at a time; the package's own locking
    would ask the GPU for events, which a capture forbids.
    """

    def __init__(self, bundle: Path, manifest: dict, device: torch.device, *, captured: bool = False):
        from torch._inductor import aoti_load_package  # a second

        reason = _obstacle(manifest.get("compiled_for", {}), device)
        if reason:
            raise RuntimeError(f"{bundle} was compiled for another machine: {reason}; export it here")
        self.device, self._towers = device, {}
        index = -1 if device.type == "cpu" else device.index
        for tower, entry in manifest["towers"].items():
            path = bundle / entry["file"]
            try:
                self._towers[tower] = aoti_load_package(str(path), run_single_threaded=captured, device_index=index)
            except Exception as error:
                made_with = manifest.get("versions", {}).get("torch", "an unknown version")
                raise RuntimeError(
                    f"{path} was compiled with torch {made_with} and does not load with {torch.__version__}: {error}"
                ) from error

    def run(self, tower: str, inputs: Tensor) -> Tensor:
        return self._towers[tower](inputs)

    def close(self) -> None:
        self._towers = {}


def _obstacle(compiled_for: dict, device: torch.device) -> str:
    """Why what was `compiled_for` one machine cannot run here, where the attempt could end the process; or ""."""
    if device.type == "cuda":
        here = "compute capability {}.{}".format(*torch.cuda.get_device_capability(device))
        there = f"compute capability {compiled_for.get('compute_capability')}"
        fits = "compute_capability" not in compiled_for or here == there
        return "" if fits else f"it needs {there}, here is {here}"
    here = cpu_here()
    machine = compiled_for.get("machine", here["machine"])
    if machine != here["machine"]:
        return f"it needs {machine}, here is {here['machine']}"
    missing = sorted(set(compiled_for.get("instructions", ())) - set(here["instructions"]))
    return f"it needs the instructions {', '.join(missing)}" if missing else ""
