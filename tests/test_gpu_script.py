"""The script of all GPU measurements: its parts, limits and comparison of weights."""

import json
import subprocess
import sys
import time

import pytest
import torch

from benchmarks import gpu


@pytest.fixture
def text(tmp_path):
    sentence = "Return the {}th value of the array, or raise ValueError if it is {}. "
    lines = [json.dumps({"text": sentence.format(i, i) * 4}) for i in range(200)]
    path = tmp_path / "text.jsonl"
    path.write_text("\n".join(lines))
    return path


def play(name, commands, tmp_path, monkeypatch, limit=60):
    part = gpu.Part(lambda setting: iter(commands), limit)
    monkeypatch.setitem(gpu.PARTS, name, part)
    setting = gpu.Setting(gpu.CARD, tmp_path, "model", None, None)
    return gpu.play(name, setting)


def test_a_part_ends_with_its_first_failure(tmp_path, monkeypatch):
    commands = [[sys.executable, "-c", f"raise SystemExit({code})"] for code in (0, 3, 0)]
    record = play("one", commands, tmp_path, monkeypatch)
    assert record["status"] == 3
    assert [command["status"] for command in record["commands"]] == [0, 3]


def test_a_part_beyond_its_limit_is_ended_with_its_children(tmp_path, monkeypatch):
    child = "import time; time.sleep(61.25)"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    started = time.monotonic()
    record = play("long", [[sys.executable, "-c", parent]], tmp_path, monkeypatch, limit=1)
    assert record["status"] == gpu.FAILED_IN_TIME
    assert time.monotonic() - started < 55
    running = subprocess.run(["pgrep", "-f", "sleep.61.25"], capture_output=True).stdout
    assert not running


def test_other_weights_are_found(tmp_path):
    folder = tmp_path / "SAE_models"
    folder.mkdir()
    weights = {"encoder.weight": torch.randn(3, 4)}
    for tag in ("once", "twice", "stopped"):
        torch.save(weights, folder / f"TopK_{tag}.pt")
    assert set(gpu.compare(tmp_path).values()) == {True}
    weights["encoder.weight"][0, 0] += 1e-6
    torch.save(weights, folder / "TopK_stopped.pt")
    assert gpu.compare(tmp_path) == {
        "TopK_once and twice": True,
        "TopK_once and stopped": False,
    }
    assert gpu.main(["--compare", str(tmp_path)]) == 1


def test_an_unknown_part_is_refused(capsys):
    with pytest.raises(SystemExit):
        gpu.parse_args(["speed"])
    assert "known are correctness same_bits" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("part", gpu.PARTS)
def test_every_part_runs_at_a_thousandth_of_its_size(text, tmp_path, part):
    options = ["--dry", "--data_path", str(text), "--output_dir", str(tmp_path)]
    assert gpu.main([part, *options]) == 0, (tmp_path / f"{part}.log").read_text()[-2000:]
    (record,) = json.loads((tmp_path / "gpu.json").read_text())["parts"]
    if part == "same_bits":
        assert len(record["figures"]) == 4 and all(record["figures"].values())
    if part == "sites":
        assert {"NormMSE", "KLDiv"} <= set(next(iter(record["figures"].values())))
    if part in ("one_model", "many_sites"):
        assert len(record["figures"]["groups"]["held"]) == 3
