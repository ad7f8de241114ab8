"""What a run will need is said before it starts and held against what happened."""

import json
import platform
import re
import subprocess
import sys

import pytest
import torch

from src import estimate
from src.config import parse
from src.files import DEMO_LM, ROOT
from src.lm import get_language_model
from src.model import build
from src.trainer import Trainer


def test_memory_and_time_stand_before_the_run_at_its_end_and_in_the_recipe(tmp_path, capsys):
    text = tmp_path / "text.jsonl"
    text.write_text(
        "\n".join(
            json.dumps({"text": f"Return the {i}th of {i * 7} values. " * 5}) for i in range(60)
        )
    )
    sizes = [
        "--latent_size",
        "64",
        "--k",
        "4",
        "--max_length",
        "32",
        "--batch_size",
        "4",
        "--max_samples",
        "40",
    ]
    where = [
        "--model_path",
        str(DEMO_LM),
        "--data_path",
        str(text),
        "--output_dir",
        str(tmp_path / "out"),
    ]
    Trainer(parse("train", [*where, *sizes])).run()
    said = capsys.readouterr().out
    assert re.search(r"together \d+\.\d\d GB\. Time: .* for 10 steps", said)
    assert (
        said.index("memory by estimate")
        < said.index("estimated and used: memory")
        < said.index("saved ")
    )
    found = json.loads((tmp_path / "out" / "SAE_models" / "TopK_text.json").read_text())["estimate"]
    assert set(found) == {"memory_gb", "memory_gb_used", "seconds", "seconds_used"} and all(
        value > 0 for value in found.values()
    )


def test_timing_a_step_changes_no_weight_and_leaves_no_gradient():
    _, lm = get_language_model(str(DEMO_LM), "cpu", dtype="float32")
    saes = [
        build(name, 128, 16, {"latent_size": 64, "k": 4})
        for name in ("TopK", "RouteSAE", "Crosscoder", "BatchTopK")
    ]
    saes.append(
        build("RouteSAE", 128, 16, {"latent_size": 64, "k": 4, "router_objective": "advantage"})
    )  # its loss keeps a running mean
    before = [
        {k: v.clone() for k, v in (*sae.named_parameters(), *sae.named_buffers())} for sae in saes
    ]

    class Text:
        max_length = 16

        def __len__(self):
            return 3

        def batch(self, rows):
            from src.data import Batch

            ids = torch.randint(3, 4000, (len(rows), 16))
            return Batch(
                ids,
                torch.ones_like(ids, dtype=torch.bool),
                torch.zeros_like(ids),
                torch.arange(len(rows)),
            )

    seconds, size = estimate.step_cost(saes, lm, Text(), 8, list(range(4, 13)), "cpu")
    assert seconds > 0 and size > 0
    assert estimate.step_cost(saes[:1], lm, Text(), 8, [12], "cpu")[1] < size
    whole, tried = saes[0].autoencode, []

    def limited(x, **more):
        tried.append(len(x))
        if len(x) > 20:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return whole(x, **more)

    saes[0].autoencode = limited
    assert estimate.step_cost(saes[:1], lm, Text(), 8, [12], "cpu")[0] > 0 and tried[:3] == [
        48,
        16,
        16,
    ]
    for sae, tensors in zip(saes, before, strict=True):
        now = dict((*sae.named_parameters(), *sae.named_buffers()))
        assert all(
            torch.equal(now[k], v) or (v.isnan().all() and now[k].isnan().all())
            for k, v in tensors.items()
        )
        assert all(p.grad is None for p in sae.parameters())


def test_durations_read_as_people_say_them():
    assert [estimate.duration(s) for s in (0.25, 75, 3600, 90061)] == [
        "0.25 s",
        "1 min 15 s",
        "1 h",
        "1 d 1 h",
    ]


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_memory_that_a_step_frees_stays_for_the_next_one():
    code = """
import resource, sys, torch
from src import checkpoint  # the heap of a stage: with torch alone glibc frees less
from src.device import pick_device
if sys.argv[1] == "kept":
    pick_device("cpu")
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
def work():
    return [torch.ones(2 << 20) for _ in range(4)]
for _ in range(5):  # until the heap has its size
    work()
before = faults()
for _ in range(10):
    work()
print(faults() - before)
"""
    kept, not_kept = (
        int(subprocess.check_output([sys.executable, "-c", code, how], cwd=ROOT))
        for how in ("kept", "not")
    )
    assert kept < 0.5 * not_kept
