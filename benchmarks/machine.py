"""What numbers were measured on and with: device, driver, clocks, versions, commit, date."""
from __future__ import annotations

import hashlib
import importlib.metadata
import os
import platform
import subprocess
import sys
from datetime import datetime, timezone
from pathlib import Path

import torch

from mvam_fast.version import __version__

ROOT = Path(__file__).parent.parent
PACKAGES = ("triton", "numpy", "open_clip_torch", "timm", "transformers", "onnx", "onnxruntime-gpu", "onnxruntime")
SOURCES = ("kernels", "mvam_fast", "benchmarks", "export")
CLOCKS = {  # nvidia-smi's name: ours
    "clocks.sm": "sm_mhz", "clocks.mem": "memory_mhz", "clocks.max.sm": "sm_max_mhz", "power.draw": "watts",
    "temperature.gpu": "celsius",
}  # fmt: skip


def machine(device: torch.device) -> dict:
    """The facts, as a result file keeps them."""
    commit, changed = _commit()
    found = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name(),
        "kind": device.type, "threads": torch.get_num_threads(), "cores": os.cpu_count(),
        "system": f"{platform.system()} {platform.machine()}", "python": platform.python_version(),
        "torch": torch.__version__, "mvam_fast": __version__, "packages": _packages(),
        "commit": commit, "uncommitted_changes": changed, "source_sha256": source_sha256(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"), "cache_bytes": cache_bytes(device),
    }  # fmt: skip
    if device.type == "cuda":
        about = torch.cuda.get_device_properties(device)
        found |= {
            "driver": _nvidia_smi(device, ["driver_version"]).get("driver_version"), "cuda": torch.version.cuda,
            "capability": f"{about.major}.{about.minor}", "multiprocessors": about.multi_processor_count,
            "memory_bytes": about.total_memory,
        }  # fmt: skip
    return found


def clocks(device: torch.device) -> dict[str, float]:
    """Clock rates (MHz), power and temperature now; what the system does not tell is left out."""
    if device.type == "cuda":
        told = {CLOCKS[name]: value for name, value in _nvidia_smi(device, list(CLOCKS)).items()}
        return {name: float(value) for name, value in told.items() if value.replace(".", "", 1).isdigit()}
    rates = [float(line.split(":")[1]) for line in _cpuinfo() if line.startswith("cpu MHz")]
    return {"cpu_mhz": sum(rates) / len(rates)} if rates else {}


def clocks_between(before: dict[str, float], after: dict[str, float]) -> dict[str, list[float]]:
    """What `clocks` told before and after a measurement, side by side."""
    return {name: [before[name], after[name]] for name in before if name in after}


def cache_bytes(device: torch.device) -> int:
    """The last-level cache: L2 of a GPU, L3 of a CPU (32 MiB where the system does not tell)."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    told = Path("/sys/devices/system/cpu/cpu0/cache/index3/size")
    text = told.read_text().strip() if told.exists() else "32768K"
    return int(text.rstrip("KM")) << (20 if text.endswith("M") else 10)


def source_sha256(folders: tuple[str, ...] = SOURCES) -> str:
    """Of all Python files that a measurement runs: says that two runs measured the same code, whatever the commit."""
    digest = hashlib.sha256()
    for folder in folders:
        for path in sorted((ROOT / folder).rglob("*.py")):
            digest.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def _commit() -> tuple[str, bool | None]:
    """Commit and whether files differ from it. Where the tree came without its .git, MVAM_COMMIT may name it."""
    head = _git("rev-parse", "HEAD")
    if head is None:
        return os.environ.get("MVAM_COMMIT", "not a checkout"), None
    return head, bool(_git("status", "--porcelain", "--untracked-files=no"))


def _git(*arguments: str) -> str | None:
    try:
        found = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return found.stdout.strip() if found.returncode == 0 else None


def _packages() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _nvidia_smi(device: torch.device, fields: list[str]) -> dict[str, str]:
    """What nvidia-smi answers for each field; {} where there is none or it fails."""
    uuid = torch.cuda.get_device_properties(device).uuid  # an index would be another GPU's under CUDA_VISIBLE_DEVICES
    command = ["nvidia-smi", f"--id=GPU-{uuid}", f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return {}
    values = [value.strip() for value in found.stdout.strip().split(",")]
    return dict(zip(fields, values, strict=True)) if found.returncode == 0 and len(values) == len(fields) else {}


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if sys.platform == "linux" and path.exists() else []


def _cpu_name() -> str:
    for line in _cpuinfo():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
