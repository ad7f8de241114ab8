"""--config: a file of options beside flags. YAML, JSON, a saved recipe, and the example of the published code."""

import json

import pytest
import torch

from src import checkpoint, config
from src.config import parse
from src.evaluator import Evaluator
from src.files import DEMO_LM
from src.trainer import Trainer

# The keys and values of the published code's example, which it reads nowhere itself.
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


def written(tmp_path, text, name="run.yaml"):
    (tmp_path / name).write_text(text if isinstance(text, str) else json.dumps(text))
    return str(tmp_path / name)


def test_the_published_example_is_read_as_it_means_for_every_stage(tmp_path, capsys):
    path = written(tmp_path, EXAMPLE)
    train = config.complete(parse("train", ["--config", path]))
    assert (train.model, train.k, train.lr, train.betas, train.steps, train.use_wandb) == (
        ["RouteSAE"],
        [64],
        5e-4,
        [0.9, 0.999],
        10,
        True,
    )
    assert (train.recipe, train.optimizer, train.threshold, train.l1_coeff, train.max_length) == (
        "published",
        "adam",
        None,
        [0.01],
        512,
    )
    assert (
        "read as the published code's: lamda is --l1_coeff, threshold --act_threshold, with --recipe published"
        in capsys.readouterr().out
    )
    evaluate = parse("evaluate", ["--config", path])
    assert (evaluate.SAE_path, evaluate.metric, evaluate.infer_k, evaluate.theta) == (
        ["../SAE_models/model.pt"],
        ["NormMSE"],
        64,
        None,
    )
    assert (
        parse("apply", ["--config", path]).act_threshold == 15
        and parse("apply", ["--config", path]).lines == 4
    )
    interpret = parse("interpret", ["--config", path])
    assert (interpret.engine, interpret.api_version, interpret.data_path) == (
        "gpt-4o",
        "2024-02-01",
        None,
    )
    parse("steer", ["--config", path])


def test_the_published_example_trains_with_paths_and_sizes_typed(tmp_path, capsys, monkeypatch):
    text = tmp_path / "t.jsonl"
    text.write_text(
        "\n".join(
            json.dumps({"text": f"Value {i} of the array, or {i * i} where that is larger. " * 4})
            for i in range(60)
        )
    )
    monkeypatch.setitem(__import__("sys").modules, "wandb", None)  # as if not installed
    here = [
        "--model_path",
        str(DEMO_LM),
        "--data_path",
        str(text),
        "--output_dir",
        str(tmp_path / "out"),
        "--device",
        "cpu",
        "--dtype",
        "float32",
    ]
    small = [
        "--hidden_size",
        "128",
        "--latent_size",
        "64",
        "--max_length",
        "32",
        "--batch_size",
        "4",
        "--max_samples",
        "20",
        "--k",
        "4",
    ]
    assert (
        Trainer(parse("train", ["--config", written(tmp_path, EXAMPLE), *here, *small])).run() > 0
    )
    recipe = checkpoint.read_recipe(tmp_path / "out" / "SAE_models" / "RouteSAE_t.pt")
    assert (
        recipe["options"]["optimizer"] == "adam"
        and recipe["options"]["k"] == 4
        and "from_file" not in recipe["options"]
    )
    said = capsys.readouterr().out
    assert said.count("no wandb logging") == 1 and "does nothing for" not in said


def test_typed_wins_over_the_file_the_file_over_the_environment_and_recipes(tmp_path, monkeypatch):
    monkeypatch.setenv("DATA_PATH", "from_environment")
    path = written(
        tmp_path,
        "k: [8, 16]\noptimizer: adam\ndata_path: from_file\nl1_coeff: 0.5\nbatch_size: null\n",
    )
    cfg = config.complete(parse("train", ["--config", path, "--k", "4", "--model", "Vanilla"]))
    assert cfg.k == [4] and cfg.data_path == "from_file"
    assert cfg.optimizer == "adam"  # the recipe of the models says signum
    assert (
        config.model_options(cfg, "Vanilla")["l1_coeff"] == [0.5] and cfg.batch_size == 64
    )  # null: as if not there
    config.fill_from_recipe(
        cfg, {"options": {"k": 32, "optimizer": "signum", "max_length": 99, "compile_lm": "yes"}}
    )
    assert (
        cfg.k == [4]
        and cfg.optimizer == "adam"
        and cfg.max_length == 99
        and cfg.compile_lm == "auto"
    )
    assert parse("train", []).data_path == "from_environment"


def test_a_recipe_passed_back_trains_the_same_sae_and_names_the_weights_for_the_other_stages(
    tmp_path,
):
    text = tmp_path / "t.jsonl"
    text.write_text(
        "\n".join(
            json.dumps({"text": f"Value {i} of the array, or {i * i} where that is larger. " * 4})
            for i in range(60)
        )
    )
    first = [
        "--model_path",
        str(DEMO_LM),
        "--data_path",
        str(text),
        "--dtype",
        "float32",
        "--latent_size",
        "64",
        "--k",
        "4",
        "--max_length",
        "32",
    ]
    first += [
        "--batch_size",
        "4",
        "--max_samples",
        "20",
        "--model",
        "Vanilla",
        "--target_l0",
        "6",
        "--recipe",
        "published",
        "--lr",
        "0.002",
    ]
    Trainer(parse("train", [*first, "--output_dir", str(tmp_path / "one")])).run()
    recipe = tmp_path / "one" / "SAE_models" / "Vanilla_t.json"
    Trainer(parse("train", ["--config", str(recipe), "--output_dir", str(tmp_path / "two")])).run()
    one, two = (
        torch.load(tmp_path / name / "SAE_models" / "Vanilla_t.pt") for name in ("one", "two")
    )
    assert all(torch.equal(one[key], two[key]) for key in one)
    cfg = parse(
        "evaluate",
        ["--config", str(recipe), "--output_dir", str(tmp_path / "one"), "--max_samples", "4"],
    )
    assert cfg.SAE_path == [str(recipe.with_suffix(".pt"))] and cfg.split is None
    assert Evaluator(cfg).run() > 0


@pytest.mark.parametrize(
    "text,said",
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
def test_a_bad_file_is_one_line_and_exit_code_2(tmp_path, capsys, text, said):
    with pytest.raises(SystemExit) as stop:
        parse("train", ["--config", written(tmp_path, text)])
    told = capsys.readouterr().err
    assert stop.value.code == 2 and said in told and told.count("\n") == 1
    assert "run.yaml" in told or "must be at least" in told
    with pytest.raises(SystemExit):
        parse("train", ["--config", str(tmp_path / "nowhere.yaml")])
    assert "no such file" in capsys.readouterr().err


def test_json_and_values_of_every_kind_are_taken(tmp_path):
    cfg = parse(
        "train",
        [
            "--config",
            written(
                tmp_path,
                {
                    "topk_relu": True,
                    "save_every": "90s",
                    "betas": [0.8, 0.99],
                    "device_map": {"": "cpu"},
                    "tag": "a b",
                    "router_balance_coef": 1e-3,
                },
                "run.json",
            ),
        ],
    )
    assert (cfg.topk_relu, cfg.save_every, cfg.betas, cfg.device_map) == (
        True,
        (90.0, "s"),
        [0.8, 0.99],
        {"": "cpu"},
    )
    assert (cfg.tag, cfg.router_balance_coef) == ("a b", 1e-3)
