"""What is said of compute-sanitizer's tools: by a script that stands for it."""

import os
import sys
import time

import pytest

from benchmarks import sanitize

FAKE = """#!{python}
import os, subprocess, sys, time
arguments = sys.argv[1:]
tool, command = arguments[arguments.index("--tool") + 1], arguments[arguments.index("--error-exitcode") + 2:]
assert "--target-processes" in arguments and os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] == "1"
print("========= COMPUTE-SANITIZER")
print(tool, *command[1:], flush=True)
{body}
"""
BODY = """
if command[1] == "-c":
    print("========= ERROR SUMMARY: 0 errors")
elif tool == "memcheck":
    print("========= ERROR SUMMARY: 0 errors")
elif tool == "racecheck":
    print("========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)")
elif tool == "initcheck":
    print("========= ERROR SUMMARY: 0 errors")
    print("========= ERROR SUMMARY: 3 errors")
    sys.exit(99)
else:
    time.sleep(1000)
"""


@pytest.fixture
def fake(tmp_path, monkeypatch):
    def put(body):
        script = tmp_path / "bin" / "compute-sanitizer"
        script.parent.mkdir(exist_ok=True)
        script.write_text(FAKE.format(python=sys.executable, body=body))
        script.chmod(0o755)
        monkeypatch.setenv("PATH", f"{script.parent}{os.pathsep}{os.environ['PATH']}")

    return put


def test_a_line_and_a_log_for_each_tool(fake, tmp_path, capsys):
    fake(BODY)
    start = time.monotonic()
    assert sanitize.main(["--out", str(tmp_path / "out"), "--minutes", "0.05"]) == 1
    assert time.monotonic() - start < 30
    assert capsys.readouterr().out.splitlines() == [
        "memcheck: clean, ERROR SUMMARY: 0 errors",
        "racecheck: clean, RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)",
        "initcheck: found, ERROR SUMMARY: 3 errors",
        "synccheck: unfinished, not through in 3 s",
    ]
    for tool in sanitize.TOOLS:
        text = (tmp_path / "out" / f"{tool}.log").read_text()
        assert f"{tool} -m dwconv_kernels.self_check --quick --jobs 1" in text
    assert sanitize.main(["--out", str(tmp_path / "out"), "--tools", "memcheck", "racecheck"]) == 0


@pytest.mark.parametrize(
    ("text", "code", "kind", "said"),
    [
        ("========= ERROR SUMMARY: 2 errors", 99, "found", "ERROR SUMMARY: 2 errors"),
        ("========= ERROR SUMMARY: 2 errors", None, "found", "ERROR SUMMARY: 2 errors"),
        ("========= ERROR SUMMARY: 10 errors", 99, "found", "ERROR SUMMARY: 10 errors"),
        (
            "RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)",
            0,
            "found",
            "RACECHECK SUMMARY: 1 hazard displ",
        ),
        ("========= ERROR SUMMARY: 0 errors\n2 failed", 1, "failed", "exit code 1: 2 failed"),
        ("Segmentation fault", -11, "failed", "exit code -11, without a summary: Segmentation fault"),
        ("", 0, "failed", "exit code 0, without a summary: nothing was printed"),
        ("ok", None, "unfinished", "not through in 5 s"),
        ("ok\n========= Invalid __global__ write of size 4 bytes\n", None, "found", "Invalid __global__ write of size"),
        ("========= Error: Race reported between Write access", None, "found", "Error: Race reported between Write"),
        ("========= ERROR SUMMARY: 0 errors", 0, "clean", "ERROR SUMMARY: 0 errors"),
    ],
)
def test_judgement(text, code, kind, said):
    outcome = sanitize.judge("a tool", text, code, 5)
    assert outcome.kind == kind
    assert outcome.said.startswith(said)


def test_where_it_is_not_there_or_does_not_run(fake, tmp_path, capsys, monkeypatch):
    fake("sys.exit('Error: the driver is too old')")
    assert sanitize.main(["--out", str(tmp_path / "out")]) == 2
    assert "does not run here: memcheck: failed, exit code 1, without a summary: Error: the" in capsys.readouterr().err
    monkeypatch.setattr(sanitize.shutil, "which", lambda name: None)
    assert sanitize.main(["--out", str(tmp_path / "out")]) == 2
    assert "compute-sanitizer is not there" in capsys.readouterr().err
