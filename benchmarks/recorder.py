"""The part of gpu_tests.py that runs pytest: one process, its part of the tests, every outcome written as it comes.

    python benchmarks/recorder.py LINES DONE PHASE INDEX COUNT FILE ...
"""
from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

PHASES = ("together", "alone", "late")  # the latter two are markers
RUNNING = "running"
BROKEN = 70  # exit code of a process whose GPU context is lost


class Recorder:
    """A pytest plugin: takes every `count`-th test of a phase from `index` on and writes what becomes of it.

    Each line of `path` is a test's state: running, then passed, failed or skipped. `done` are not run.
    """

    def __init__(self, path: Path, done: set[str], phase: str, index: int, count: int):
        self.path, self.done, self.phase, self.index, self.count = path, done, phase, index, count
        self._failed = False

    def pytest_collectreport(self, report):
        if report.failed:  # a file that does not import; the others still run
            self._write(report.nodeid, "failed", message=str(report.longrepr).strip().splitlines()[-1].lstrip("E "))

    def pytest_collection_modifyitems(self, config, items):
        wanted = [item for item in items if phase_of(item) == self.phase][self.index :: self.count]
        wanted = [item for item in wanted if item.nodeid not in self.done]
        chosen = set(wanted)
        config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
        items[:] = wanted

    def pytest_runtest_logstart(self, nodeid):
        self._write(nodeid, RUNNING)

    def pytest_runtest_logreport(self, report):
        if report.when == "call" or (report.outcome != "passed" and report.when == "setup"):
            message = ""
            if report.skipped:
                message = report.longrepr[2]
            elif report.failed:
                crash = getattr(report.longrepr, "reprcrash", None)
                message = crash.message if crash else str(report.longrepr)
            self._write(report.nodeid, report.outcome, report.duration, message)
            self._failed = report.failed
        if report.when == "teardown" and self._failed and context_lost():
            os._exit(BROKEN)

    def _write(self, nodeid: str, outcome: str, seconds: float = 0.0, message: str = "") -> None:
        text = "\n".join(message.splitlines()[:4])[:1000]
        row = {"test": nodeid, "outcome": outcome, "seconds": round(seconds, 2), "message": text}
        with self.path.open("a") as file:  # a line at once: several processes append
            file.write(json.dumps(row) + "\n")


def phase_of(item: pytest.Item) -> str:
    return next((name for name in PHASES[1:] if item.get_closest_marker(name)), PHASES[0])


def context_lost() -> bool:
    """Whether an error of the GPU (an illegal address, say) stays with this process from now on."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


def outcomes(path: Path) -> dict[str, dict]:
    """The last state of each test, in the order in which they started."""
    lines = path.read_text().splitlines() if path.exists() else []
    found: dict[str, dict] = {}
    for line in lines:
        row = json.loads(line)
        found[row["test"]] = row
    return found


def main() -> int:
    lines, done, phase, index, count, *files = sys.argv[1:]
    # What was recorded before this process was started again is done as well, failed or not.
    finished = {*json.loads(Path(done).read_text()), *outcomes(Path(lines))}
    recorder = Recorder(Path(lines), finished, phase, int(index), int(count))
    return pytest.main(["-p", "no:cacheprovider", "--continue-on-collection-errors", *files], plugins=[recorder])


if __name__ == "__main__":
    sys.exit(main())
