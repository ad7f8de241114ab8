"""Caches and results of tests stay in their own folders; a test that nobody ran is a failure."""

import os
import re
import shutil

import pytest

# Reasons for which a test may be skipped. Any other skip fails the run.
ALLOWED_SKIPS = {
    r"no command on this page": "a page of the docs without a command has none to run",
    r"its latents are drawn per position": "RandomK's code of a text depends on its place in a row",
    r"a C library without mallinfo2": "only glibc 2.33 and later reports its free memory",
    r"this CPU has no fast bfloat16": "the bfloat16 path is taken by no tensor here",
    r"triton is not installed": "Triton exists for Linux alone",
    r"bash tests/interop/run.sh makes the environment": "they have their own environment",
    r"bash tests/interop/run.sh": "they have their own environment",
}
if os.name != "posix" or not shutil.which("apt-get") or os.geteuid() != 0:
    ALLOWED_SKIPS["no chromium is installed"] = "scripts/test.sh can install it on Debian alone"

_unexpected = []


@pytest.fixture(autouse=True)
def _own_folders(tmp_path, monkeypatch):
    monkeypatch.setenv("DATA_DIR", str(tmp_path / "data_dir"))
    for name in ("MODEL_PATH", "DATA_PATH", "OUTPUT_DIR"):
        monkeypatch.delenv(name, raising=False)


def note_skip(report):
    reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    if not any(re.search(pattern, reason) for pattern in ALLOWED_SKIPS):
        _unexpected.append(f"{report.nodeid}: {reason}")


def pytest_runtest_logreport(report):
    if report.skipped and not hasattr(report, "wasxfail"):
        note_skip(report)


def pytest_collectreport(report):
    if report.skipped:
        note_skip(report)


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session, exitstatus):
    if _unexpected and exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter):
    for line in _unexpected:
        terminalreporter.write_line(f"UNEXPECTED SKIP {line}", red=True)
