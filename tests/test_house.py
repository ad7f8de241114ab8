"""Rules of the house, read from the source: floors, owners of mechanisms, quick help, scripts."""

import ast
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from src.zoo import ZOO

ROOT = Path(__file__).resolve().parent.parent
SOURCES = {path.stem: path for path in sorted((ROOT / "src").glob("*.py"))}
# A file imports only files of lower floors. The entries at the root are floor 6 too.
FLOORS = (
    "zoo stage_help names files contexts draws config_file hub metric_table",
    "device kernels sparse ops router sparsity distributed sources tracking interrupt "
    "endpoint gguf_file rule_labels tensor_files plot_style",
    "sae reference identity auxk feature_files text_labels result_table",
    "model data lm metrics config latent_notes formats neuronpedia",
    "hooks checkpoint published import_formats export_formats demo events sae_training estimate "
    "page steering probing union",
    "trainer evaluator applier interpreter steerer reader plots",
    "utils explorer server",
)
# Exceptions: (file, the file of the same floor that it imports).
SAME_FLOOR = {
    ("device", "kernels"),
    ("ops", "device"),
    ("sparse", "device"),
    ("checkpoint", "import_formats"),
    ("import_formats", "published"),
    ("estimate", "hooks"),
    ("steering", "hooks"),
    ("config_file", "files"),
    ("hub", "files"),
    ("zoo", "stage_help"),
}
ENTRIES = (
    *("train.py", "evaluate.py", "apply.py", "interpret.py"),
    *("steer.py", "export.py", "explore.py"),
)
STAGES = ("sae_training", "trainer", "evaluator", "applier", "interpreter", "steerer")
MAX_HELP_SECONDS = 1.0


def floor_of(name):
    (floor,) = (number for number, names in enumerate(FLOORS) if name in names.split())
    return floor


def imported_modules(tree):
    """Full names of the modules that code imports, at any depth."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module == "src":
            yield from (f"src.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


def without_main(tree):
    """The module without its main(): that is an entry, which may import the command line."""
    body = [node for node in tree.body if getattr(node, "name", "") != "main"]
    return ast.Module(body, [])


def test_files_import_only_from_lower_floors():
    exceptions = set()
    for name in SOURCES.keys() - {"__init__"}:
        tree = without_main(ast.parse(SOURCES[name].read_text()))
        for module in imported_modules(tree):
            if module.startswith("src."):
                other = module.split(".")[1]
                if floor_of(other) >= floor_of(name):
                    exceptions.add((name, other))
    assert exceptions == SAME_FLOOR


def test_the_command_line_belongs_to_config():
    for name, path in SOURCES.items():
        # `from argparse import Namespace` only names a type.
        assert name == "config" or not re.search(r"\bimport argparse\b", path.read_text()), name


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_names_no_model(stage):
    models = "|".join(ZOO)
    assert not re.search(rf"\b({models})\b", SOURCES[stage].read_text())


SHAPE_QUESTIONS = (
    r"hasattr\((self\.|\w+\.)?sae",
    r"isinstance\((self\.|\w+\.)?sae,",
    r"\.latents\.dim\(\)",
    r"(out|output|clean)\.weights is (not )?None",
)


@pytest.mark.parametrize("stage", [*STAGES, "reader", "events", "estimate", "hooks"])
def test_a_stage_asks_an_sae_through_its_interface(stage):
    source = SOURCES[stage].read_text()
    found = [
        match.group() for question in SHAPE_QUESTIONS for match in re.finditer(question, source)
    ]
    assert not found, f"{stage}.py asks for an SAE's shape; add a method to src/sae.py"


@pytest.mark.parametrize("name", ["sae", "model", "router", "sparsity", "ops", "reference"])
def test_the_science_does_not_know_of_processes(name):
    modules = set(imported_modules(ast.parse(SOURCES[name].read_text())))
    assert not modules & {"src.distributed", "torch.distributed"}


def run_python(*command):
    """(the finished process, its CPU seconds)"""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    user, system = after.ru_utime - before.ru_utime, after.ru_stime - before.ru_stime
    return done, user + system


def check_help(*command, expected):
    # importtime lists every import on standard error.
    done, seconds = run_python("-X", "importtime", *command, "--help")
    assert done.returncode == 0 and expected in done.stdout, done.stderr
    assert not re.search(r"\| +torch$", done.stderr, re.M)
    assert seconds < MAX_HELP_SECONDS


@pytest.mark.parametrize("entry", ENTRIES)
def test_help_of_an_entry_is_quick(entry):
    check_help(entry, expected="--output_dir")


@pytest.mark.parametrize("module", ["src.hub", "src.page", "src.plots", "src.sources"])
def test_help_of_a_module_is_quick(module):
    check_help("-m", module, expected=f"python -m {module}")


@pytest.mark.parametrize(
    "module",
    [
        "src.config",
        "src.interpreter",
        "src.rule_labels",
        "src.text_labels",
        "src.contexts",
        "src.metric_table",
        "src.page",
        "src.plots",
    ],
)
def test_modules_without_tensors_do_not_import_torch(module):
    done, _ = run_python("-c", f"import sys, {module}; assert 'torch' not in sys.modules")
    assert done.returncode == 0, done.stderr


def calls_in(tree):
    """(name of the called function or method, the call)"""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield getattr(node.func, "attr", getattr(node.func, "id", "")), node


def is_fixed_pattern(node):
    """A pattern of constants, and of names that went through glob.escape or safe_name."""
    if isinstance(node, ast.Constant):
        return True
    if not isinstance(node, ast.JoinedStr):
        return False
    values = [part.value for part in node.values if isinstance(part, ast.FormattedValue)]
    return all(
        getattr(value, "id", "").isupper()
        or re.match(r"(glob\.escape|files\.safe_name)\(", ast.unparse(value))
        for value in values
    )


@pytest.mark.parametrize(
    "path", [*SOURCES.values(), *map(ROOT.joinpath, ENTRIES), ROOT / "experiments/paper_figures.py"]
)
def test_records_json_and_patterns_have_one_owner_each(path):
    tree = ast.parse(path.read_text())
    # Integers of 5,000 digits are a ValueError, deep nesting is a RecursionError.
    names = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    assert "JSONDecodeError" not in names, "files.parse_json raises ValueError for all of it"
    for name, call in calls_in(tree):
        place = f"{path.name}:{call.lineno}"
        assert name != "splitlines", f"{place}: use files.text_records or files.first_line"
        if ast.unparse(call.func) in ("json.loads", "json.load"):
            is_copy = isinstance(call.args[0], ast.Call)  # json.loads(json.dumps(...))
            assert is_copy or path.stem == "files", f"{place}: use files.parse_json"
        if name in ("glob", "rglob", "newest") and len(call.args) in (1, 2):
            is_owner = path.stem in ("files", "sources")
            is_fixed = name == "newest" and len(call.args) == 1
            message = f"{place}: a name in a pattern needs glob.escape"
            assert is_owner or is_fixed or is_fixed_pattern(call.args[-1]), message
        options = {keyword.arg for keyword in call.keywords}
        assert "data_files" not in options, f"{place}: it takes patterns; use sources.Documents"


def test_every_model_has_its_script():
    for name in ZOO:
        script = ROOT / "scripts" / f"train_{name.lower()}.sh"
        assert f"--model {name} " in script.read_text()


@pytest.mark.parametrize("page", ["security", "comparison", "formats"])
def test_tests_that_a_page_names_exist(page):
    named = re.findall(r"\b(test_\w+)\.(test_\w+)", (ROOT / "docs" / f"{page}.md").read_text())
    for module, test in named:
        assert f"def {test}(" in (ROOT / "tests" / f"{module}.py").read_text(), f"{module}.{test}"


def test_every_page_is_reached_by_a_link_and_no_link_is_broken():
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
    reached = set()
    for page in pages:
        for link in re.findall(r"\]\((?!http)([^)#]+)[^)]*\)", page.read_text()):
            if not link.startswith("../../actions"):
                assert (page.parent / link).exists(), f"{page.name}: {link}"
                reached.add((page.parent / link).resolve())
    assert {page.name for page in pages[1:] if page not in reached} == set()


def test_every_file_of_src_has_one_place_in_the_map():
    for readme, head in (("README.md", "## File map"), ("README.zh.md", "## 文件一览")):
        places = re.findall(r"`(?:src/)?(\w+)\.py`", (ROOT / readme).read_text().split(head)[1])
        assert sorted(places) == sorted(SOURCES.keys() - {"__init__"}), readme


def test_scripts_parse():
    for script in [*(ROOT / "scripts").glob("*.sh"), ROOT / ".ci" / "run"]:
        assert subprocess.run(["bash", "-n", str(script)]).returncode == 0, script


SPINS = "import os, src; print(os.environ.get('GOMP_SPINCOUNT'))"


def test_waiting_threads_give_up_their_core_early_unless_told_otherwise():
    """The variable is read when PyTorch is loaded, so no stage may load that before src."""
    for given, expected in (
        ({}, "1000"),
        ({"GOMP_SPINCOUNT": "7"}, "7"),
        ({"OMP_WAIT_POLICY": "ACTIVE"}, "None"),
    ):
        command = [sys.executable, "-S", "-c", SPINS]
        printed = subprocess.check_output(command, cwd=ROOT, env={"PATH": ""} | given, text=True)
        assert printed.strip() == expected
    for stage in ("train", "evaluate", "apply", "interpret", "steer", "export"):
        first = next(
            node
            for node in ast.parse((ROOT / f"{stage}.py").read_text()).body
            if isinstance(node, ast.Import | ast.ImportFrom)
        )
        assert first.module.startswith("src")
