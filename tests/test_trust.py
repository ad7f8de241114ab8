"""What files of other people may decide: recipes, exports, hub folders and files of options."""

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch
from test_security import run
from tqdm import tqdm

from src import checkpoint, config, export_formats, files, hub, page, plots, sources
from src.files import DEMO_LM
from src.interpreter import Interpreter
from src.model import build

HOSTILE = {
    "trust_remote_code": True,
    "output_dir": "/elsewhere",
    "overwrite": True,
    "api_base": "https://evil.example/v1",
    "api_key": "sk-of-the-recipe",
    "api_key_file": "/etc/passwd",
    "api_type": "azure",
    "engine": "evil",
    "use_wandb": True,
    "wandb_project": "evil",
    "device": "cuda:7",
    "device_map": {"": "meta"},
    "config": "/other.yaml",
    "SAE_path": ["/other.pt"],
    "prompts": "/etc/passwd",
    "resume": "never",
    "tag": "evil",
    "format": "saelens",
}


def save_sae(folder, **entries):
    """Path of a small TopK whose recipe has these entries."""
    torch.manual_seed(0)
    sae = build("TopK", 128, 4, {"latent_size": 16, "k": 2, "layer": 2})
    recipe = {"model": "TopK", "config": sae.config, "options": {"max_length": 16}}
    return checkpoint.save(sae, recipe | entries, folder, "TopK_x")


def hub_folder(path):
    sae, recipe = checkpoint.load(path)
    return export_formats.export(sae, recipe, path.parent, "hf")


def test_every_option_is_for_recipes_or_for_persons():
    assert config.PERSON_ONLY | config.FROM_RECIPE == set(config.OPTIONS)
    assert HOSTILE.keys() <= config.PERSON_ONLY
    for name in config.PERSON_ONLY:
        groups = set(config.OPTIONS[name].group.split())
        assert name in config.NEUTRAL or not groups & {"sae", "text", "training", "lm"}


@pytest.mark.parametrize("stage", config.STAGES)
@pytest.mark.parametrize("marks", ["format_version", "without"])
def test_a_recipe_given_as_config_decides_nothing_that_is_for_persons(tmp_path, stage, marks):
    path = save_sae(tmp_path).with_suffix(".json")
    recipe = json.loads(path.read_text())
    everything = {name: 1 for name in config.PERSON_ONLY} | HOSTILE
    recipe["options"] |= everything
    recipe |= everything | {"config": recipe["config"], "model_path": "org/lm"}
    if marks == "without":
        del recipe["format_version"]
    path.write_text(json.dumps(recipe))
    plain = vars(config.parse(stage, []))
    cfg = config.parse(stage, ["--config", str(path)])
    own = {"config": str(path), "SAE_path": [str(path.with_suffix(".pt"))]}
    for name in config.PERSON_ONLY & plain.keys():
        assert getattr(cfg, name) == own.get(name, plain[name]), name
    if "model_path" in plain:
        assert cfg.model_path == "org/lm"
    if "max_length" in plain:
        assert cfg.max_length == 16


@pytest.mark.parametrize("kind", ["checkpoint", "hub folder"])
def test_a_recipe_beside_weights_decides_nothing_that_is_for_persons(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(checkpoint.lm, "sizes_by_config", lambda *_: None)  # no hub is asked
    options = {"max_length": 16} | HOSTILE
    path = save_sae(tmp_path, options=options, model_path="org/lm", **{"output_dir": "/x"})
    if kind == "hub folder":
        path = hub_folder(path)
    for stage in ("evaluate", "apply", "steer", "export"):
        plain = vars(config.parse(stage, []))
        cfg = config.parse(stage, ["--SAE_path", str(path)])
        checkpoint.open_saes(cfg) if stage == "export" else checkpoint.open_all(cfg)
        for name in config.PERSON_ONLY & plain.keys() - {"SAE_path", "device"}:
            assert getattr(cfg, name) == plain[name], name


@pytest.mark.parametrize("door", ["SAE_path", "config"])
def test_code_of_a_language_model_that_a_recipe_names_is_not_run(tmp_path, capsys, door):
    lm = tmp_path / "lm"
    shutil.copytree(DEMO_LM, lm)
    about = json.loads((lm / "config.json").read_text()) | {"model_type": "mine"}
    about["auto_map"] = {"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M"}
    (lm / "config.json").write_text(json.dumps(about))
    (lm / "code.py").write_text(f"import os\nos.mkdir({str(tmp_path / 'ran')!r})\n")
    path = save_sae(tmp_path, options={"trust_remote_code": True}, model_path=str(lm))
    given = path if door == "SAE_path" else path.with_suffix(".json")
    argv = [f"--{door}", given, "--output_dir", tmp_path / "out", "--data_path", tmp_path]
    for more in ([], ["--trust_remote_code", "1"]):
        code, printed = run("evaluate", capsys, *argv, *more)
        assert code == 2 and "--trust_remote_code" in printed
        assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "options",
    [
        {"k": [4, "--trust_remote_code=1"]},
        {"k": ["--trust_remote_code", "1"]},
        {"text_key": ["a", "--trust_remote_code"]},
        {"route_shares": [0.5, "--overwrite"]},
    ],
)
def test_a_value_in_a_file_cannot_become_another_option(tmp_path, capsys, options):
    path = tmp_path / "c.json"
    path.write_text(json.dumps(options))
    with pytest.raises(SystemExit):
        config.parse("train", ["--config", str(path)])
    assert capsys.readouterr().err.count("\n") == 1


def test_a_contexts_file_decides_no_option(tmp_path):
    contexts = [{"activation": 9.0 - i, "context": f"the <fox> {i}"} for i in range(8)]
    entries = {"3": {"contexts": {"fox": contexts}}}
    content = {"title": "TopK_x", "options": HOSTILE, "latent_context_map": entries}
    path = tmp_path / "TopK_x_contexts.json"
    path.write_text(json.dumps(HOSTILE | content))
    argv = [str(path), "--output_dir", str(tmp_path / "out"), "--engine", "heuristic"]
    cfg = config.parse("interpret", argv)
    before = dict(vars(cfg))
    Interpreter(cfg).run()
    assert vars(cfg) == before
    written = [p for p in tmp_path.rglob("*") if p.is_file() and p != path]
    assert written and all(p.is_relative_to(tmp_path / "out" / "interpret") for p in written)


def test_every_line_of_the_page_on_security_names_tests_that_exist():
    page = (files.ROOT / "docs" / "security.md").read_text()
    rows = re.findall(r"^\|.*\|$", page, re.M)
    names = re.findall(r"\b(test_\w+)\.(test_\w+)", page)
    assert len(names) > len(rows) / 2
    for module, name in names:
        source = (files.ROOT / "tests" / f"{module}.py").read_text()
        assert f"def {name}(" in source, name


# -------------------------------------------------------------------------------- files of options

ALIASES = "a: &a [x,x,x]\n" + "".join(f"b{i}: &b{i} [*a,*a]\n" for i in range(3))


@pytest.mark.parametrize(
    "content",
    [
        ALIASES,
        "k: &x 4\nseed: *x\n",
        "k: " + "[" * 20000,
        "k: 4\n" * 300_000,
        b"\xff\xfek: 4",
        "tag: \x1b]0;owned\x07",
        '"\\e[31mx": 1',
        "seed: " + "1" * 5000,
        "seed: 18446744073709551616",
        "lr: 1e300",
        "norm_eps: 1e30",
        "k: {a: 1}",
        "k: [[1, 2], [3]]",
        "data_path: ''",
        "output_dir: ''",
    ],
)
@pytest.mark.parametrize("suffix", [".yaml", ".json"])
def test_a_hostile_file_of_options_is_one_line(tmp_path, capsys, content, suffix):
    path = tmp_path / f"c{suffix}"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(SystemExit) as stop:
        config.parse("train", ["--config", str(path)])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1 and "\x1b" not in error


def test_secrets_in_a_list_are_not_shown(tmp_path, capsys):
    path = tmp_path / "c.yaml"
    path.write_text("api_key: [sk-one-secret-123456, sk-two-secret-123456]\n")
    with pytest.raises(SystemExit):
        config.parse("interpret", ["--config", str(path)])
    error = capsys.readouterr().err
    assert "api_key takes one value" in error and "sk-" not in error


def test_a_bare_yes_is_an_answer(tmp_path):
    path = tmp_path / "c.yaml"
    for text, value in (("yes", "yes"), ("no", "no"), ("auto", "auto")):
        path.write_text(f"compile_lm: {text}\noverwrite: yes\n")
        cfg = config.parse("train", ["--config", str(path)])
        assert cfg.compile_lm == value and cfg.overwrite is True


# ----------------------------------------------------------------------------------- what is typed


@pytest.mark.parametrize(
    "argv",
    [
        ["--seed", str(2**63)],
        ["--dead_tokens", str(10**40)],
        ["--lr", "1e300"],
        ["--norm_eps", "1e300"],
        ["--data_path", ""],
        ["--model_path", "a\0b"],
        ["--device_map", '{"": [1]}'],
        ["--output_dir", ""],
        ["--model_path", ""],
        ["--config", ""],
    ],
)
def test_values_that_no_computation_can_use_are_one_line(capsys, argv):
    with pytest.raises(SystemExit) as stop:
        config.parse("train", argv)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and argv[0] in error and error.count("\n") == 1


@pytest.mark.parametrize(
    "argv",
    [["--timeout", "1e300"], ["--requests_per_minute", "1e-300"], ["--concurrency", "1000000000"]],
)
def test_waits_that_no_clock_can_keep_and_threads_without_number_are_refused(capsys, argv):
    with pytest.raises(SystemExit) as stop:
        config.parse("interpret", argv)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and argv[0] in error and error.count("\n") == 1


@pytest.mark.parametrize("option", ["--context_length", "--top_n"])
def test_contexts_that_no_memory_holds_are_refused(capsys, option):
    with pytest.raises(SystemExit) as stop:
        config.parse("apply", [option, str(2**62)])
    assert stop.value.code == 2 and option in capsys.readouterr().err


@pytest.mark.parametrize("value", ["1e-300", "1e300", "-1", "nan"])
def test_a_temperature_beyond_float32_is_refused(capsys, value):
    with pytest.raises(SystemExit):
        config.parse("steer", ["--temperature", value])
    assert "--temperature" in capsys.readouterr().err
    assert config.parse("steer", ["--temperature", "0.0001"]).temperature == 1e-4


def test_a_steering_value_beyond_float32_is_refused(capsys):
    with pytest.raises(SystemExit):
        config.parse("steer", ["--set", "1=1e39"])
    assert "is not LATENT=VALUE" in capsys.readouterr().err


def test_a_value_given_twice_trains_one_sae():
    assert config.parse("train", ["--k", "4", "4", "--layer", "2", "2"]).k == [4]


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate "
                     "memory: you tried to allocate 8000000000000 bytes."),
    ],
)  # fmt: skip
def test_memory_that_ends_on_the_cpu_is_one_line(capsys, error):
    def fail(cfg):
        raise error

    assert config.run_stage("evaluate", fail, []) == 2
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1 and "lower --batch_size" in printed


# ----------------------------------------------------------------------- what a terminal would obey

ESCAPE = "\x1b]0;owned\x07\x1b[2J"


def test_stages_print_no_control_characters(capsys):
    def show(cfg):
        print(f"title {ESCAPE}\u202e")
        print(f"path {ESCAPE}", flush=True)

    assert config.run_stage("evaluate", show, []) == 0
    out = capsys.readouterr().out
    assert "\x1b" not in out and "\u202e" not in out and "\\x1b]0;owned\\x07" in out


@pytest.mark.parametrize("place", ["model_path", "title", "file name", "config title"])
def test_what_a_recipe_or_a_name_holds_is_spelt_out(tmp_path, capsys, place):
    path = save_sae(tmp_path, model_path=str(DEMO_LM))
    recipe = json.loads(path.with_suffix(".json").read_text())
    (tmp_path / "t.jsonl").write_text(json.dumps({"text": "Some words. " * 30}))
    argv = ["--SAE_path", path, "--data_path", tmp_path / "t.jsonl", "--split", "all"]
    argv += ["--model_path", DEMO_LM, "--output_dir", tmp_path / "out", "--max_samples", "2"]
    if place == "model_path":
        recipe["model_path"] = f"/x/{ESCAPE}"
        path.with_suffix(".json").write_text(json.dumps(recipe))
    elif place == "file name":
        name = tmp_path / "TopK_\x1b[31mred.pt"
        shutil.move(path, name)
        argv[1] = name
    elif place == "title":
        path.with_suffix(".json").write_text(json.dumps(recipe | {"title": f"T{ESCAPE}"}))
    else:
        other = tmp_path / "r.json"
        other.write_text(json.dumps(recipe | {"title": f"T{ESCAPE}"}))
        argv += ["--config", other]
    _, printed = run("evaluate", capsys, *argv)
    assert "\x1b" not in printed and "\x07" not in printed and "\\x1b" in printed


def test_standard_error_gets_bars_and_no_other_control_characters(tmp_path, capsys):
    def show(cfg):
        with tqdm(range(2), f"bar {ESCAPE}", mininterval=0) as outer, tqdm(range(2), "inner"):
            outer.update()
        print(f"library {ESCAPE}\r", file=sys.stderr)

    assert config.run_stage("evaluate", show, ["--output_dir", str(tmp_path)]) == 0
    error = capsys.readouterr().err
    assert error.startswith("\rbar \\x1b]0;owned")
    assert "\x1b" not in error.replace("\x1b[A", "") and "\x07" not in error
    assert "library \\x1b]0;owned\\x07\\x1b[2J\\r\n" in error


def test_an_interruption_and_a_traceback_spell_escapes_out(tmp_path):
    script = (
        "import sys; from src.config import run_stage\n"
        "def fail(cfg): raise eval(sys.argv[1])\n"
        "sys.exit(run_stage('evaluate', fail, ['--output_dir', sys.argv[2]]))"
    )
    secret = "canary-5e1f0c27"
    for error, code in (("KeyError", 1), ("RuntimeError", 1), ("KeyboardInterrupt", 130)):
        argv = [sys.executable, "-c", script, f"{error}({ESCAPE + secret!r})", str(tmp_path)]
        environment = os.environ | {"HF_TOKEN": secret}
        process = subprocess.run(
            argv, cwd=files.ROOT, capture_output=True, text=True, env=environment, check=False
        )
        assert process.returncode == code
        assert "\x1b" not in process.stderr and "x1b]0;owned" in process.stderr
        assert secret not in process.stderr


def test_a_line_break_in_a_file_name_begins_no_line(tmp_path, capsys):
    name = tmp_path / "a\nsaved b.jsonl"
    good = [json.dumps({"text": f"Document {i} has some words."}) for i in range(300)]
    name.write_text("\n".join(["damaged", *good]))
    argv = ["--data_path", name, "--model_path", DEMO_LM, "--output_dir", tmp_path / "out"]
    sizes = ["--latent_size", "32", "--k", "2", "--max_length", "32", "--max_samples", "8"]
    code, printed = run("train", capsys, *argv, *sizes, "--split", "all")
    assert code == 0 and "skipped 1 not JSON; first at" in printed
    assert "\nsaved b.jsonl" not in printed.replace(f"{name}: skipped", "")


def test_programs_beside_the_stages_print_no_control_characters(tmp_path, capsys, monkeypatch):
    bad = f"x{ESCAPE}"
    (tmp_path / "eval").mkdir()
    result = {"title": bad, "NormMSE": 0.5, "sites": [1], "L0": 2.0, "tokens": 5}
    (tmp_path / "eval" / "a.json").write_text(json.dumps(result))
    (tmp_path / "c.json").write_text("[1]")
    programs = [
        (hub, ["hub", bad, bad]),
        (plots, ["plots", str(tmp_path / "eval"), str(tmp_path / "p.png")]),
        (page, ["page", str(tmp_path / "c.json"), str(tmp_path / bad)]),
        (sources, ["sources", str(tmp_path / bad), str(tmp_path / "data")]),
    ]
    for module, argv in programs:
        monkeypatch.setattr(sys, "argv", argv)
        with contextlib.suppress(SystemExit, ValueError, OSError, LookupError):
            module.main()
        printed = capsys.readouterr()
        assert "\x1b" not in printed.out + printed.err, module


def test_a_name_that_is_not_utf8_ends_no_run(tmp_path, capsys):
    name = os.fsdecode(b"T\xff.pt")
    code, printed = run("evaluate", capsys, "--SAE_path", tmp_path / name)
    assert code == 2 and printed.count("\n") == 1 and files.printable(printed) == printed
