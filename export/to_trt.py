"""ONNX bundle → bundle of two TensorRT engines, for the GPU at hand.

    python export/to_trt.py SOURCE --out BUNDLE

SOURCE is a bundle that export/to_onnx.py wrote, or whatever that takes (a checkpoint folder, the name of an open_clip
model), which is exported first. Engines compute in the precision of the ONNX graphs. They are compared with PyTorch at
every batch size that they will be run at; an engine that does not agree leaves no bundle. --dry-run does all that needs
neither TensorRT nor a GPU.

Exit codes: 0 done, 1 a gate failed or bad input, 2 wrong usage, 3 TensorRT or a GPU (or a package) is missing.
"""
from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shutil
import sys
import tempfile
import time
from pathlib import Path

import torch
from mvam_fast.export.bundle import (
    MANIFEST,
    SAMPLES,
    TOWERS,
    ExportError,
    check_files,
    check_replaceable,
    new_bundle,
    read_manifest,
    write_manifest,
)
from mvam_fast.export.command import add_source_arguments, summary
from mvam_fast.export.trt_build import build_engine
from mvam_fast.export.trt_library import Missing, find, here
from mvam_fast.export.trt_settings import HARDWARE, Settings, profiles_for

from mvam_fast.encoders import OPEN_CLIP_CONFIG
from mvam_fast.model_folder import MVAM_CONFIG

PRECISIONS = ("fp32", "fp16", "bf16")
_ONNX_ONLY = ("kind", "towers", "graphs", "parity", "files", "recall", "half_arithmetic", "created", "versions")


def open_bundle(bundle: Path) -> dict:
    """The manifest of an ONNX bundle that TensorRT can build; ValueError or FileNotFoundError otherwise."""
    manifest = read_manifest(bundle, kind="onnx")
    check_files(bundle, manifest)
    if SAMPLES not in manifest["files"]:
        raise ValueError(f"source: {bundle} has no {SAMPLES}, which engines are compared by; export it again")
    needed = {"input": ("name", "dtype", "shape"), "output": ("name", "shape")}
    lacking = [
        f"towers.{tower}.{end}.{key}" for tower in TOWERS for end in needed for key in needed[end]
        if key not in manifest["towers"][tower].get(end, {})
    ]  # fmt: skip
    if lacking:
        raise ValueError(f"source: {bundle / MANIFEST} lacks {', '.join(lacking)}")
    if manifest["precision"] not in PRECISIONS:
        raise ValueError(
            f"source: {bundle} is in {manifest['precision']}, by dynamic quantisation, which TensorRT cannot build; "
            "export it with --precision fp16"
        )
    return manifest


def settings_for(manifest: dict, batch: list[str] | None, **options) -> Settings:
    """`options` are those of `Settings`, less the profiles: these follow from `batch` and from what the graphs take."""
    rows = {manifest["towers"][tower]["input"]["shape"][0] for tower in TOWERS} - {"batch"}
    settings = Settings(profiles_for(batch, min(rows, default=None)), **options)
    plain = [tower for tower in TOWERS if (manifest.get("pooling") or {}).get(tower) != "node"]
    if settings.plugin and plain:
        raise ValueError(
            f"plugin: {' and '.join(plain)} of the source pool by plain operators, for which there is no plugin; make "
            "one with the node: "
            "python export/to_onnx.py CHECKPOINT --out BUNDLE --precision fp16 --pooling node"
        )
    return settings


def plan(bundle: Path, manifest: dict, settings: Settings) -> dict:
    """What would be built: settings, input shapes per profile, and what the lint of the graphs found."""
    towers = {}
    for tower in TOWERS:
        entry = manifest["towers"][tower]
        row = entry["input"]["shape"][1:]
        towers[tower] = {
            "file": entry["file"],
            "input": {name: entry["input"][name] for name in ("name", "dtype")},
            "shapes": [profile.shapes(row) for profile in settings.profiles],
            "batch_sizes_run": [list(profile.buckets) for profile in settings.profiles],
            "pooling": (manifest.get("pooling") or {}).get(tower, "plain"),
            "lint": _lint(bundle / entry["file"], (manifest.get("graphs") or {}).get(tower)),
        }
    return {"precision": manifest["precision"], "settings": settings.resolved(), "towers": towers}


def _readable(value: dict) -> str:
    """JSON with innermost lists on one line."""
    text = json.dumps(value, indent=2)
    return re.sub(r"\[([^\[\]{}]*)\]", lambda found: f"[{' '.join(found[1].split())}]", text)


def _lint(path: Path, kept: dict | None) -> dict:
    """The graph's check; where onnx is not installed, what it found when the bundle was made."""
    try:
        from mvam_fast.export.lint import check_graph

        return check_graph(path)
    except ImportError:
        return {"not_checked_again": "onnx is not installed; this is from the export", **(kept or {})}


def build_bundle(bundle: Path, manifest: dict, out: Path, settings: Settings, device: int) -> dict:
    """Builds and checks both engines and returns the new manifest; `out` is as it was before if anything fails."""
    from mvam_fast.export.describe import stamp

    trt = find(device)
    with new_bundle(out) as folder, torch.cuda.device(device):
        if settings.plugin:
            _register_plugin(settings, trt, device)
        towers, seconds = {}, {}
        for tower in TOWERS:
            entry = manifest["towers"][tower]
            towers[tower] = {**entry, "file": f"{tower}.plan"}
            _say(f"building {tower}.plan, which takes minutes")
            began = time.monotonic()
            with _plugin_is_asked(tower) if settings.plugin else contextlib.nullcontext():
                (folder / f"{tower}.plan").write_bytes(build_engine(bundle / entry["file"], settings, trt))
            seconds[tower] = round(time.monotonic() - began, 1)
        graphs = {name: digest for name, digest in manifest["files"].items() if name != SAMPLES}
        for name in (SAMPLES, *(graphs if settings.strip else ())):
            shutil.copyfile(bundle / name, folder / name)
        made = {
            "kind": "trt",
            "towers": towers,
            **{key: value for key, value in manifest.items() if key not in (*_ONNX_ONLY, "format")},
            "engines": {
                "built_on": here(device, trt),
                "settings": settings.resolved(),
                "onnx": graphs,
                "graphs": {tower: manifest["towers"][tower]["file"] for tower in TOWERS},
                "build_seconds": seconds,
            },
        }
        _verify(folder, made, device)
        stamped = stamp("tensorrt")
        stamped["versions"] = {**manifest.get("versions", {}), **stamped["versions"]}
        return write_manifest(folder, made | stamped)


def _verify(folder: Path, manifest: dict, device: int) -> None:
    """Adds parity and latency to the manifest; ExportError where an engine disagrees with PyTorch."""
    from mvam_fast.export.trt_verify import check_engines, latency

    from mvam_fast.serving.trt_runner import TrtRunner

    _say("comparing the engines with PyTorch, and timing them")
    runner = TrtRunner(folder, manifest, device)
    try:
        manifest["parity"] = check_engines(runner, folder, manifest)
        manifest["engines"]["latency"] = latency(runner, folder, manifest)
    finally:
        runner.close()


def _register_plugin(settings: Settings, trt, device: int) -> None:
    from mvam_fast.export import plugin

    reason = plugin.blocked(trt.__version__)
    if reason:
        raise ExportError(f"plugin: {reason}")
    caution = plugin.caution(trt.__version__)
    if caution:
        _say(f"warning: plugin: {caution}")
    major, minor = torch.cuda.get_device_capability(device)
    plugin.register(10 * major + minor, hardware_compatible=settings.hardware_compatibility == "ampere+")


@contextlib.contextmanager
def _plugin_is_asked(tower: str):
    """ExportError unless TensorRT asks for the kernel meanwhile: it takes the node's function body without a word."""
    from mvam_fast.kernels.plugin_ptx import plugin_ptx

    before = plugin_ptx.cache_info()
    yield
    after = plugin_ptx.cache_info()
    if before.hits + before.misses == after.hits + after.misses:
        raise ExportError(f"plugin: TensorRT did not take it for the {tower} encoder, but the node's function body")


def _export(source: str, options: argparse.Namespace, folder: Path) -> Path:
    """The ONNX bundle of a source that is none yet."""
    from mvam_fast.export.to_onnx import export_bundle

    bundle = folder / "onnx"
    export_bundle(
        source, bundle, pretrained=options.pretrained, fuse_poolers=options.fuse_poolers,
        precision=options.precision or "fp16", pooling="node" if options.plugin else "plain",
    )  # fmt: skip
    return bundle


def run(options: argparse.Namespace) -> None:
    """The command; raises what `main` turns into an exit code."""
    source = Path(options.source)
    is_bundle = (source / MANIFEST).is_file()
    _check_source(source, is_bundle, options)
    check_replaceable(options.out)
    if options.serving and options.strip:
        raise ValueError("serving, strip: the server does not put weights back into engines that were stripped of them")
    chosen = {
        "workspace_gib": options.workspace, "optimization_level": options.optimization_level,
        "timing_cache": options.timing_cache, "hardware_compatibility": options.hardware_compatibility,
        "version_compatible": options.version_compatible, "refit": options.refit, "strip": options.strip,
        "plugin": options.plugin,
    }  # fmt: skip
    Settings(profiles_for(options.batch, None), **chosen)  # before minutes are spent on an export
    with contextlib.ExitStack() as stack:
        if not is_bundle:
            if not options.dry_run:
                find(options.device)
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="to_trt."))
            source = _export(options.source, options, Path(folder))
        manifest = open_bundle(source)
        if options.precision not in (None, manifest["precision"]):
            raise ValueError(
                f"precision is {options.precision!r}, and the bundle {source} in {manifest['precision']}: engines take "
                "the precision of the graphs; export it again in the other one"
            )
        settings = settings_for(manifest, options.batch, **chosen)
        if options.dry_run:
            print(_readable(plan(source, manifest, settings)))
            print("dry run: nothing is built")
            return
        made = build_bundle(source, manifest, options.out, settings, options.device)
    for line in (*summary(made), *latency_lines(made)):
        print(line)
    print(options.out)
    if options.serving:
        from mvam_fast.export.serving_repo import write_model_repository

        write_model_repository(options.out, options.serving)
        print(options.serving)


def _check_source(source: Path, is_bundle: bool, options: argparse.Namespace) -> None:
    if is_bundle and (options.pretrained or options.fuse_poolers):
        raise ValueError(f"pretrained, fuse-poolers: the bundle {source} is exported already, with its own weights")
    if is_bundle and os.path.abspath(source) == os.path.abspath(options.out):
        raise ValueError(f"out: {options.out} is the source itself, which would be replaced")
    known = source.is_dir() and any((source / name).is_file() for name in (MVAM_CONFIG, OPEN_CLIP_CONFIG))
    if source.exists() and not is_bundle and not known:
        raise ValueError(
            f"source: {source} is neither a bundle (no {MANIFEST}) nor a checkpoint (neither {MVAM_CONFIG} nor "
            f"{OPEN_CLIP_CONFIG})"
        )


def latency_lines(manifest: dict):
    """The table of latency, for people."""
    yield "latency with CUDA graphs, inputs on the GPU:"
    yield f"{'':6} {'batch':>5} {'median ms':>10} {'p99 ms':>10} {'embeddings/s':>13}"
    for tower, rows in manifest["engines"]["latency"].items():
        for batch, row in rows.items():
            yield f"{tower:6} {batch:>5} {row['median_ms']:>10.3f} {row['p99_ms']:>10.3f} {row['embeddings_per_s']:>13}"


def _say(message: str) -> None:
    print(f"to_trt: {message}", file=sys.stderr, flush=True)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_source_arguments(parser)
    add = parser.add_argument
    add("--precision", choices=PRECISIONS, help="of a SOURCE that is no bundle yet (default: fp16)")
    add("--batch", action="append", metavar="MIN,OPT,MAX",
        help="batch sizes of a profile; again for more profiles (default: 1,8,64)")  # fmt: skip
    add("--workspace", type=float, metavar="GIB", help="memory that the builder may use (default: all there is)")
    add("--optimization-level", type=int, metavar="0-5", help="how long the builder searches (default: TensorRT's)")
    add("--timing-cache", type=Path, metavar="FILE", help="what was timed before: read, and written afterwards")
    add("--hardware-compatibility", choices=HARDWARE, default="none",
        help="run on other GPUs too, Ampere and later or of the same compute capability. Costs speed")  # fmt: skip
    add("--version-compatible", action="store_true", help="engines for later versions of TensorRT too. Costs speed")
    add("--refit", action="store_true", help="engines whose weights can be replaced by another checkpoint's")
    add("--strip", action="store_true", help="engines without weights: the ONNX files are kept, and read when loaded")
    add("--plugin", action="store_true", help="the fused pooling kernel; a bundle must have --pooling node")
    add("--serving", type=Path, metavar="DIR", help="also write a model repository for Triton Inference Server")
    add("--device", type=int, default=0, metavar="N", help="CUDA device (default: %(default)s)")
    add("--dry-run", action="store_true", help="check the source and print what would be built")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    try:
        run(options)
    except (Missing, ImportError) as error:
        _say(f"error: {error}")
        return 3
    except (ExportError, ValueError, TypeError, OSError, RuntimeError) as error:
        _say(f"error: {error}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
