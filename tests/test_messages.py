"""What the stages print, and that errors name the remedy."""

import json
import re
import shutil

import pytest
from test_security import run
from test_trust import save_sae

from src import files, latent_notes
from src.files import DEMO_LM

SENTENCE = "Return the {}th value of the array, or raise ValueError if {} exceeds its size. "


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with a text."""
    folder = tmp_path_factory.mktemp("home")
    lines = [json.dumps({"text": SENTENCE.format(i, i * 7) * 3}) for i in range(120)]
    (folder / "text.jsonl").write_text("\n".join(lines))
    return folder


def place(home):
    return ["--model_path", DEMO_LM, "--output_dir", home / "out", "--dtype", "float32"]


def text_argv(home):
    sizes = "--max_length 32 --batch_size 4 --max_samples 24 --split all".split()
    return [*place(home), "--data_path", home / "text.jsonl", *sizes]


def sae_path(home, title):
    return home / "out" / "SAE_models" / f"{title}.pt"


@pytest.fixture(scope="module")
def trained(home):
    """(the folder, what a training of three SAEs printed)"""
    import contextlib
    import io

    from src.config import run_stage
    from src.trainer import Trainer

    argv = [*text_argv(home), *"--model TopK RouteSAE --layer 4 12 --latent_size 64 --k 4".split()]
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        assert run_stage("train", lambda cfg: Trainer(cfg).run(), list(map(str, argv))) == 0
    return home, printed.getvalue()


def test_a_training_says_what_it_trains_where_and_what_comes_next(trained):
    home, printed = trained
    assert f"device cpu; language model {DEMO_LM} in float32" in printed
    assert re.search(r"^  TopK_text_layer12  site 12, 64 latents, k 4$", printed, re.M)
    assert re.search(r"^  RouteSAE_text      sites 4 to 12, 64 latents, k 4$", printed, re.M)
    assert "TopK_text_layer4: NormMSE" in printed  # whose figure the bar shows
    table = printed[printed.index("share of norm") :]
    assert "latents/token" in table and "of latents" in table
    row = re.search(r"^RouteSAE_text +4 to 12 +0\.\d+ +4 ", table, re.M)
    assert row, table
    assert f"next: python evaluate.py --metric NormMSE KLDiv --SAE_path {home}" in table


def test_an_evaluation_groups_by_site_and_shows_what_was_asked_for(trained, capsys):
    home, _ = trained
    titles = ("RouteSAE_text", "TopK_text_layer4", "TopK_text_layer12")
    paths = [sae_path(home, title) for title in titles]
    argv = [*text_argv(home), "--SAE_path", *paths, "--metric", "kldiv", "routing"]
    code, printed = run("evaluate", capsys, *argv)
    assert code == 0
    assert re.search(r"^site +SAE +L0 +KLDiv +seq$", printed, re.M)
    assert re.findall(r"^(\d+|4 to 12) +[TR]", printed, re.M) == ["4", "12", "4 to 12"]
    assert re.search(r"^SAE +4 +5 +6 +7 +8 +9 +10 +11 +12$", printed, re.M)
    assert "very good" not in printed  # no verdict
    assert f"results in {home / 'out' / 'eval'}: RouteSAE_text_all.json" in printed
    assert printed.index("memory by estimate") < printed.index("KLDiv")


def test_apply_and_interpret_count_what_was_kept_and_tested(trained, capsys):
    home, _ = trained
    path = sae_path(home, "RouteSAE_text")
    argv = [*text_argv(home), "--SAE_path", path, "--lines", "2"]
    code, printed = run("apply", capsys, *argv)
    assert code == 0
    fired, kept = re.search(r"(\d+) of 64 latents fired, (\d+) kept \(those with", printed).groups()
    assert 0 < int(kept) <= int(fired) <= 64
    argv = ["--output_dir", home / "out", "--engine", "heuristic", "--score", "fuzzing"]
    code, printed = run("interpret", capsys, *argv)
    assert code == 0
    assert re.search(
        r"fuzzing: balanced accuracy 0\.\d\d of \d+ tested labels \(chance: 0\.50\)", printed
    )
    assert "next: python -m src.page" in printed


def test_steering_names_the_latent_and_takes_multiples_of_its_maximum(trained, capsys):
    home, _ = trained
    path = sae_path(home, "RouteSAE_text")
    contexts = home / "out" / "contexts" / "RouteSAE_text_contexts.json"
    if not contexts.exists():
        run("apply", capsys, *text_argv(home), "--SAE_path", path, "--lines", "2")
    entries = json.loads(contexts.read_text())["latent_context_map"]
    latent, entry = next(iter(entries.items()))
    steer = [*place(home), "--SAE_path", path, "--prompt", "Return", "--max_new_tokens", "2"]
    code, printed = run("steer", capsys, *steer, "--set", f"{latent}=1.5x")
    assert code == 0
    assert f"latent {latent}: set {1.5 * entry['max_activation']:.4g};" in printed
    assert f"maximum {entry['max_activation']:.3g}" in printed
    quoted = r"['\"].*\n"
    assert re.search(
        rf"^  as it is  {quoted}  steered   {quoted}  change    sites 4 to 12, KL ", printed, re.M
    ), printed
    absent = next(str(i) for i in range(64) if str(i) not in entries)
    for more, message in (
        (["--set", f"{absent}=2x"], "run apply.py first"),
        (["--multiply", f"{latent}=2x"], "takes a factor"),
        ([], "no latent to edit; give --set"),
    ):
        code, printed = run("steer", capsys, *steer, *more)
        assert code == 2 and message in printed, printed


def test_a_note_of_other_weights_or_of_a_damaged_file_is_not_taken(tmp_path, capsys):
    entries = {"3": {"max_activation": 2.0}}
    contexts = {"title": "X", "sites": [1], "weights_sum": "a", "latent_context_map": entries}
    files.save_json(contexts, tmp_path / "contexts" / "X_contexts.json")
    test = {"balanced_accuracy": 0.83}
    label = {"3": {"description": "[by rule] numbers", "engine": "heuristic", "detection": test}}
    files.save_json(label, tmp_path / "interpret" / "interp_X.json")
    notes = latent_notes.of_sae(tmp_path, "X", "a")
    assert str(notes[3]) == " numbers (by rule, detection 0.83), maximum 2"
    assert latent_notes.of_sae(tmp_path, "X", "b") == {}
    files.save_json(
        contexts | {"latent_context_map": [1]}, tmp_path / "contexts" / "X_contexts.json"
    )
    assert latent_notes.of_sae(tmp_path, "X", "a") == {}
    assert "warning: nothing is said of the latents" in capsys.readouterr().out


def test_an_sae_of_another_language_model_gets_a_title_with_the_models_name(home, trained, capsys):
    other = home / "other_lm"
    shutil.copytree(DEMO_LM, other)
    argv = [*text_argv(home), "--model", "TopK", "--layer", "2", "--latent_size", "64", "--k", "4"]
    code, _ = run("train", capsys, *argv)
    assert code == 0
    argv[1] = other
    for expected in ("saved", "already trained"):
        code, printed = run("train", capsys, *argv)
        assert code == 0 and expected in printed
        assert "TopK_text is an SAE of demo_lm; these get other_lm in their names" in printed
    assert sae_path(home, "TopK_text_other_lm").exists()


def no_such_file(folder):
    return ["interpret", folder / "none.json", "--engine", "heuristic"], "there is no"


def a_text_folder(folder):
    (folder / "text").mkdir()
    (folder / "text" / "a.jsonl").write_text("{}")
    return ["train", "--model_path", folder / "text"], "it holds text, which --data_path names"


def a_text_file(folder):
    (folder / "a.jsonl").write_text("{}")
    return ["train", "--model_path", folder / "a.jsonl"], "Text is named by --data_path"


def a_folder_with_gguf(folder):
    (folder / "m.gguf").write_text("")
    return ["train", "--model_path", folder], "name the .gguf file inside it"


def a_misspelt_sae(folder):
    path = save_sae(folder)
    return ["evaluate", "--SAE_path", path.with_name("TopK_y.pt")], "did you mean TopK_x.pt?"


@pytest.mark.parametrize(
    "wrong", [no_such_file, a_text_folder, a_text_file, a_folder_with_gguf, a_misspelt_sae]
)
def test_an_error_names_the_remedy(tmp_path, capsys, wrong):
    (stage, *argv), message = wrong(tmp_path)
    code, printed = run(stage, capsys, *argv, "--output_dir", tmp_path / "out")
    assert code in (2, 3) and message in printed, printed
    assert "Errno" not in printed and printed.count("error:") == 1


def test_a_recipe_or_the_folder_of_a_one_site_export_stands_for_the_sae(tmp_path):
    from src import checkpoint, export_formats

    path = save_sae(tmp_path)
    sae, recipe = checkpoint.load(path)
    assert checkpoint.load(path.with_suffix(".json"))[1]["weights_sum"] == recipe["weights_sum"]
    folder = export_formats.export(sae, recipe, tmp_path, "saelens")
    assert checkpoint.load(folder)[0].sites() == [2]
