"""The schemas of the result files (JSON Schema), by kind; `validate` names the first place that does not fit."""
from __future__ import annotations

import jsonschema

TEXT, NUMBER, WHOLE, POSITIVE = {"type": "string"}, {"type": "number"}, {"type": "integer"}, {"exclusiveMinimum": 0}
TIME = NUMBER | POSITIVE
BLOCKS = {"type": "array", "minItems": 1, "items": {"type": "array", "minItems": 1, "items": TIME}}
ERRORS = {"type": "object", "additionalProperties": {"type": "number", "minimum": 0}}
STATISTICS = ("blocks_ms", "median_ms", "p20_ms", "p80_ms", "min_ms")


def _object(required: dict, optional: dict | None = None) -> dict:
    """An object with these fields and no others."""
    return {
        "type": "object", "properties": required | (optional or {}), "required": list(required),
        "additionalProperties": False,
    }  # fmt: skip


MACHINE = _object(
    {
        "device": TEXT, "kind": {"enum": ["cpu", "cuda", "static"]}, "threads": WHOLE, "cores": WHOLE, "system": TEXT,
        "python": TEXT, "torch": TEXT, "mvam_fast": TEXT, "packages": {"type": "object", "additionalProperties": TEXT},
        "commit": TEXT, "uncommitted_changes": {"type": ["boolean", "null"]},
        "source_sha256": TEXT | {"pattern": "^[0-9a-f]{64}$"}, "date": TEXT | {"pattern": r"^\d{4}-\d\d-\d\dT"},
        "cache_bytes": WHOLE,
    },
    {
        "driver": {"type": ["string", "null"]}, "cuda": TEXT, "capability": TEXT, "multiprocessors": WHOLE,
        "memory_bytes": WHOLE,
    },
)  # fmt: skip
STATISTICS_FIELDS = {name: BLOCKS if name == "blocks_ms" else TIME for name in STATISTICS}
CLOCKS = {"type": "object", "additionalProperties": {"type": "array", "items": NUMBER}}
CASE = {
    "shape": TEXT, "batch": WHOLE, "views": WHOLE, "dtype": TEXT, "provider": TEXT,
    "work": {"enum": ["pool", "norm+pool", "own"]}, "setting": {"enum": ["eager", "CUDA graph", "compiled model"]},
    "mode": {"enum": ["forward", "backward", "forward+backward"]}, "clocks": CLOCKS,
}  # fmt: skip
THROUGHPUT_ROW = {
    "oneOf": [
        _object({**CASE, "reason": TEXT | {"minLength": 1}}),
        _object(
            {
                **CASE, **STATISTICS_FIELDS, "details": TEXT, "forward_errors": ERRORS, "first_call_s": TIME,
                "bytes": WHOLE, "gb_s": TIME, "copy_gb_s": TIME, "percent_of_copy": TIME, "read_gb_s": TIME,
                "percent_of_read": TIME, "ratio": TIME, "ratio_of_minima": TIME,
            },
            {
                "errors": ERRORS, "peak_extra_mb": NUMBER, "saved_mb": NUMBER, "flops": WHOLE, "gflop_s": TIME,
                "ours_ratio": TIME,
                **{f"call_{name}": value for name, value in STATISTICS_FIELDS.items()},
            },
        ),
    ]
}  # fmt: skip
MODEL = {"enum": ["clip", "mvam naive", "mvam"]}
INFERENCE = {
    "work": {"const": "inference"}, "backend": TEXT, "tower": {"enum": ["image", "text"]}, "batch": WHOLE,
    "model": MODEL,
}  # fmt: skip
TRAINING = {"work": {"const": "training"}, "batch": WHOLE, "model": MODEL}
TIMED = {
    **STATISTICS_FIELDS, "repetitions": WHOLE, "per_s": TIME, "clocks": CLOCKS, "precision": TEXT, "details": TEXT,
    "errors": ERRORS,
}  # fmt: skip
ENCODERS_ROW = {
    "oneOf": [
        _object({**INFERENCE, "reason": TEXT | {"minLength": 1}}),
        _object({**TRAINING, "reason": TEXT | {"minLength": 1}}),
        _object(
            {**INFERENCE, **TIMED, "first_result_s": TIME}, {"p99_ms": TIME, "max_ms": TIME, "times_clip": TIME}
        ),
        _object(
            {**TRAINING, **TIMED, "loss": NUMBER, "first_step_s": TIME, "peak_extra_mb": NUMBER, "saved_mb": NUMBER},
            {"times_clip": TIME},
        ),
    ]
}  # fmt: skip
PARITY = {"max_abs": {"type": "number", "minimum": 0}, "cosine": NUMBER, "top5": NUMBER}
EXPORTED_TOWER = _object(
    {
        "bytes": WHOLE, "pooling": TEXT | {"minLength": 1},
        "parity": {"type": "object", "minProperties": 1, "additionalProperties": _object(PARITY)},
    },
    {"nodes": WHOLE, "opset": WHOLE, "int8_products": WHOLE, "half_arithmetic": _object(PARITY)},
)  # fmt: skip
EXPORT = {
    "work": {"const": "export"}, "model": TEXT, "variant": {"enum": ["clip", "mvam", "fused pooler", "checkpoint"]},
    "form": TEXT,
}  # fmt: skip
LATENCY = {
    "work": {"const": "latency"}, "tower": {"enum": ["image", "text"]}, "batch": WHOLE,
    "model": {"enum": ["clip", "mvam"]}, "runner": {"enum": ["eager", "session", "encoder"]}, "form": TEXT,
}  # fmt: skip
TIMES = _object({"median": TIME, "least": TIME, "most": TIME})
EXPORTS_ROW = {
    "oneOf": [
        _object({**EXPORT, "reason": TEXT | {"minLength": 1}}),
        _object({**LATENCY, "reason": TEXT | {"minLength": 1}}),
        _object(
            {
                **EXPORT, "seconds": TIME, "bytes": WHOLE, "views": WHOLE,
                "towers": _object({"image": EXPORTED_TOWER, "text": EXPORTED_TOWER}),
            }
        ),
        _object(
            {**LATENCY, **TIMED},
            {
                "p99_ms": TIME, "max_ms": TIME, "times_session": TIMES, "times_eager": TIMES, "times_clip": TIMES,
            },
        ),
    ]
}  # fmt: skip
TESTS_ROW = _object(
    {"test": TEXT, "outcome": {"enum": ["passed", "failed", "skipped", "running"]}, "seconds": NUMBER, "message": TEXT}
)
PROFILE_ROW = {
    "type": "object", "required": ["shape", "batch", "views", "dtype", "norm", "kernel", "grid", "bytes_by_formula"],
    "properties": {"shape": TEXT, "kernel": TEXT, "bytes_by_formula": WHOLE, "bytes_measured": NUMBER},
}  # fmt: skip
ANY_ROW = {"type": "object"}
ROWS = {
    "throughput": THROUGHPUT_ROW, "encoders": ENCODERS_ROW, "exports": EXPORTS_ROW, "tests": TESTS_ROW,
    "profile": PROFILE_ROW, "kernel_report": ANY_ROW, "host_cost": ANY_ROW,
}  # fmt: skip
MORE = {  # what else the file of a kind holds
    "throughput": {
        "method": TEXT, "bytes": TEXT, "cases": {"type": "array", "items": {"type": "array"}},
        "ceilings": {
            "type": "object", "additionalProperties": TIME,
            "required": ["copy_gb_s", "read_gb_s", "float32_gflop_s"],
        },
    },
    "encoders": {"note": TEXT}, "exports": {"note": TEXT},
}  # fmt: skip


def validate(result: dict) -> None:
    """ValueError naming the first place of `result` (read by results.read) that its kind's schema does not allow."""
    kind = result["kind"]
    head = {
        "kind": TEXT, "format": WHOLE, "machine": MACHINE, "settings": {"type": "object"},
        "complete": {"type": "boolean"}, "seal": TEXT, "rows": {"type": "array", "items": ROWS[kind]},
    }  # fmt: skip
    validator = jsonschema.Draft202012Validator(_object(head | MORE.get(kind, {})))
    error = jsonschema.exceptions.best_match(validator.iter_errors(result))
    if error is not None:
        raise ValueError(f"{kind}: {error.json_path}: {error.message[:300]}")
