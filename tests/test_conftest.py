"""A skip that is not on the list fails the run."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize(
    "reason, code", [("a package is missing", 1), ("its latents are drawn per position of", 0)]
)
def test_only_listed_skips_are_accepted(tmp_path, reason, code):
    (tmp_path / "conftest.py").write_text((ROOT / "tests" / "conftest.py").read_text())
    skipped = f"def test_skipped():\n    pytest.skip({reason!r})\n"
    test = f"import pytest\n\n{skipped}\ndef test_passed():\n    pass\n"
    (tmp_path / "test_skip.py").write_text(test)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tmp_path)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == code, done.stdout
    assert ("UNEXPECTED SKIP" in done.stdout) == bool(code)
