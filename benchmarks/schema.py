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
CASE = {
    "shape": TEXT, "batch": WHOLE, "views": WHOLE, "dtype": TEXT, "provider": TEXT,
    "work": {"enum": ["pool", "norm+pool", "own"]}, "setting": {"enum": ["eager", "CUDA graph", "compiled model"]},
    "mode": {"enum": ["forward", "backward", "forward+backward"]},
    "clocks": {"type": "object", "additionalProperties": {"type": "array", "items": NUMBER}},
}  # fmt: skip
THROUGHPUT_ROW = {
    "oneOf": [
        _object({**CASE, "reason": TEXT | {"minLength": 1}}),
        _object(
            {
                **CASE, **STATISTICS_FIELDS, "details": TEXT, "forward_errors": ERRORS, "first_result_s": TIME,
                "bytes": WHOLE, "gb_s": TIME, "percent_of_copy": TIME, "percent_of_read": TIME,
                "peak_extra_mb": NUMBER, "ratio": TIME, "ratio_of_minima": TIME,
            },
            {
                "errors": ERRORS, "saved_mb": NUMBER, "flops": WHOLE, "gflop_s": TIME, "ours_ratio": TIME,
                **{f"call_{name}": value for name, value in STATISTICS_FIELDS.items()},
            },
        ),
    ]
}  # fmt: skip
ANY_ROW = {"type": "object"}
ROWS = {"throughput": THROUGHPUT_ROW, "kernel_report": ANY_ROW, "host_cost": ANY_ROW}
MORE = {  # what else the file of a kind holds
    "throughput": {
        "method": TEXT, "bytes": TEXT,
        "ceilings": {
            "type": "object", "additionalProperties": TIME,
            "required": ["copy_gb_s", "read_gb_s", "float32_gflop_s"],
        },
    },
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
