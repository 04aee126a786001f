"""What of TensorRT can be checked here, and whether it holds: runs the tests marked `trt`, and prints a table.

    python tests/trt_check.py [ARGUMENTS OF PYTEST]

Exit codes: 0 all that was run passed, 1 something failed, 3 nothing could be run.
"""
from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from mvam_fast.export.trt_library import Missing, find, here

TESTS = Path(__file__).resolve().parent
SHOWN = {"passed": "passed", "failed": "FAILED", "skipped": "not run"}


class Outcomes:
    """Collects one outcome per test, with the reason where it was not run."""

    def __init__(self):
        self.by_test: dict[str, tuple[str, str]] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        name = report.nodeid.partition("::")[2]
        if report.when == "call" or report.outcome != "passed":  # what fails before or after its call fails too
            reason = report.longrepr[2] if report.skipped and isinstance(report.longrepr, tuple) else ""
            self.by_test[name] = report.outcome, reason.removeprefix("Skipped: ").removeprefix("not run: ")


def present() -> str:
    """TensorRT, GPU and driver; or what is missing of them."""
    try:
        place = here(0, find(0))
    except Missing as error:
        return str(error)
    return "\n".join(f"{name:18} {value or 'unknown'}" for name, value in place.items())


def main(arguments: list[str]) -> int:
    print(f"{'PyTorch':18} {torch.__version__}\n{present()}\n", flush=True)
    outcomes = Outcomes()
    code = pytest.main(["-m", "trt", str(TESTS), *arguments], plugins=[outcomes])
    width = max(map(len, outcomes.by_test), default=0)
    print()
    for name, (outcome, reason) in outcomes.by_test.items():
        print(f"{name:{width}}  {SHOWN[outcome]}{f' ({reason})' if reason else ''}")
    counts = {shown: sum(one == kind for one, _ in outcomes.by_test.values()) for kind, shown in SHOWN.items()}
    print(", ".join(f"{count} {shown}" for shown, count in counts.items()))
    if code not in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
        return 1
    return 0 if counts["passed"] else 3


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
