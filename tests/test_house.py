"""The house keeps its shape: floors, no model's name in the stages, names where they are documented, scripts that parse."""

import ast
import importlib
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from src.zoo import ZOO

ROOT = Path(__file__).resolve().parent.parent
FLOOR = {
    "zoo": 0,
    "ops": 0,
    "files": 0,
    "contexts": 0,
    "sae": 0.5,
    "model": 1,
    "data": 1,
    "lm": 1,
    "metrics": 1,
    "events": 0,
    "plots": 1,
    "page": 1,
    "config": 1,
}
FLOOR |= {
    "distributed": 0,
    "router": 0.5,
    "formats": 1.5,
    "hooks": 2,
    "checkpoint": 2,
    "demo": 2,
    "sae_training": 2,
}
FLOOR |= {
    "trainer": 3,
    "evaluator": 3,
    "applier": 3,
    "interpreter": 3,
    "steerer": 3,
    "reader": 3,
    "utils": 4,
}
FLOOR |= {
    "kernels": -1,
    "device": 1,
    "hub": 0,
    "config_file": 0,
    "tracking": 0.5,
    "sources": 0.5,
    "estimate": 2.5,
}


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            yield from (
                [f"src.{a.name}" for a in node.names] if node.module == "src" else [node.module]
            )
        elif isinstance(node, ast.Import):
            yield from (a.name for a in node.names)


def test_every_file_imports_only_from_lower_floors():
    for path in (ROOT / "src").glob("*.py"):
        if path.stem == "__init__":
            continue
        for name in imports(path):
            if name.startswith("src."):
                assert FLOOR[name.split(".")[1]] < FLOOR[path.stem], f"{path.name} imports {name}"


def test_stages_name_no_model_and_the_door_has_no_bodies():
    for stage in ("sae_training", "trainer", "evaluator", "applier", "interpreter", "steerer"):
        assert not re.search(
            rf"\b({'|'.join(ZOO)})\b", (ROOT / "src" / f"{stage}.py").read_text()
        ), stage
    assert not re.search(r"^\s*(def|class) ", (ROOT / "src" / "utils.py").read_text(), re.M)


def test_documented_names_are_importable():
    names = {
        "src.model": "TopK RouteSAE Vanilla Gated JumpReLU Crosscoder MLSAE RandomK get_model Jump_func Step_func",
        "src.data": "OpenWebTextDataset create_dataloader",
        "src.utils": "set_seed parse_args get_language_model get_outputs pre_process Normalized_MSE_loss L1_loss unit_norm_decoder wandb_init "
        "log_layers save_json hook_SAE RouteHook hook_RouteSAE LinearWarmupLR",
        "src.trainer": "Trainer",
        "src.evaluator": "Evaluator",
        "src.applier": "Applier",
        "src.interpreter": "Interpreter",
        "src.steerer": "Steerer",
        "src.metrics": "KLDiv",
    }
    for module, wanted in names.items():
        for name in wanted.split():
            assert hasattr(importlib.import_module(module), name), f"{module}.{name}"


@pytest.mark.parametrize(
    "entry", ["train.py", "evaluate.py", "apply.py", "interpret.py", "steer.py", "export.py"]
)
def test_help_is_quick_and_does_not_import_torch(entry):
    started = time.time()
    code = f"import sys, runpy; sys.argv=['{entry}', '--help']\ntry: runpy.run_path('{entry}', run_name='__main__')\nexcept SystemExit: pass\n"
    done = subprocess.run(
        [sys.executable, "-c", code + "assert 'torch' not in sys.modules"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and "--output_dir" in done.stdout, done.stderr
    assert (
        time.time() - started < 10
    )  # seconds; an import of torch and transformers takes longer on a cold cache


@pytest.mark.parametrize("module", ["src.interpreter", "src.contexts", "src.page", "src.plots"])
def test_modules_that_read_texts_and_results_do_not_import_torch(module):
    code = f"import sys, {module}; assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_every_model_has_its_script_and_scripts_parse():
    for name in ZOO:
        assert f"--model {name} " in (ROOT / "scripts" / f"train_{name.lower()}.sh").read_text()
    for script in [*(ROOT / "scripts").glob("*.sh"), ROOT / ".ci" / "run"]:
        assert subprocess.run(["bash", "-n", str(script)]).returncode == 0, script
