"""The runner of `make gpu`, with commands that are not what it is for: budget, kill, restart, summary, environment."""
import argparse
import importlib
import json
import os
import shutil
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))
bootstrap, gpu_suite, gpu_tests, ncu, results, stages = (
    importlib.import_module(name) for name in ("bootstrap", "gpu_suite", "gpu_tests", "ncu", "results", "stages")
)
MACHINE = {"device": "a GPU", "torch": "2.11"}


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(stages, "LEAST_SECONDS", 0.2)
    monkeypatch.setattr(stages, "POLL_SECONDS", 0.02)
    monkeypatch.setattr(gpu_tests, "POLL_SECONDS", 0.02)


def stage(name, code, share=1.0, source="0" * 64, **more):
    """Its command appends a line to NAME.ran in the current folder and then runs `code`."""
    code = f"open({name + '.ran'!r}, 'a').write('x'); import os, subprocess, sys, time\n" + code
    return stages.Stage(name, ("-c", code), f"{name}.json", share, source, **more)


WRITES = "open('{}.json', 'w').write('{{\"rows\": [1, 2]}}')"


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def run(*chosen, seconds=20.0):
        suite = stages.Suite(tmp_path, MACHINE, {}, gpu_suite.report)
        suite.run(list(chosen), time.monotonic() + seconds)
        names = [one.name for one in chosen]
        return {name: suite.rows[name] for name in names}, suite.summary(names), suite.failed(names)

    return run


def times_run(name):
    return len(Path(f"{name}.ran").read_text()) if Path(f"{name}.ran").exists() else 0


def test_a_stage_that_fails_is_reported_and_the_rest_runs(run, tmp_path):
    rows, summary, failed = run(
        stage("bad", "print('working'); sys.exit('it broke')"), stage("good", WRITES.format("good")),
        stage("absent", "", skip="there is no tool"),
    )  # fmt: skip
    assert [row["status"] for row in rows.values()] == ["failed", "done", "skipped"] and failed
    assert rows["bad"]["reason"] == "exit code 1: it broke" and "working" in (tmp_path / "logs/bad.log").read_text()
    assert rows["good"]["found"] == "2 rows"
    for line in ("bad       failed", "exit code 1: it broke", "2 rows", "there is no tool", str(tmp_path)):
        assert line in summary
    assert results.read(tmp_path / "suite.json", "suite")["complete"] is False


SLEEPS = """
child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])
open('pids', 'w').write(f'{os.getpid()} {child.pid}')
open('slow.json', 'w').write('{"rows": [1], "complete": false}')
time.sleep(60)
"""


def alive(pid):
    status = Path(f"/proc/{pid}/stat")
    try:
        return status.read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def all_gone(file="pids", seconds=5):
    """Whether no process of those written there is left, soon: a kill takes effect a moment later."""
    pids, until = Path(file).read_text().split(), time.monotonic() + seconds
    while any(alive(pid) for pid in pids) and time.monotonic() < until:
        time.sleep(0.01)
    return not any(alive(pid) for pid in pids)


def test_a_stage_past_its_deadline_is_killed_with_its_children(run):
    began = time.monotonic()
    rows, summary, failed = run(stage("slow", SLEEPS), seconds=1.5)
    assert time.monotonic() - began < 10 and not failed
    assert rows["slow"]["status"] == "out of time" and rows["slow"]["found"] == "1 rows, not complete"
    assert "out of time" in summary
    assert all_gone()


def test_children_that_outlive_a_stage_end_with_it(run):
    run(stage("brief", SLEEPS.replace("time.sleep(60)\n", "").replace("slow.json", "brief.json")))
    assert all_gone()


def test_an_interrupted_suite_takes_its_stage_along(run, monkeypatch):
    def interrupt(log):
        if Path("pids").exists():
            raise KeyboardInterrupt
        return ""

    monkeypatch.setattr(stages, "TELL_SECONDS", 0)
    monkeypatch.setattr(stages, "last_line", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run(stage("slow", SLEEPS))
    assert all_gone()
    assert results.read(Path("suite.json"), "suite")["rows"][0]["status"] == "running"


def test_the_budget_is_shared_and_flows_on():
    three = [stage("a", "", share=2), stage("b", "", share=1), stage("c", "", share=1)]
    assert stages.allotted(three, 100) == 50
    assert stages.allotted(three[1:], 99) == 49.5  # the first used only one second
    assert stages.allotted(three[2:], 98) == 98


def test_time_that_is_left_goes_to_what_was_cut_off(run):
    goes_on = "time.sleep(60 if open('first.ran').read() == 'x' else 0)"
    rows, _, _ = run(stage("first", goes_on), stage("second", ""), seconds=4)
    assert [row["status"] for row in rows.values()] == ["done", "done"]
    assert times_run("first") == 2 and times_run("second") == 1


def test_what_there_is_no_time_for_is_said(run):
    rows, summary, failed = run(stage("first", ""), seconds=0.1)
    assert rows["first"]["status"] == "out of time" and "not started" in summary and not failed
    assert times_run("first") == 0


def test_only_what_is_not_done_runs_again(run, capsys):
    broken = stage("broken", "sys.exit(1)")
    run(stage("a", WRITES.format("a")), broken)
    assert "not done again" not in capsys.readouterr().out
    rows, summary, failed = run(stage("a", WRITES.format("a")), broken)
    assert "a: done before by the same code and command, not done again" in capsys.readouterr().out
    assert (times_run("a"), times_run("broken")) == (1, 2) and rows["a"]["status"] == "done" and failed
    assert "2 rows" in summary


def test_changed_code_runs_again_and_what_the_other_measured_is_put_away(run):
    run(stage("a", WRITES.format("a")))
    Path("a.json").write_text('{"rows": ["old"]}')
    run(stage("a", WRITES.format("a"), source="1" * 64))
    assert times_run("a") == 2
    assert json.loads(Path("before-00000000/a.json").read_text())["rows"] == ["old"]


def test_another_command_runs_and_goes_on_with_the_same_file(run):
    run(stage("a", WRITES.format("a")))
    run(stage("a", "assert os.path.exists('a.json')"))
    assert times_run("a") == 2 and not Path("before-00000000").exists()


SUITE = """
import os
import pytest

def test_passes(): pass
def test_fails(): assert 1 + 1 == 3, "arithmetic"
@pytest.mark.skip(reason="not today")
def test_skips(): pass
@pytest.mark.alone
def test_alone(): pass
@pytest.mark.late
def test_late(): assert os.path.exists({marker!r})
def test_dies():
    open({marker!r}, "w")
    os._exit(3)
def test_after_it(): pass
"""
CONFIGURATION = "[pytest]\nmarkers =\n    alone: a\n    late: b\n"


def test_tests_are_counted_named_and_survive_one_that_kills_its_process(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")  # importing them takes longest
    (tmp_path / "pytest.ini").write_text(CONFIGURATION)
    (tmp_path / "test_small.py").write_text(SUITE.format(marker=str(tmp_path / "marker")))
    (tmp_path / "test_broken.py").write_text("import no_such_module")
    out = tmp_path / "out"
    files = [str(tmp_path / name) for name in ("test_broken.py", "test_small.py")]
    arguments = ["--out", str(out), "--workers", "2", "--files", *files]
    assert gpu_tests.main(arguments) == 1
    result = results.read(out / "tests.json", "tests")
    found = {row["test"].rpartition("::")[2]: row for row in result["rows"]}
    assert result["complete"]
    assert {name.removeprefix("test_"): row["outcome"] for name, row in found.items() if "broken" not in name} == {
        "passes": "passed", "fails": "failed", "skips": "skipped", "alone": "passed", "late": "passed",
        "dies": "failed", "after_it": "passed",
    }  # fmt: skip
    assert found["test_fails"]["message"].startswith("AssertionError: arithmetic")
    assert found["test_skips"]["message"].endswith("not today")
    assert found["test_dies"]["message"] == "the test process ended with exit code 3"
    line, problems = gpu_suite.report(out / "tests.json")
    assert line == "4 passed, 3 failed, 1 skipped"
    assert [one.partition(": ")[2] for one in sorted(problems)] == [
        "ModuleNotFoundError: No module named 'no_such_module'", "the test process ended with exit code 3",
        "AssertionError: arithmetic",
    ]  # fmt: skip
    # Mended, and started again: what passed is not run again.
    (tmp_path / "test_broken.py").write_text("")
    (tmp_path / "test_small.py").write_text(
        "def test_passes(): assert False\ndef test_fails(): pass\ndef test_dies(): pass"
    )
    assert gpu_tests.main([*arguments, "--resume"]) == 0
    assert gpu_suite.report(out / "tests.json") == ("6 passed, 0 failed, 1 skipped", [])
    monkeypatch.setattr(gpu_tests, "source_sha256", lambda folders: "another")
    with pytest.raises(SystemExit, match="--resume: source_sha256 was .*, now it is another; name another --out"):
        gpu_tests.main([*arguments, "--resume"])


# The details page of `ncu --csv --print-units base`: its own words, a header, a line per launch and metric.
HEADER = '"ID","Process ID","Process Name","Host Name","Kernel Name","Context","Stream","Block Size","Grid Size",'
HEADER += '"Device","CC","Section Name","Metric Name","Metric Unit","Metric Value"'
LINE = '"{}","2583","python3","127.0.0.1","{}","1","7","(256, 1, 1)","(991, 1, 1)","0","9.0",'
LINE += '"Command line profiler metrics","{}","{}","{}"'
VALUES = {
    "dram__bytes_read.sum": ("byte", "300,105,728"), "dram__bytes_write.sum": ("byte", "25,166,080"),
    "dram__throughput.avg.pct_of_peak_sustained_elapsed": ("%", "88.05"),
    "launch__registers_per_thread": ("register/thread", "128"),
    "launch__shared_mem_per_block_dynamic": ("byte/block", "98,304"), "gpu__time_duration.sum": ("nsecond", "112,416"),
}  # fmt: skip


def ncu_text(values):
    lines = ["==PROF== Connected to process 2583 (/usr/bin/python3.12)",
             '==PROF== Profiling "pool_forward_kernel" - 0: 0%....50%....100% - 4 passes', HEADER]  # fmt: skip
    for index, kernel in enumerate(("pool_forward_kernel", "pool_backward_kernel")):
        lines += [LINE.format(index, kernel, metric, *value) for metric, value in values.items()]
        lines.append(LINE.format(index, kernel, "sm__throughput.avg.pct_of_peak_sustained_elapsed", "", "n/a"))
    return "\n".join(lines)


def test_counters_are_read_and_stand_beside_the_formula():
    about = {"case": {"shape": "vit-b-16", "norm": False}, "bytes_by_formula": {"forward": 325e6, "backward": 650e6}}
    forward, backward = ncu.rows_of(ncu_text(VALUES), about)
    assert forward == {
        "shape": "vit-b-16", "norm": False, "kernel": "pool_forward_kernel", "grid": "(991, 1, 1)",
        "dram_read_bytes": 300105728, "dram_written_bytes": 25166080, "dram_percent": 88.05, "registers": 128,
        "shared_bytes": 98304, "duration_ns": 112416, "bytes_by_formula": 325e6, "bytes_measured": 325271808,
    }  # fmt: skip
    assert backward["kernel"] == "pool_backward_kernel" and backward["bytes_by_formula"] == 650e6


def test_counters_in_another_unit_are_refused():
    with pytest.raises(ValueError, match="ncu gives gpu__time_duration.sum in 'usecond'; 'ns' is needed"):
        ncu.launches(ncu_text({"gpu__time_duration.sum": ("usecond", "112.42")}))


def test_a_profiler_that_may_not_count_is_told(tmp_path, monkeypatch):
    said = "==ERROR== ERR_NVGPUCTRPERM - The user does not have permission to access NVIDIA GPU Performance Counters"
    fake = [sys.executable, "-c", f"import sys; open({str(tmp_path / 'log')!r}, 'w').write({said!r}); sys.exit(1)"]
    monkeypatch.setattr(ncu, "command_of", lambda case, log: fake)
    with pytest.raises(RuntimeError, match="ncu, exit code 1: ==ERROR== ERR_NVGPUCTRPERM"):
        ncu.measure(("vit-b-16",), tmp_path / "log")


def suite(*arguments, **environment):
    return subprocess.run(
        [sys.executable, ROOT / "benchmarks/gpu_suite.py", *arguments], capture_output=True, text=True,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", **environment},
    )  # fmt: skip


def test_without_a_gpu_it_says_so():
    done = suite()
    assert done.returncode == 3 and "no CUDA GPU: PyTorch" in done.stderr and done.stdout == ""


def test_without_pytorch_it_says_so():
    done = subprocess.run(
        [sys.executable, "-S", ROOT / "benchmarks/gpu_suite.py"], capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 3 and "PyTorch is not installed in" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "everything"], "--only: invalid choice: 'everything'"),
        (["--minutes", "0"], "--minutes 0.0: it must be more than 0"),
        (["--wheels", "nowhere"], "--wheels nowhere: no such folder"),
    ],
)
def test_wrong_arguments_are_named(arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        gpu_suite.parse(arguments)
    assert stopped.value.code == 2 and message in capsys.readouterr().err


def test_the_stages_run_what_is_there():
    """Every script exists and takes the arguments that the suite gives it."""
    options = gpu_suite.parse(["--only", "kernels", "tests", "--shapes", "vit-b-32", "--views", "8"])
    kernels, tests = sorted(gpu_suite.stages_of(options), key=lambda one: one.name)
    assert [one.name for one in gpu_suite.stages_of(gpu_suite.parse([]))] == list(gpu_suite.SHARES)
    assert "--shapes vit-b-32 --batch 256 --views 8" in " ".join(kernels.command) and tests.source != kernels.source
    for one in gpu_suite.stages_of(gpu_suite.parse([])):
        script, *arguments = one.command
        assert (ROOT / script).exists()
        module = importlib.import_module(Path(script).stem)
        if hasattr(module, "parse"):
            assert isinstance(module.parse(arguments), argparse.Namespace)


def a_wheel(folder):
    folder.mkdir()
    with zipfile.ZipFile(folder / "carried-1.0-py3-none-any.whl", "w") as archive:
        archive.writestr("carried.py", "VALUE = 7\n")
        archive.writestr("carried-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: carried\nVersion: 1.0\n")
        archive.writestr("carried-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\n")
        archive.writestr("carried-1.0.dist-info/RECORD", "")
    return folder


def test_an_environment_with_the_checkout_and_the_wheels(tmp_path):
    ignore = shutil.ignore_patterns(".venv*", ".git", "runs", "build", "*.egg-info", "__pycache__", "tests", "docs")
    source = shutil.copytree(ROOT, tmp_path / "source", ignore=ignore)  # a build leaves files in its source
    assert bootstrap.importable(ROOT) and not bootstrap.importable(source)
    folder, wheels = tmp_path / "environment", a_wheel(tmp_path / "wheels")
    python = bootstrap.prepare(source, folder, wheels)
    code = "import carried, torch, mvam_fast.kernels.tiles as t, mvam_fast.export; print(carried.VALUE, t.__file__)"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([python, "-c", code], capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.stdout.strip() == f"7 {source / 'kernels/tiles.py'}", done.stderr
    made = (folder / "prepared.json").stat().st_mtime_ns
    assert bootstrap.prepare(source, folder, wheels) == python
    assert (folder / "prepared.json").stat().st_mtime_ns == made
    (tmp_path / "empty").mkdir()
    with pytest.raises(SystemExit, match="--wheels .*empty: there is no wheel in it"):
        bootstrap.prepare(source, folder, tmp_path / "empty")
