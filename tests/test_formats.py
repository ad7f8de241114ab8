"""SAEs in other libraries' formats and back, without those libraries: their documented forward pass is written out here."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from src import checkpoint, files, formats
from src.model import build
from src.zoo import ZOO

D, F, LAYERS = 24, 80, 8
EXACT = {
    "TopK": "topk",
    "Vanilla": "standard",
    "Gated": "gated",
    "JumpReLU": "jumprelu",
}  # and their names in SAELens
EXACT |= {"BatchTopK": "jumprelu", "MLSAE": "topk", "RouteSAE": "topk"}


def made(name, **options):
    """An SAE whose every parameter has a say, k small enough that no negative value is kept."""
    torch.manual_seed(3)
    sae = build(name, D, LAYERS, {"latent_size": F, "k": 5, **options}).eval()
    with torch.no_grad():
        for key, parameter in sae.named_parameters():
            if key != "threshold":
                parameter.add_(0.05 * torch.randn_like(parameter))
        if name == "BatchTopK":
            sae.cut.fill_(0.7)
    return sae


def recipe_of(sae, **more):
    about = {"format_version": 1, "title": f"{sae.name}_text", "tokens": 1000, "seed": 42}
    return about | {"model": sae.name, "config": sae.config, "options": {}} | more


def export(sae, folder, kind, **more):
    return formats.export(sae, recipe_of(sae, **more), folder, kind)


def lens(folder, h):
    """SAELens' documented forward pass up to the latents, from its two files."""
    config, w = (
        json.loads((folder / "cfg.json").read_text()),
        load_file(folder / "sae_weights.safetensors"),
    )
    if config["normalize_activations"] == "layer_norm":
        h = h - h.mean(-1, keepdim=True)
        h = h / (h.std(-1, keepdim=True) + 1e-5)
    product = (h - w["b_dec"] * config["apply_b_dec_to_input"]) @ w["W_enc"]
    if config["architecture"] == "gated":
        return (product + w["b_gate"] > 0) * torch.relu(product * w["r_mag"].exp() + w["b_mag"])
    pre = product + w["b_enc"]
    if config["architecture"] == "jumprelu":
        return torch.relu(pre) * (pre > w["threshold"])
    if config["architecture"] == "topk":
        pre = pre * w["W_dec"].norm(dim=-1) if config["rescale_acts_by_decoder_norm"] else pre
        values, at = pre.topk(config["k"])
        return torch.zeros_like(pre).scatter(-1, at, values.relu())
    return torch.relu(pre)


@pytest.mark.parametrize("name, architecture", EXACT.items())
def test_exported_files_give_the_same_latents_through_the_documented_forward(
    name, architecture, tmp_path
):
    sae, h = made(name), 3 * torch.randn(200, D) + 1
    folder = export(sae, tmp_path, "saelens", model_path="org/lm", data_path="org/text")
    assert sorted(path.name for path in folder.iterdir() if path.is_dir()) == sorted(
        f"blocks.{site - 1}.hook_resid_post" for site in sae.sites()
    )
    inner = getattr(sae, "sae", sae)
    for site in sae.sites():
        one = folder / f"blocks.{site - 1}.hook_resid_post"
        config = json.loads((one / "cfg.json").read_text())
        assert (
            config["architecture"] == architecture
            and config["metadata"]["hook_name"] == one.name
            and config["metadata"]["model_name"] == "org/lm"
        )
        ours, theirs = inner.encode(sae.standardise(h)[0]), lens(one, h)
        assert torch.equal(ours != 0, theirs != 0) and torch.allclose(ours, theirs, atol=1e-5), site
        assert 0 < (theirs != 0).float().mean() < 1


@pytest.mark.parametrize(
    "sae, reason",
    [
        (lambda: made("Crosscoder"), "together"),
        (lambda: made("RandomK"), "drawn"),
        (lambda: made("RouteSAE", routing="soft"), "mixture"),
        (lambda: build("BatchTopK", D, LAYERS, {"latent_size": F, "k": 5}), "no threshold"),
        (lambda: made("TopK", norm_eps=1e-6), "norm_eps"),
        (lambda: made("TopK", k=60), "negative values"),
        (lambda: made("MLSAE", k=60), "negative values"),
        (
            lambda: made("JumpReLU", threshold=1e-4).apply(
                lambda m: hasattr(m, "threshold") and m.threshold.data.sub_(1)
            ),
            "below 0",
        ),
    ],
)
def test_what_saelens_cannot_hold_exactly_is_refused_with_the_reason_and_nothing_is_written(
    sae, reason, tmp_path
):
    with pytest.raises(ValueError, match=reason):
        export(sae(), tmp_path, "saelens")
    assert not list(tmp_path.rglob("*.json"))


def test_clipped_topk_is_exported_whatever_its_k_and_a_wrong_export_is_noticed(tmp_path):
    sae = made("TopK", k=60, topk_relu=True)
    assert export(sae, tmp_path, "saelens").is_dir()
    (form,) = sae.to_standard_form().values()
    wrong = form._replace(tensors=form.tensors | {"b_enc": form.tensors["b_enc"] + 0.01})
    with pytest.raises(ValueError, match="other latents"):
        formats.compare(sae, form, formats.SiteSAE(sae, sae.layer, wrong))


def test_route_export_says_what_it_leaves_out(tmp_path):
    folder = export(made("RouteSAE"), tmp_path, "saelens")
    config = json.loads(next(folder.rglob("cfg.json")).read_text())
    assert (
        "router is left out" in config["metadata"]["caveat"]
        and "router is left out" in (folder / "README.md").read_text()
    )


@pytest.mark.parametrize("name", ZOO)
def test_hugging_face_folder_loads_back_bit_for_bit(name, tmp_path):
    sae = made(name)
    folder = export(sae, tmp_path, "hf", options={"max_length": 256}, model_path="org/lm")
    back, recipe = checkpoint.load(folder)
    assert (
        recipe["title"] == f"{name}_text"
        and recipe["model_path"] == "org/lm"
        and recipe["options"] == {"max_length": 256}
    )
    assert back.sites() == sae.sites() and type(back) is type(sae)
    for key, value in sae.state_dict().items():
        assert torch.equal(value, back.state_dict()[key]), key


def test_an_exported_folder_is_not_overwritten_unasked(tmp_path):
    sae = made("TopK")
    folder = export(sae, tmp_path, "hf")
    (folder / "README.md").write_text("my licence")
    with pytest.raises(ValueError, match="--overwrite"):
        export(sae, tmp_path, "hf")
    assert (folder / "README.md").read_text() == "my licence"
    formats.export(sae, recipe_of(sae), tmp_path, "hf", overwrite=True)
    assert (folder / "README.md").read_text() != "my licence"


def test_card_tells_model_text_and_measurements_and_no_path_of_this_machine(tmp_path):
    (tmp_path / "private" / "corpus").mkdir(parents=True)
    sae = made("TopK")
    measured = {
        "NormMSE": 0.125,
        "KLDiv": 0.5,
        "L0": 5.0,
        "tokens": 4321,
        "split": "eval",
        "units": {"KLDiv": "nats a token"},
    }
    files.save_json(measured, tmp_path / "eval" / "TopK_text.json")
    places = {
        "model_path": str(tmp_path / "private"),
        "data_path": str(tmp_path / "private" / "corpus"),
    }
    folder = export(
        sae,
        tmp_path,
        "hf",
        **places,
        options={"config": str(tmp_path / "run.yaml"), "recipe": "standard"} | places,
    )
    card, config = (
        (folder / "README.md").read_text(),
        json.loads((folder / "config.json").read_text()),
    )
    rows = "| training text | corpus |", "| NormMSE | 0.125 |", "| KLDiv | 0.5 | nats a token |"
    for part in ("TopK_text", *rows, "4321", "checkpoint.load", "license"):
        assert part in card, part
    assert (
        str(tmp_path) not in card + json.dumps(config)
        and "model_path" not in config
        and config["model_name"] == "private"
    )
    front = card.split("---")[1]
    assert "base_model" not in front and "sparse-autoencoder" in front
    assert (
        "base_model: org/lm"
        in (export(made("Gated"), tmp_path, "hf", model_path="org/lm") / "README.md").read_text()
    )


def test_the_demo_language_model_is_named_as_it_lies_in_the_repository(tmp_path):
    shown = formats.public_recipe(
        recipe_of(made("TopK"), model_path=str(files.DEMO_LM), data_path="None")
    )
    assert shown["model_path"] == "assets/demo_lm" and "data_path" not in shown


def test_names_from_recipes_stay_inside_the_output_folder(tmp_path):
    for title in ("../../x", "a/../../b", "/etc/x"):
        try:
            folder = export(made("TopK"), tmp_path / "out", "hf", title=title)
            assert folder.resolve().is_relative_to(tmp_path / "out" / "export" / "hf")
        except ValueError as error:
            assert "cannot name a file" in str(error)
    assert {path.name for path in tmp_path.iterdir()} <= {"out"}
    folder = export(made("TopK"), tmp_path / "out", "hf")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"title": "../../x"}))
    with pytest.raises(ValueError, match="cannot name a file"):
        checkpoint.load(folder)


# -------------------------------------------------------------------------------------------------------------- import


def foreign(folder, architecture, hook="blocks.5.hook_resid_post", drop=(), **config):
    """A folder as SAELens writes it."""
    torch.manual_seed(5)
    shapes = {"W_enc": (D, F), "W_dec": (F, D), "b_dec": (D,), "b_enc": (F,)}
    shapes |= {
        "jumprelu": {"threshold": (F,)},
        "gated": {"b_gate": (F,), "b_mag": (F,), "r_mag": (F,)},
    }.get(architecture, {})
    tensors = {
        name: 0.4 * torch.randn(shape)
        for name, shape in shapes.items()
        if name not in drop and (name, architecture) != ("b_enc", "gated")
    }
    folder.mkdir(parents=True)
    save_file(tensors, folder / "sae_weights.safetensors")
    config = {
        "architecture": architecture,
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "d_in": D,
        "d_sae": F,
    } | config
    config |= {
        "metadata": {"hook_name": hook, "model_name": "org/lm", "sae_lens_version": "6.54.12"}
    }
    config |= (
        {"k": 7, "rescale_acts_by_decoder_norm": True} | config if architecture == "topk" else {}
    )
    (folder / "cfg.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("norm", ["none", "layer_norm"])
@pytest.mark.parametrize("at_input", [True, False])
@pytest.mark.parametrize(
    "architecture, name",
    [("topk", "TopK"), ("standard", "Vanilla"), ("jumprelu", "JumpReLU"), ("gated", "Gated")],
)
def test_saelens_folders_load_as_the_model_that_holds_them_exactly(
    architecture, name, at_input, norm, tmp_path
):
    folder = foreign(
        tmp_path / "sae", architecture, apply_b_dec_to_input=at_input, normalize_activations=norm
    )
    sae, recipe = checkpoint.load(folder)
    h = 3 * torch.randn(300, D) + 1
    expected = lens(folder, h)
    p = sae.autoencode(sae.gather({6: h}))
    norms = (
        load_file(folder / "sae_weights.safetensors")["W_dec"].norm(dim=-1)
        if architecture == "topk"
        else 1
    )
    assert recipe["model"] == name and sae.sites() == [6] and recipe["model_path"] == "org/lm"
    assert torch.allclose(p.latents, expected, atol=1e-3 if norm == "none" else 1e-4, rtol=1e-5), (
        (p.latents - expected).abs().max()
    )
    assert torch.equal(p.latents != 0, expected != 0)
    w = load_file(folder / "sae_weights.safetensors")
    assert torch.allclose(p.x_hat, (expected / norms) @ w["W_dec"] + w["b_dec"], atol=1e-3)
    back = formats.export(sae, recipe, tmp_path, "saelens") / "blocks.5.hook_resid_post"
    assert torch.allclose(lens(back, h), expected, atol=1e-3 if norm == "none" else 1e-4, rtol=1e-5)


@pytest.mark.parametrize(
    "architecture, change, reason",
    [
        ("transcoder", {}, "'transcoder'"),
        ("standard", {"normalize_activations": "expected_average_only_in"}, "scaled by"),
        ("standard", {"hook": "blocks.5.hook_mlp_out"}, "hook_mlp_out"),
        ("standard", {"hook": "blocks.0.hook_resid_pre"}, "no decoder block"),
        ("standard", {"reshape_activations": "hook_z"}, "reshapes"),
        ("standard", {"activation_fn": "tanh-relu"}, "tanh-relu"),
        ("topk", {"k": None}, "does not say k"),
        ("standard", {"drop": ("b_dec",)}, "tensors are"),
    ],
)
def test_saelens_folders_that_no_model_holds_are_refused_with_the_reason(
    architecture, change, reason, tmp_path
):
    with pytest.raises(ValueError, match=f"cannot be held exactly here.*{reason}"):
        checkpoint.load(foreign(tmp_path / "sae", architecture, **change))


def test_folders_written_by_saelens_before_version_6_load(tmp_path):
    folder = foreign(tmp_path / "sae", "standard")
    old = {
        "hook_name": "blocks.3.hook_resid_pre",
        "activation_fn": "topk",
        "activation_fn_kwargs": {"k": 4},
        "normalize_activations": None,
    }
    (folder / "cfg.json").write_text(
        json.dumps(old | {"apply_b_dec_to_input": False, "d_in": D, "d_sae": F})
    )
    sae, recipe = checkpoint.load(folder)
    assert (
        recipe["model"] == "TopK"
        and sae.k == 4
        and sae.sites() == [3]
        and "model_path" not in recipe
    )


def test_a_folder_of_several_saes_says_which_there_are(tmp_path):
    export(made("MLSAE"), tmp_path, "saelens")
    with pytest.raises(ValueError, match=r"blocks\.1\.hook_resid_post.*name one"):
        checkpoint.load(tmp_path / "export" / "saelens" / "MLSAE_text")
    sae, _ = checkpoint.load(
        tmp_path / "export" / "saelens" / "MLSAE_text" / "blocks.3.hook_resid_post"
    )
    assert sae.sites() == [4]


@pytest.mark.parametrize(
    "stem, name, expected",
    [
        ("L7_K9_1B_100M_80", "TopK", {"k": 9, "layer": 7}),
        ("L7_VL0.001_1B_100M_80", "Vanilla", {"layer": 7}),
        ("L3_GL0.1_1B_x", "Gated", {"layer": 3}),
        ("L3_JL0.1_1B_x", "JumpReLU", {"layer": 3}),
        ("mean_hard_K9_1B_x", "RouteSAE", {"k": 9, "aggre": "mean", "routing": "hard"}),
        ("Cross_CL5_1B_100M", "Crosscoder", {}),
        ("ML_K9_1B", "MLSAE", {"k": 9}),
        ("Vanilla_openwebtext2", "Vanilla", {}),
        ("TopK_owt", "TopK", {}),
    ],
)
def test_bare_files_of_both_public_repositories_are_recognised_by_name_and_shape(
    stem, name, expected, tmp_path, capsys
):
    sae = build(name, D, 8, {"latent_size": F, "k": 5, "b_pre_init": "zero"})
    path = tmp_path / f"{stem}.pt"
    torch.save(sae.state_dict(), path)
    back, recipe = checkpoint.load(path, hints={"n_layers": 8})
    assert (
        recipe["model"] == name and {key: recipe["config"].get(key) for key in expected} == expected
    )
    assert (
        back.norm_eps == 1e-6 and "norm_eps 1e-06" in capsys.readouterr().out
    )  # both repositories standardise with it
    assert checkpoint.load(path, hints={"n_layers": 8, "norm_eps": 1e-5})[0].norm_eps == 1e-5


# ----------------------------------------------------------------------------------------------------------------- hub


def cached(folder, monkeypatch, asked=None):
    """A hub that has one repository, its files in `folder`."""

    def download(repo, revision=None, allow_patterns=None):
        if asked is not None:
            asked.append((repo, revision))
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)


def test_a_hub_name_loads_a_repository_a_folder_in_it_and_a_revision(tmp_path, monkeypatch):
    sae, asked = made("RouteSAE"), []
    cached(export(sae, tmp_path, "hf"), monkeypatch, asked)
    assert checkpoint.load("someone/route")[1]["title"] == "RouteSAE_text"
    checkpoint.load("someone/route@v1.0")
    cached(export(sae, tmp_path, "saelens"), monkeypatch, asked)
    one, recipe = checkpoint.load("someone/route/blocks.3.hook_resid_post")
    assert one.sites() == [4] and recipe["title"] == "route_blocks.3.hook_resid_post"
    assert asked == [("someone/route", None), ("someone/route", "v1.0"), ("someone/route", None)]


def test_a_repository_in_the_hubs_cache_loads_offline(tmp_path, monkeypatch):
    from huggingface_hub import constants

    folder = export(made("TopK"), tmp_path, "hf")
    commit = "0" * 40
    store = tmp_path / "cache" / "models--someone--topk"
    (store / "snapshots").mkdir(parents=True)
    (store / "refs").mkdir()
    (store / "refs" / "main").write_text(commit)
    folder.rename(store / "snapshots" / commit)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    sae, recipe = checkpoint.load("someone/topk")
    assert sae.k == 5 and recipe["title"] == "TopK_text"
    with pytest.raises(ValueError, match="no file or folder someone/other; .*HF_HUB_OFFLINE"):
        checkpoint.load("someone/other")


def test_each_way_a_hub_name_can_fail_has_its_own_line(monkeypatch):
    from huggingface_hub import errors

    class Response:
        headers, request = {}, None

        def __init__(self, status_code):
            self.status_code = status_code

    def failing(error):
        def download(*_args, **_kwargs):
            raise error

        monkeypatch.setattr("huggingface_hub.snapshot_download", download)
        with pytest.raises(ValueError, match="no file or folder someone/sae@v2; ") as found:
            checkpoint.load("someone/sae@v2")
        assert "\n" not in str(found.value)
        return str(found.value)

    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    assert "gated (no token was sent)" in failing(
        errors.GatedRepoError("x", response=Response(401))
    )
    monkeypatch.setattr("huggingface_hub.get_token", lambda: "secret")
    assert (
        "gated" in (line := failing(errors.GatedRepoError("x", response=Response(403))))
        and "secret" not in line
        and "no token" not in line
    )
    assert "without a typo" in failing(errors.RepositoryNotFoundError("x", response=Response(404)))
    assert "not the revision" in failing(errors.RevisionNotFoundError("x", response=Response(404)))
    assert "cannot be reached" in failing(
        errors.LocalEntryNotFoundError("Got: ConnectError\nplease check")
    )
    assert "answered 500" in failing(errors.HfHubHTTPError("a b\nc", response=Response(500)))
    assert "answered: a b" in failing(OSError("a b\nc"))


def test_paths_that_are_not_there_are_not_sent_to_the_hub(monkeypatch):
    monkeypatch.setattr(
        "huggingface_hub.snapshot_download", lambda *a, **k: pytest.fail("asked the hub")
    )
    for path in ("outputs/none.pt", "../x/y", "./x/y", "/no/where", "alone"):
        with pytest.raises(ValueError, match="no checkpoint at"):
            checkpoint.load(path)


# -------------------------------------------------------------------------------------------------- objects and entry


def test_a_site_sae_reconstructs_what_the_sae_would_put_in_place():
    for name in EXACT:
        sae, h = (
            made(name, **({"route_patch": "unscaled"} if name == "RouteSAE" else {})),
            2 * torch.randn(50, D) + 1,
        )
        objects = formats.site_saes(sae, "org/lm")
        assert list(objects) == sae.sites()
        for site, one in objects.items():
            assert (
                one.cfg.hook_layer == site - 1
                and one.cfg.model_name == "org/lm"
                and one.cfg.to_dict()["d_sae"] == F
            )
            patch = next(run for run in sae.patches({s: h for s in sae.sites()}) if site in run)[
                site
            ]
            replaced = (patch(h) != h).any(-1)  # a routed SAE leaves tokens of other sites alone
            assert torch.allclose(one(h)[replaced], patch(h)[replaced], atol=1e-4) and (
                replaced.all() or name == "RouteSAE"
            )
        with pytest.raises(ValueError, match="encode them first"):
            one.decode(torch.zeros(3, F))


def test_the_entry_exports_and_ends_with_the_reasons_of_what_it_refused(tmp_path, capsys):
    import runpy

    from src.config import run_stage

    for name in ("TopK", "Crosscoder"):
        checkpoint.save(made(name), recipe_of(made(name)), tmp_path / "SAE_models", f"{name}_text")
    entry = runpy.run_path(str(files.ROOT / "export.py"))["export"]
    paths = [str(tmp_path / "SAE_models" / f"{name}_text.pt") for name in ("Crosscoder", "TopK")]
    code = run_stage(
        "export",
        entry,
        ["--SAE_path", *paths, "--format", "saelens", "--output_dir", str(tmp_path)],
    )
    out = capsys.readouterr()
    assert (
        code == 2
        and "Crosscoder_text is not exported: the code of a Crosscoder" in out.err
        and len(out.err.splitlines()) == 1
    )
    assert (
        "saved" in out.out
        and Path(
            tmp_path, "export", "saelens", "TopK_text", "blocks.5.hook_resid_post", "cfg.json"
        ).exists()
    )
    assert run_stage("export", entry, ["--SAE_path", *paths, "--output_dir", str(tmp_path)]) == 0
    odd = [
        str(tmp_path / "SAE_models" / "TopK_text.pt"),
        "--norm_eps",
        "1e-6",
        "--output_dir",
        str(tmp_path / "odd"),
    ]
    assert (
        run_stage("export", entry, ["--SAE_path", *odd, "--format", "saelens"]) == 2
        and "norm_eps 1e-06" in capsys.readouterr().err
    )
    assert run_stage("export", entry, ["--SAE_path", *odd]) == 0
    assert checkpoint.load(tmp_path / "odd" / "export" / "hf" / "TopK_text")[0].norm_eps == 1e-6
