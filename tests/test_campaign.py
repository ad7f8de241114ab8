"""A few trials of the campaign, so that it runs when it is needed."""

import json
import subprocess
import sys

import pytest

from src import files


@pytest.mark.slow
def test_a_few_trials_of_the_campaign_hold(tmp_path):
    kinds = ["recipe and weights", "labels and contexts", "torn contexts"]
    command = [sys.executable, "-m", "tests.campaign", "--trials", "4", "--jobs", "1"]
    process = subprocess.run(
        [*command, "--out", str(tmp_path), "--only", *kinds],
        cwd=files.ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 0, process.stdout + process.stderr
    results = json.loads((tmp_path / "campaign.json").read_text())["results"]
    assert results.keys() == set(kinds)
    for kind in kinds:
        for trial in results[kind].values():
            assert trial["identical"] and trial.get("whole", True), (kind, trial)
            assert not trial["secrets"]
