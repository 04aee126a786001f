"""Runs stages (commands) one after another within a time budget, and keeps what became of each in suite.json.

A stage may use its share of what is left, so that no stage starves the ones after it, and what one leaves over flows
on. At its deadline its whole process group is killed; what it wrote by then stays. Stages that ran out of time are
gone on with while there is time, and by the next run into the same folder. What is done, by the same code on the same
device with the same command, is not done again.
"""
from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import results

FOLDER = "FOLDER"  # in a command: the suite's folder, whose name says nothing about what is measured
LEAST_SECONDS = 15.0  # a stage is not started with less: its imports take that
GRACE_SECONDS = 3.0  # between asking a process group to end and killing it
POLL_SECONDS, TELL_SECONDS = 0.2, 20.0  # the last line of the log is shown so often where there is no terminal
DONE, FAILED, OUT_OF_TIME, SKIPPED, RUNNING = "done", "failed", "out of time", "skipped", "running"


@dataclass(frozen=True)
class Stage:
    """`command`, without the interpreter, goes on with `file`, which it writes in the suite's folder, if that is there.

    `share` is its part of the budget beside the other stages' shares, `source` a digest of the code that its results
    depend on, `skip` why it cannot run here (empty if it can).
    """

    name: str
    command: tuple[str, ...]
    file: str
    share: float
    source: str
    skip: str = ""


class Suite:
    """The state of a run into `folder`: a row for each stage, written whenever one changes.

    `report(path)` gives one line on a stage's result file and the names of what failed in it.
    """

    def __init__(self, folder: Path, machine: dict, settings: dict, report: Callable[[Path], tuple[str, list[str]]]):
        self.folder, self.machine, self.settings, self.report = folder, machine, settings, report
        path = folder / "suite.json"
        rows = results.read(path, "suite")["rows"] if path.exists() else []
        self.rows: dict[str, dict] = {row["stage"]: row for row in rows}

    def run(self, stages: list[Stage], deadline: float) -> None:
        """Runs what is not done; `deadline` by time.monotonic()."""
        waiting = []
        for stage in stages:
            self._put_away_what_other_code_measured(stage)
            if stage.skip:
                self._keep(stage, SKIPPED, reason=stage.skip)
            elif self._same(stage) and self.rows[stage.name]["status"] == DONE:
                print(f"{stage.name}: done before by the same code and command, not done again", flush=True)
            else:
                waiting.append(stage)
        while waiting and deadline - time.monotonic() >= LEAST_SECONDS:
            unfinished = []
            for index, stage in enumerate(waiting):
                left = deadline - time.monotonic()
                seconds = max(allotted(waiting[index:], left), LEAST_SECONDS)
                if seconds > left or self._run(stage, seconds) == OUT_OF_TIME:
                    unfinished.append(stage)
            waiting = unfinished
        for stage in waiting:
            if not self._same(stage) or self.rows[stage.name]["status"] != OUT_OF_TIME:
                self._keep(stage, OUT_OF_TIME, reason="not started")

    def _run(self, stage: Stage, seconds: float) -> str:
        spent = self.rows[stage.name].get("seconds", 0) if self._same(stage) else 0
        self._keep(stage, RUNNING, seconds=spent)
        command = [sys.executable, *(word.replace(FOLDER, str(self.folder)) for word in stage.command)]
        log = self.folder / "logs" / f"{stage.name}.log"
        began = time.monotonic()
        code = run_until(command, log, began + seconds, stage.name)
        status = OUT_OF_TIME if code is None else DONE if code == 0 else FAILED
        reason = {} if status != FAILED else {"reason": f"exit code {code}: {last_line(log)}"}
        self._keep(stage, status, seconds=round(spent + time.monotonic() - began, 1), **reason)
        return status

    def _put_away_what_other_code_measured(self, stage: Stage) -> None:
        """It is kept, but not gone on with. Without a row, the stage itself looks at what its file was measured by."""
        path, row = self.folder / stage.file, self.rows.get(stage.name)
        if row and path.exists() and {**row["measured"], "command": []} != {**self._measured(stage), "command": []}:
            other = self.folder / f"before-{row['measured']['source'][:8]}"
            other.mkdir(exist_ok=True)
            path.replace(other / stage.file)

    def _same(self, stage: Stage) -> bool:
        """Whether the row that is there is about the same command, code and device."""
        return self.rows.get(stage.name, {}).get("measured") == self._measured(stage)

    def _measured(self, stage: Stage) -> dict:
        about = {name: self.machine[name] for name in ("device", "torch")}
        return {**about, "source": stage.source, "command": list(stage.command)}

    def _keep(self, stage: Stage, status: str, **more) -> None:
        row = {"stage": stage.name, "status": status, "file": stage.file, "measured": self._measured(stage), **more}
        if status != SKIPPED and (self.folder / stage.file).exists():
            row["found"], row["problems"] = self.report(self.folder / stage.file)
        self.rows[stage.name] = row
        complete = all(row["status"] in (DONE, SKIPPED) for row in self.rows.values())
        result = {"machine": self.machine, "settings": self.settings, "complete": complete}
        results.write(self.folder / "suite.json", "suite", {**result, "rows": list(self.rows.values())})

    def summary(self, names: list[str]) -> str:
        """A line for each of these stages, then everything that failed by name, then where it all is."""
        rows = [self.rows[name] for name in names if name in self.rows]
        lines = [""]
        for row in rows:
            reason = "" if row.get("problems") else row.get("reason")  # those are listed
            told = "; ".join(filter(None, (row.get("found"), reason)))
            lines.append(f"{row['stage']:10}{row['status']:12}{row.get('seconds', 0):7.0f} s  {told}")
        problems = [problem for row in rows for problem in row.get("problems", ())]
        lines += ["failed:", *(f"  {problem}" for problem in problems)] if problems else []
        return "\n".join([*lines, str(self.folder)])

    def failed(self, names: list[str]) -> bool:
        rows = [self.rows[name] for name in names if name in self.rows]
        return any(row["status"] == FAILED or row.get("problems") for row in rows)


def allotted(stages: list[Stage], left: float) -> float:
    """Seconds that the first of the stages still to come may use."""
    return left * stages[0].share / sum(stage.share for stage in stages)


def run_until(command: list[str], log: Path, deadline: float, name: str) -> int | None:
    """The exit code; None when the deadline came first. Whatever the command started ends with it."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
    told = time.monotonic()
    try:
        while process.poll() is None and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS)
            if sys.stderr.isatty():
                print(f"\r\033[K{name}: {last_line(log)[:100]}", end="", file=sys.stderr, flush=True)
            elif time.monotonic() - told > TELL_SECONDS:
                told = time.monotonic()
                print(f"{name}: {deadline - told:.0f} s left: {last_line(log)[:150]}", file=sys.stderr, flush=True)
        return process.poll()
    finally:
        if sys.stderr.isatty():
            print(file=sys.stderr)
        end_group(process)


def end_group(process: subprocess.Popen) -> None:
    """Ends the process and what it started in its group: asked first, so that a profiler gives its counters back."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
    with suppress(subprocess.TimeoutExpired):
        process.wait(GRACE_SECONDS)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def last_line(log: Path) -> str:
    """Of a log that may be long, and whose progress bars return without a new line."""
    if not log.exists():
        return ""
    with log.open("rb") as file:
        file.seek(max(log.stat().st_size - 4096, 0))
        text = file.read().decode(errors="replace")
    return next((line.strip() for line in reversed(re.split(r"[\r\n]", text)) if line.strip()), "")
