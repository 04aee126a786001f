"""Runs the tests of the kernels on the GPU in several processes and keeps every outcome as it comes.

    python benchmarks/gpu_tests.py --out FOLDER [--workers N] [--resume]

Most of the time goes into compiling kernels, on the CPU, hence the processes; tests marked `alone` need the GPU's
memory and run after the others, in one; those marked `late` come last. FOLDER gets tests.json, rewritten as outcomes
come, so that a run that is cut off has told what it knows (JUnit's XML is written at the end of a session, or not at
all). A process whose GPU context a test has broken, or that a test has killed, is replaced: the tests after it do not
fail for that.
"""
from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
import results  # noqa: E402
from machine import ROOT, SOURCES, machine, source_sha256  # noqa: E402
from recorder import PHASES, RUNNING, outcomes  # noqa: E402

# The most important first.
FILES = ("test_gpu.py", "test_kernels.py", "test_op.py", "test_launch.py", "test_properties.py")
BYTES_OF_A_WORKER = 8 << 30
POLL_SECONDS = 0.5


class Worker:
    """A process that runs its part of the tests, started again for as long as tests take it down."""

    def __init__(self, path: Path, log: Path, command: list[str]):
        self.path, self.log, self.command = path, log, command
        self.error = ""
        self._start()

    def _start(self) -> None:
        self.known = len(outcomes(self.path))
        environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        with self.log.open("ab") as file:
            self.process = subprocess.Popen(
                self.command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT
            )

    def busy(self) -> bool:
        """Whether it still works; a process that a test took down is replaced, the test being a failed one."""
        code = self.process.poll()
        if code is None:
            return True
        if code in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED, pytest.ExitCode.NO_TESTS_COLLECTED):
            return False
        found = outcomes(self.path)
        for row in found.values():
            if row["outcome"] == RUNNING:
                with self.path.open("a") as file:
                    message = f"the test process ended with exit code {code}"
                    file.write(json.dumps({**row, "outcome": "failed", "message": message}) + "\n")
        if len(found) == self.known:
            self.error = f"pytest ended with exit code {code} and ran nothing; see {self.log}"
            return False
        self._start()
        return True


def run(options: argparse.Namespace) -> dict:
    path = options.out / "tests.json"
    about = {**machine(torch.device(options.device)), "source_sha256": source_sha256((*SOURCES, "tests"))}
    result = {"machine": about, "settings": {"files": [Path(file).name for file in options.files]}}
    rows = []
    if options.resume and path.exists():
        rows = results.resumed(path, "tests", result)["rows"]
    before = {row["test"]: row for row in rows if row["outcome"] in ("passed", "skipped")}  # failed ones: once more
    logs = options.out / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    errors = []
    for phase in PHASES:
        count = 1 if phase == "alone" else options.workers
        done = logs / "tests-done.json"
        done.write_text(json.dumps(list(before)))
        workers = []
        for index in range(count):
            name = f"tests-{phase}-{index}"
            lines = logs / f"{name}.jsonl"
            lines.unlink(missing_ok=True)
            command = [sys.executable, str(Path(__file__).with_name("recorder.py")), str(lines), str(done)]
            command += [phase, str(index), str(count), *options.files]
            workers.append(Worker(lines, logs / f"{name}.log", command))
        now, busy = before, True
        while busy:
            busy = any([worker.busy() for worker in workers])
            known, now = now, dict(before)
            for worker in workers:
                now |= outcomes(worker.path)
            if now != known:
                results.write(path, "tests", {**result, "complete": False, "rows": list(now.values())})
                print(counts(now.values()), flush=True)
            time.sleep(POLL_SECONDS if busy else 0)
        before = now
        errors += [worker.error for worker in workers if worker.error]
    results.write(path, "tests", {**result, "complete": not errors, "rows": list(before.values())})
    print("\n".join([*failures(before.values()), *errors, counts(before.values())]))
    return {"rows": list(before.values()), "errors": errors}


def counts(rows) -> str:
    outcomes_ = [row["outcome"] for row in rows]
    return ", ".join(f"{outcomes_.count(one)} {one}" for one in ("passed", "failed", "skipped", RUNNING)
                     if one in ("passed", "failed") or one in outcomes_)  # fmt: skip


def failures(rows) -> list[str]:
    return [f"{row['test']}: {row['message'].partition(chr(10))[0]}" for row in rows if row["outcome"] == "failed"]


def parse(arguments: list[str] | None) -> argparse.Namespace:
    cuda = torch.cuda.is_available()
    memory = torch.cuda.get_device_properties(0).total_memory if cuda else BYTES_OF_A_WORKER
    workers = max(min(8, (os.cpu_count() or 1) // 2, memory // BYTES_OF_A_WORKER), 1)
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder")
    parser.add_argument("--workers", type=int, default=workers, help="processes (here: %(default)s)")
    parser.add_argument("--resume", action="store_true", help="do not repeat what passed in an earlier run into --out")
    parser.add_argument("--files", nargs="+", default=[str(ROOT / "tests" / name) for name in FILES])
    options = parser.parse_args(arguments)
    options.device = "cuda" if cuda else "cpu"
    return options


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    found = run(options)
    return 1 if found["errors"] or any(row["outcome"] == "failed" for row in found["rows"]) else 0


if __name__ == "__main__":
    sys.exit(main())
