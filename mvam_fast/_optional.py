"""Packages that only parts of mvam_fast need: imported when that part is used, with a helpful error if absent."""
from __future__ import annotations

import importlib
from types import ModuleType


def require(module: str, extra: str) -> ModuleType:
    """Imports `module`; ImportError with the pip command of the `extra` that brings it if it cannot be imported."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        missing = isinstance(error, ModuleNotFoundError) and (error.name or "").partition(".")[0] == package
        what = "is not installed" if missing else f"is installed but fails to import ({error})"
        raise ImportError(
            f"mvam_fast needs the package {package!r} here, which {what}; get it with: pip install 'mvam_fast[{extra}]'"
        ) from error
