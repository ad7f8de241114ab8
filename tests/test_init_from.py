"""A training that begins with the weights of another SAE (--init_from)."""

import json

import pytest
import torch

from src import checkpoint, config, export_formats, files
from src.config import parse, run_stage
from src.files import DEMO_LM
from src.model import JumpReLU, build
from src.sae import BatchInfo
from src.sae_training import SOURCE_SUM, LocalBatch, SAETraining
from src.trainer import Trainer
from src.zoo import ZOO

D, BLOCKS, N, LATENTS = 128, 16, 40, 64  # width and depth of the demo LM
KEYS = torch.arange(N)


@pytest.fixture
def hidden():
    generator = torch.Generator().manual_seed(1)
    return {site: torch.randn(N, D, generator=generator) + 1 for site in range(1, BLOCKS + 1)}


def save_source(folder, name, **options):
    """The path of an SAE as after a training; its options are not the defaults."""
    torch.manual_seed(5)
    options = {"latent_size": LATENTS, "k": 5, "norm_eps": 1e-3} | ZOO[name].standard | options
    sae = build(name, D, BLOCKS, options)
    with torch.no_grad():
        for key, value in sae.state_dict().items():
            if "weight" not in key:
                value.copy_(0.5 + 0.1 * torch.randn_like(value))
    return checkpoint.save(sae, {"model": name, "config": sae.config}, folder, f"{name}_source")


def trainer_of(tmp_path, source, *more):
    argv = ["--init_from", str(source), "--model_path", str(DEMO_LM)]
    argv += ["--data_path", str(tmp_path / "text.jsonl"), "--output_dir", str(tmp_path / "out")]
    return Trainer(parse("train", [*argv, "--tag", "next", *more]))


def first_step(trainer, hidden):
    """The SAE with which training makes its first step."""
    training = trainer._build(0, {"hidden_size": D, "n_layers": BLOCKS}, total=10)
    training.warm_start(LocalBatch(hidden, KEYS, batch_tokens=N, token_offset=0))
    return training.sae


def check_equal(sae, source, hidden):
    """Weights, codes and reconstructions must be equal bit for bit."""
    sae.eval()
    for key in source.config.keys() - {"n_layers"}:
        assert sae.config[key] == source.config[key], key
    weights = source.state_dict()
    assert weights.keys() == sae.state_dict().keys()
    for key, value in sae.state_dict().items():
        assert torch.equal(value, weights[key]), key
    info = BatchInfo(token_keys=KEYS)
    out, expected = (one.autoencode(one.gather(hidden), info) for one in (sae, source))
    assert torch.equal(out.latents, expected.latents)
    assert torch.equal(out.x_hat, expected.x_hat)


@pytest.mark.parametrize("name", ZOO)
def test_the_first_step_begins_with_the_source_bit_for_bit(name, hidden, tmp_path):
    path = save_source(tmp_path, name)
    trainer = trainer_of(tmp_path, path)
    assert trainer.cfg.model == [name]
    check_equal(first_step(trainer, hidden), checkpoint.load(path)[0], hidden)


def test_a_folder_of_saelens_is_a_source_with_its_own_input_norm(hidden, tmp_path):
    sae = build("TopK", D, BLOCKS, {"latent_size": LATENTS, "k": 3, "topk_relu": True, "layer": 4})
    recipe = {"title": "lens", "model": "TopK", "config": sae.config}
    folder = export_formats.export(sae, recipe, tmp_path, "saelens") / "blocks.3.hook_resid_post"
    lens_config = files.load_json(folder / "cfg.json")
    files.save_json(lens_config | {"normalize_activations": "none"}, folder / "cfg.json")
    source, _ = checkpoint.load(folder)
    assert source.input_norm == "none"
    check_equal(first_step(trainer_of(tmp_path, folder), hidden), source, hidden)


def test_typed_options_win_over_those_of_the_source(tmp_path):
    path = save_source(tmp_path, "TopK", layer=4)
    trainer = trainer_of(tmp_path, path, "--k", "2", "3", "--norm_eps", "0.5")
    options = [options for _, options, _ in trainer.combinations]
    assert [(o["k"], o["layer"], o["norm_eps"]) for o in options] == [(2, 4, 0.5), (3, 4, 0.5)]
    assert config.learning_rate(trainer.cfg, D) == pytest.approx(1e-2 * 2)  # as of 1,024 latents


@pytest.mark.parametrize(
    "more, message",
    [
        ("--model Vanilla", "holds a TopK; it cannot begin --model Vanilla: give --model TopK"),
        ("--latent_size 128", "has latent size 64, but this run needs 128"),
        ("--model_path {narrow}", "has hidden size 128, but this run needs 32"),
    ],
)
def test_a_source_that_does_not_fit_is_refused_in_one_line(more, message, tmp_path, capsys):
    (tmp_path / "text.jsonl").write_text('{"text": "some words"}\n')
    narrow = tmp_path / "narrow"
    narrow.mkdir()
    sizes = {"model_type": "llama", "hidden_size": 32, "num_hidden_layers": 16}
    (narrow / "config.json").write_text(json.dumps(sizes))
    path = save_source(tmp_path, "TopK")
    argv = ["--init_from", str(path), "--model_path", str(DEMO_LM)]
    argv += ["--data_path", str(tmp_path / "text.jsonl"), "--output_dir", str(tmp_path / "out")]
    argv += more.format(narrow=narrow).split()
    assert run_stage("train", lambda cfg: Trainer(cfg).run(), argv) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert message in line


def test_sources_with_other_decoder_norms_or_other_sites_are_refused(tmp_path):
    path = save_source(tmp_path, "RouteSAE")
    trainer = trainer_of(tmp_path, path, "--start_layer", "4", "--end_layer", "6")
    with pytest.raises(ValueError, match=r"router.weight \(9, 128\), but this run needs \(2, 128"):
        trainer._check_options([0], D, BLOCKS)
    weights = torch.load(path)
    weights["sae.decoder.weight"] *= 1.5
    torch.save(weights, tmp_path / "RouteSAE_K5.pt")
    with pytest.raises(ValueError, match="norms from 1.5 to 1.5"):
        trainer_of(tmp_path, tmp_path / "RouteSAE_K5.pt", "--model", "RouteSAE")


def train(tmp_path, *more):
    argv = ["--model_path", str(DEMO_LM), "--data_path", str(tmp_path / "text.jsonl")]
    argv += ["--output_dir", str(tmp_path / "out"), "--dtype", "float32"]
    argv += "--max_length 32 --batch_size 4 --max_samples 40".split()
    Trainer(parse("train", [*argv, *more])).run()
    return tmp_path / "out" / "SAE_models"


def test_the_recipe_names_the_source_by_its_weights_and_a_killed_run_continues(
    tmp_path, monkeypatch
):
    lines = [json.dumps({"text": f"Return the {i}th of {i * 7} values. " * 5}) for i in range(60)]
    (tmp_path / "text.jsonl").write_text("\n".join(lines))
    sources = []
    for seed in ("1", "2"):
        folder = train(tmp_path, "--latent_size", "64", "--k", "4", "--seed", seed, "--tag", seed)
        sources.append(folder / f"TopK_text_{seed}.pt")
    begun = ["--init_from", str(sources[0]), "--tag"]
    path = train(tmp_path, *begun, "whole") / "TopK_text_whole.pt"
    recipe = checkpoint.read_recipe(path)
    assert recipe["options"][SOURCE_SUM] == checkpoint.read_recipe(sources[0])["weights_sum"]
    assert str(tmp_path) not in json.dumps(recipe["options"] | {"data_path": ""})
    with pytest.raises(ValueError, match="was trained with other options .*init_weights_sum"):
        train(tmp_path, "--init_from", str(sources[1]), "--tag", "whole")
    with pytest.raises(ValueError, match="init_weights_sum .* -> None"):
        train(tmp_path, "--latent_size", "64", "--k", "4", "--seed", "1", "--tag", "whole")

    class Killed(BaseException):
        pass

    step = SAETraining.step

    def killed_at_step_6(self, batch, now, due):
        if now == 6:
            raise Killed
        step(self, batch, now, due)

    with monkeypatch.context() as patch:
        patch.setattr(SAETraining, "step", killed_at_step_6)
        with pytest.raises(Killed):
            train(tmp_path, *begun, "killed", "--save_every", "3")
    with pytest.raises(ValueError, match="init_weights_sum"):
        train(tmp_path, "--init_from", str(sources[1]), "--tag", "killed", "--seed", "1")
    continued = train(tmp_path, *begun, "killed") / "TopK_text_killed.pt"
    weights, expected = torch.load(continued), torch.load(path)
    assert all(torch.equal(weights[key], expected[key]) for key in expected)


def test_the_default_learning_rate_falls_with_width_and_with_1024_to_4096_latents():
    cfg = config.complete(config.parse("train", ["--latent_size", "2048"]))
    demo = config.learning_rate(cfg, D)
    assert demo == 5e-3 / (2048 / 16384) ** 0.5  # the width of the demo LM changes nothing
    for latents in (64, 1024):
        cfg.latent_size = latents
        assert config.learning_rate(cfg, D) == pytest.approx(2**0.5 * demo)
    for latents in (4096, 16384):
        cfg.latent_size = latents
        assert config.learning_rate(cfg, D) == pytest.approx(1e-2)
        assert config.learning_rate(cfg, 4 * D) == pytest.approx(5e-3)
    cfg.lr = 0.5
    assert config.learning_rate(cfg, 4 * D) == 0.5


def test_the_learning_rate_of_a_crosscoder_falls_with_the_root_of_its_sites():
    cfg = config.complete(config.parse("train", ["--latent_size", "96"]))
    rates = []
    for sites in ([1], list(range(1, 5)), list(range(4, 13))):
        options = config.model_options(cfg, "Crosscoder") | {"sites": sites}
        sae = build("Crosscoder", D, 16, options)
        rates.append(SAETraining(sae, "Crosscoder", {}, cfg, 100).lr / config.learning_rate(cfg, D))
    assert rates == pytest.approx([0.9, 0.45, 0.3])


@pytest.mark.parametrize("width, latents", [(128, 1024), (64, 2048), (64, 256)])
def test_a_threshold_has_a_learning_rate_of_the_size_of_pre_activations(width, latents):
    argv = ["--model", "JumpReLU", "--latent_size", str(latents)]
    few = 2 if latents == 256 else 1
    for optimizer, factor in (("signum", few * width / 128), ("adam", 1.0)):
        cfg = config.complete(config.parse("train", [*argv, "--optimizer", optimizer]))
        sae = build("JumpReLU", width, 4, config.model_options(cfg, "JumpReLU") | {"layer": 2})
        training = SAETraining(sae, "JumpReLU", {}, cfg, 100)
        if optimizer == "adam":  # its first step is far down the warm-up
            training.schedules[0].optimizer.param_groups[0]["lr"] = training.lr
        training.mode(True)
        before = {name: p.detach().clone() for name, p in sae.named_parameters()}
        for p in sae.parameters():
            p.grad = torch.ones_like(p)
        training.optimizers[0].step()
        for name, p in sae.named_parameters():
            expected = training.lr * (factor if name == "threshold" else 1.0)
            moved = (before[name] - p).abs()
            assert torch.allclose(moved, torch.full_like(moved, expected), rtol=1e-3), name


def test_a_saved_state_with_other_learning_rates_is_refused_in_one_line(monkeypatch):
    cfg = config.complete(config.parse("train", ["--model", "JumpReLU", "--latent_size", "96"]))

    def training():
        sae = build("JumpReLU", 64, 4, config.model_options(cfg, "JumpReLU") | {"layer": 2})
        return SAETraining(sae, "JumpReLU", {}, cfg, 100)

    with monkeypatch.context() as patch:
        patch.setattr(JumpReLU, "lr_factors", lambda self: {})
        saved = training().state()
    with pytest.raises(ValueError, match="JumpReLU does not fit .learning rates.; another version"):
        training().restore(saved)
    training().restore(training().state())
