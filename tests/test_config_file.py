"""--config reads YAML, JSON, a saved recipe, and the example file of the published code."""

import json
import sys

import pytest
import torch

from src import checkpoint, config
from src.config import parse
from src.evaluator import Evaluator
from src.files import DEMO_LM
from src.trainer import Trainer

# Keys and values of the published code's example file, which that code itself never reads.
EXAMPLE = """
model: RouteSAE
language_model: 1B
model_path: /path/to/Llama-3.2-1B-Instruct
hidden_size: 2048
latent_size: 16384
n_layers: 16
layer: 12
k: 64
lamda: 0.01
aggre: sum
routing: hard
batch_size: 64
max_length: 512
num_epochs: 1
lr: 0.0005
betas: [0.9, 0.999]
seed: 42
steps: 10
data_path: /path/to/train_data
# pipe_data_path: ...
device: cuda:0
use_wandb: 1   # 0 or 1
wandb_project: my_sae_project
SAE_path: ../SAE_models/model.pt
metric: NormMSE
infer_k: 64
theta: null
api_base: https://your-api-endpoint.openai.azure.com/
api_key: your_api_key_here
api_version: 2024-02-01
engine: gpt-4o
threshold: 15.0
max_per_token: 2
lines: 4
"""


def written(tmp_path, content, name="run.yaml"):
    path = tmp_path / name
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return str(path)


def write_text(path):
    sentence = "Value {} of the array, or {} where that is larger. "
    lines = [json.dumps({"text": sentence.format(i, i * i) * 4}) for i in range(60)]
    path.write_text("\n".join(lines))


def test_the_published_example_is_read_as_it_means_for_every_stage(tmp_path, capsys):
    path = written(tmp_path, EXAMPLE)
    train = config.complete(parse("train", ["--config", path]))
    assert train.model == ["RouteSAE"] and train.k == [64] and train.max_length == 512
    assert train.lr == 5e-4 and train.betas == [0.9, 0.999] and train.steps == 10
    assert train.use_wandb is True
    assert train.recipe == "published" and train.optimizer == "adam"
    assert train.threshold is None and train.l1_coeff == [0.01]
    note = "read as the published code's: lamda is --l1_coeff, threshold --act_threshold"
    assert f"{note}, with --recipe published" in capsys.readouterr().out

    evaluate = parse("evaluate", ["--config", path])
    assert evaluate.SAE_path == ["../SAE_models/model.pt"] and evaluate.metric == ["NormMSE"]
    assert evaluate.infer_k == 64 and evaluate.theta is None
    apply = parse("apply", ["--config", path])
    assert apply.act_threshold == 15 and apply.lines == 4
    interpret = parse("interpret", ["--config", path])
    assert interpret.engine == "gpt-4o" and interpret.api_version == "2024-02-01"
    assert interpret.data_path is None
    parse("steer", ["--config", path])


def test_the_published_example_trains_with_paths_and_sizes_typed(tmp_path, capsys, monkeypatch):
    write_text(tmp_path / "t.jsonl")
    monkeypatch.setitem(sys.modules, "wandb", None)  # as if not installed
    paths = ["--model_path", str(DEMO_LM), "--data_path", str(tmp_path / "t.jsonl")]
    paths += ["--output_dir", str(tmp_path / "out"), "--device", "cpu", "--dtype", "float32"]
    sizes = "--hidden_size 128 --latent_size 64 --max_length 32 --batch_size 4 --max_samples 20"
    argv = ["--config", written(tmp_path, EXAMPLE), *paths, *sizes.split(), "--k", "4"]
    assert Trainer(parse("train", argv)).run() > 0
    recipe = checkpoint.read_recipe(tmp_path / "out" / "SAE_models" / "RouteSAE_t.pt")
    assert recipe["options"]["optimizer"] == "adam" and recipe["options"]["k"] == 4
    assert "from_file" not in recipe["options"]
    printed = capsys.readouterr().out
    assert printed.count("no wandb logging") == 1 and "does nothing for" not in printed


def test_typed_wins_over_the_file_the_file_over_the_environment_and_recipes(tmp_path, monkeypatch):
    monkeypatch.setenv("DATA_PATH", "from_environment")
    content = "k: [8, 16]\noptimizer: adam\ndata_path: from_file\nl1_coeff: 0.5\nbatch_size: null\n"
    path = written(tmp_path, content)
    cfg = config.complete(parse("train", ["--config", path, "--k", "4", "--model", "Vanilla"]))
    assert cfg.k == [4] and cfg.data_path == "from_file"
    assert cfg.optimizer == "adam"  # the recipe of the models says signum
    assert config.model_options(cfg, "Vanilla")["l1_coeff"] == [0.5]
    assert cfg.batch_size == 64  # null in a file means that the option is not set
    saved = {"k": 32, "optimizer": "signum", "max_length": 99, "compile_lm": "yes"}
    config.fill_from_recipe(cfg, {"options": saved})
    assert cfg.k == [4] and cfg.optimizer == "adam"
    assert cfg.max_length == 99 and cfg.compile_lm == "auto"
    assert parse("train", []).data_path == "from_environment"


def test_a_recipe_passed_back_trains_the_same_sae_and_names_the_weights_for_the_other_stages(
    tmp_path,
):
    write_text(tmp_path / "t.jsonl")
    argv = ["--model_path", str(DEMO_LM), "--data_path", str(tmp_path / "t.jsonl")]
    argv += "--dtype float32 --latent_size 64 --k 4 --max_length 32 --batch_size 4".split()
    argv += "--max_samples 20 --model Vanilla --target_l0 6 --recipe published --lr 0.002".split()
    first, second = tmp_path / "first", tmp_path / "second"
    Trainer(parse("train", [*argv, "--output_dir", str(first)])).run()
    recipe = first / "SAE_models" / "Vanilla_t.json"
    Trainer(parse("train", ["--config", str(recipe), "--output_dir", str(second)])).run()
    weights = torch.load(first / "SAE_models" / "Vanilla_t.pt")
    again = torch.load(second / "SAE_models" / "Vanilla_t.pt")
    assert all(torch.equal(weights[key], again[key]) for key in weights)

    argv = ["--config", str(recipe), "--output_dir", str(first), "--max_samples", "4"]
    cfg = parse("evaluate", argv)
    assert cfg.SAE_path == [str(recipe.with_suffix(".pt"))] and cfg.split is None
    assert Evaluator(cfg).run() > 0


@pytest.mark.parametrize(
    "content, message",
    [
        ("latent_sise: 5", "there is no option 'latent_sise'; did you mean 'latent_size'?"),
        ("xyzzy: 5", "there is no option 'xyzzy'"),
        ("k: many", "argument --k: invalid int value: 'many'"),
        ("routing: sometimes", "argument --routing: invalid choice: 'sometimes'"),
        ("latent_size: 0", "--latent_size 0: must be at least 1"),
        ("k: [1", "is not readable (while parsing"),
        ("- k", "holds no `option: value` lines"),
        ("", "holds nothing"),
    ],
)
def test_a_bad_file_is_one_line_and_exit_code_2(tmp_path, capsys, content, message):
    with pytest.raises(SystemExit) as stop:
        parse("train", ["--config", written(tmp_path, content)])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and message in error and error.count("\n") == 1
    assert "run.yaml" in error or "must be at least" in error
    with pytest.raises(SystemExit):
        parse("train", ["--config", str(tmp_path / "nowhere.yaml")])
    assert "no such file" in capsys.readouterr().err


def test_json_and_values_of_every_kind_are_taken(tmp_path):
    options = {
        "topk_relu": True,
        "save_every": "90s",
        "betas": [0.8, 0.99],
        "device_map": {"": "cpu"},
        "tag": "a b",
        "router_balance_coef": 1e-3,
    }
    cfg = parse("train", ["--config", written(tmp_path, options, "run.json")])
    expected = options | {"save_every": (90.0, "s")}
    assert {name: getattr(cfg, name) for name in options} == expected
