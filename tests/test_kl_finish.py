"""The KL finish: the last steps of a training lower the KL of the patched language model too."""

import json

import pytest
import torch

from src import hooks, lm
from src.config import parse
from src.data import Batch
from src.files import DEMO_LM
from src.metrics import token_kl
from src.model import build
from src.sae import BatchInfo
from src.sae_training import SAETraining
from src.trainer import Trainer
from src.zoo import ZOO

ROWS, LENGTH = 3, 12


@pytest.fixture(scope="module")
def language_model():
    return lm.get_language_model(str(DEMO_LM), "cpu", "float32")[1]


def some_batch():
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, 500, (ROWS, LENGTH), generator=generator)
    mask = torch.ones(ROWS, LENGTH, dtype=torch.bool)
    mask[:, 0] = False
    mask[1, 7:] = False
    return Batch(ids, mask, torch.zeros_like(ids), torch.arange(ROWS))


def an_sae(name):
    torch.manual_seed(0)
    sites = {"sites": [4, 8]} if "sites" in ZOO[name].options else {"layer": 8}
    return build(name, 128, 16, {"latent_size": 64, "k": 4} | ZOO[name].standard | sites)


@pytest.mark.parametrize("name", ["TopK", "RouteSAE", "Crosscoder"])
def test_the_kl_of_slices_of_rows_has_the_value_and_gradient_of_the_plain_pass(
    name, language_model
):
    sae, batch = an_sae(name), some_batch()
    clean = hooks.CleanPass(language_model, batch, sae.sites())
    hidden = clean.hidden()

    def patches(tokens=slice(None)):
        states = {site: h[tokens] for site, h in hidden.items()}
        info = BatchInfo(token_keys=torch.arange(len(batch.token_keys()))[tokens])
        out = sae.autoencode(sae.gather(states), info)
        return next(iter(sae.patches(states, info, clean=out)))

    ends = clean.row_ends
    total = sum(
        clean.total_kl(tokens, patches(tokens))
        for tokens in (slice(0, ends[0]), slice(ends[0], ends[2]), slice(0))[:2]
    )
    parameters = list(sae.parameters())
    gradients = torch.autograd.grad(total, parameters, allow_unused=True)
    with lm.hooked(language_model, hooks.patch_hooks(patches(), batch.mask)):
        logits = language_model(input_ids=batch.input_ids).logits
    own = language_model(input_ids=batch.input_ids).logits
    predicts = hooks.predictions(batch.mask)
    assert int(predicts.sum()) == int(batch.mask.sum()) - ROWS
    plain = token_kl(own[predicts], logits[predicts]).sum()
    expected = torch.autograd.grad(plain, parameters, allow_unused=True)
    assert total.item() == pytest.approx(plain.item(), rel=1e-4)
    assert total > 0
    largest = max(float(wanted.abs().max()) for wanted in expected if wanted is not None)
    for gradient, wanted in zip(gradients, expected, strict=True):
        assert (gradient is None) == (wanted is None)
        if wanted is not None:
            assert (gradient - wanted).abs().max() < 1e-3 * largest


def train(tmp_path, *more):
    argv = ["--model_path", str(DEMO_LM), "--data_path", str(tmp_path / "text.jsonl")]
    argv += ["--output_dir", str(tmp_path / "out"), "--dtype", "float32"]
    argv += "--latent_size 64 --k 4 --max_length 32 --batch_size 4 --max_samples 80".split()
    Trainer(parse("train", [*argv, "--tag", *more])).run()


@pytest.fixture
def text(tmp_path):
    lines = [json.dumps({"text": f"Return the {i}th of {i * 7} values. " * 5}) for i in range(80)]
    (tmp_path / "text.jsonl").write_text("\n".join(lines))


def log_lines(tmp_path, tag):
    path = tmp_path / "out" / "runs" / tag / "metrics.jsonl"
    return [json.loads(line) for line in path.open()]


def test_the_term_is_there_at_the_end_alone(text, tmp_path):
    models = ("BatchTopK", "Vanilla", "RouteSAE", "Crosscoder")
    train(tmp_path, "all", "--model", *models, "--sites", "4", "8", "--kl_finish", "0.25")
    lines = log_lines(tmp_path, "all")
    assert {line["sae"].split("_")[0] for line in lines} == set(models)
    for line in lines:
        assert ("KL" in line) == (line["step"] > 15), line


def test_a_killed_finish_continues_bit_for_bit(text, tmp_path, monkeypatch):
    finish = ("--model", "TopK", "MLSAE", "--sites", "4", "8", "--kl_finish", "0.5")
    train(tmp_path, "whole", *finish)

    class Killed(BaseException):
        pass

    step = SAETraining.step

    def killed(self, batch, now, due):
        if now == 15:
            raise Killed
        step(self, batch, now, due)

    with monkeypatch.context() as patch:
        patch.setattr(SAETraining, "step", killed)
        with pytest.raises(Killed):
            train(tmp_path, "killed", *finish, "--save_every", "4")
    train(tmp_path, "killed", *finish)
    folder = tmp_path / "out" / "SAE_models"
    for name in ("TopK_text", "MLSAE_text_sites4-8"):
        whole, continued = (torch.load(folder / f"{name}_{tag}.pt") for tag in ("whole", "killed"))
        assert all(torch.equal(whole[key], continued[key]) for key in whole)
