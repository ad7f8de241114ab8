"""SAEs in the formats of other libraries and back.

Those libraries are not needed: their documented forward pass is written out here.
"""

import json
import runpy

import pytest
import torch
from huggingface_hub import constants, errors
from safetensors.torch import load_file, save_file

from src import checkpoint, export_formats, files, formats, import_formats, published
from src.config import run_stage
from src.model import build
from src.zoo import ZOO

D, F, LAYERS = 24, 80, 8
# Models that SAELens can hold exactly, and the architecture there.
EXACT = {
    "TopK": "topk",
    "Vanilla": "standard",
    "Gated": "gated",
    "JumpReLU": "jumprelu",
    "BatchTopK": "jumprelu",
    "Matryoshka": "jumprelu",
    "MLSAE": "topk",
    "RouteSAE": "topk",
}


def random_sae(name, **options):
    """An SAE in which every parameter matters. k is so small that no negative value is kept."""
    torch.manual_seed(3)
    sae = build(name, D, LAYERS, {"latent_size": F, "k": 5, **options}).eval()
    with torch.no_grad():
        for key, parameter in sae.named_parameters():
            if key != "threshold":
                parameter.add_(0.05 * torch.randn_like(parameter))
        if "cut" in sae.state_dict():
            sae.cut.fill_(0.7)
    return sae


def recipe_of(sae, **entries):
    recipe = {"format_version": 1, "title": f"{sae.name}_text", "tokens": 1000, "seed": 42}
    recipe |= {"model": sae.name, "config": sae.config, "options": {}}
    return recipe | entries


def export(sae, folder, kind, **entries):
    return export_formats.export(sae, recipe_of(sae, **entries), folder, kind)


def read_json(path):
    return json.loads(path.read_text())


def saelens_latents(folder, h):
    """SAELens' documented forward pass up to the latents, from its two files."""
    config, w = read_json(folder / "cfg.json"), load_file(folder / "sae_weights.safetensors")
    if config["normalize_activations"] == "layer_norm":
        h = h - h.mean(-1, keepdim=True)
        h = h / (h.std(-1, keepdim=True) + 1e-5)
    product = (h - w["b_dec"] * config["apply_b_dec_to_input"]) @ w["W_enc"]
    if config["architecture"] == "gated":
        return (product + w["b_gate"] > 0) * torch.relu(product * w["r_mag"].exp() + w["b_mag"])
    pre_acts = product + w["b_enc"]
    if config["architecture"] == "jumprelu":
        return torch.relu(pre_acts) * (pre_acts > w["threshold"])
    if config["architecture"] == "topk":
        if config["rescale_acts_by_decoder_norm"]:
            pre_acts = pre_acts * w["W_dec"].norm(dim=-1)
        values, indices = pre_acts.topk(config["k"])
        return torch.zeros_like(pre_acts).scatter(-1, indices, values.relu())
    return torch.relu(pre_acts)


# ------------------------------------------------------------------------------- export


@pytest.mark.parametrize("name, architecture", EXACT.items())
def test_exported_files_give_the_same_latents_through_the_documented_forward(
    name, architecture, tmp_path
):
    sae, h = random_sae(name), 3 * torch.randn(200, D) + 1
    folder = export(sae, tmp_path, "saelens", model_path="org/lm", data_path="org/text")
    names = {path.name for path in folder.iterdir() if path.is_dir()}
    assert names == {f"blocks.{site - 1}.hook_resid_post" for site in sae.sites()}
    dictionary = getattr(sae, "sae", sae)
    for site in sae.sites():
        site_folder = folder / f"blocks.{site - 1}.hook_resid_post"
        config = read_json(site_folder / "cfg.json")
        assert config["architecture"] == architecture
        assert config["metadata"]["hook_name"] == site_folder.name
        assert config["metadata"]["model_name"] == "org/lm"
        expected = dictionary.encode(sae.standardise(h)[0])
        latents = saelens_latents(site_folder, h)
        assert torch.equal(expected != 0, latents != 0), site
        assert torch.allclose(expected, latents, atol=1e-5), site
        assert 0 < (latents != 0).float().mean() < 1


def jumprelu_with_negative_thresholds():
    sae = random_sae("JumpReLU", threshold=1e-4)
    with torch.no_grad():
        sae.threshold.sub_(1)
    return sae


@pytest.mark.parametrize(
    "make, reason",
    [
        (lambda: random_sae("Crosscoder"), "together"),
        (lambda: random_sae("RandomK"), "drawn"),
        (lambda: random_sae("RouteSAE", routing="soft"), "mixture"),
        (lambda: build("BatchTopK", D, LAYERS, {"latent_size": F, "k": 5}), "no threshold"),
        (lambda: random_sae("TopK", norm_eps=1e-6), "norm_eps"),
        (lambda: random_sae("TopK", k=60), "negative values"),
        (lambda: random_sae("MLSAE", k=60), "negative values"),
        (jumprelu_with_negative_thresholds, "below 0"),
    ],
)
def test_what_saelens_cannot_hold_exactly_is_refused_with_the_reason_and_nothing_is_written(
    make, reason, tmp_path
):
    with pytest.raises(ValueError, match=reason):
        export(make(), tmp_path, "saelens")
    assert not list(tmp_path.rglob("*.json"))


def test_clipped_topk_is_exported_whatever_its_k_and_a_wrong_export_is_noticed(tmp_path):
    sae = random_sae("TopK", k=60, topk_relu=True)
    assert export(sae, tmp_path, "saelens").is_dir()
    (form,) = sae.to_standard_form().values()
    wrong = form._replace(tensors=form.tensors | {"b_enc": form.tensors["b_enc"] + 0.01})
    with pytest.raises(ValueError, match="other latents"):
        formats.compare(sae, form, formats.SiteSAE(sae, sae.layer, wrong))


def test_route_export_says_what_it_leaves_out(tmp_path):
    folder = export(random_sae("RouteSAE"), tmp_path, "saelens")
    config = read_json(next(folder.rglob("cfg.json")))
    assert "router is left out" in config["metadata"]["caveat"]
    assert "router is left out" in (folder / "README.md").read_text()


@pytest.mark.parametrize("name", ZOO)
def test_hugging_face_folder_loads_back_bit_for_bit(name, tmp_path):
    sae = random_sae(name)
    folder = export(sae, tmp_path, "hf", options={"max_length": 256}, model_path="org/lm")
    loaded, recipe = checkpoint.load(folder)
    assert recipe["title"] == f"{name}_text" and recipe["model_path"] == "org/lm"
    assert recipe["options"] == {"max_length": 256}
    assert loaded.sites() == sae.sites() and type(loaded) is type(sae)
    for key, value in sae.state_dict().items():
        assert torch.equal(value, loaded.state_dict()[key]), key


def test_an_exported_folder_is_not_overwritten_unasked(tmp_path):
    sae = random_sae("TopK")
    readme = export(sae, tmp_path, "hf") / "README.md"
    readme.write_text("my licence")
    with pytest.raises(ValueError, match="--overwrite"):
        export(sae, tmp_path, "hf")
    assert readme.read_text() == "my licence"
    export_formats.export(sae, recipe_of(sae), tmp_path, "hf", overwrite=True)
    assert readme.read_text() != "my licence"


def test_card_tells_model_text_and_measurements_and_no_path_of_this_machine(tmp_path):
    private = tmp_path / "private"
    (private / "corpus").mkdir(parents=True)
    measured = {"NormMSE": 0.125, "KLDiv": 0.5, "L0": 5.0, "tokens": 4321, "split": "eval"}
    measured |= {"units": {"KLDiv": "nats a token"}}
    files.save_json(measured, tmp_path / "eval" / "TopK_text.json")
    paths = {"model_path": str(private), "data_path": str(private / "corpus")}
    options = {"config": str(tmp_path / "run.yaml"), "recipe": "standard"} | paths
    folder = export(random_sae("TopK"), tmp_path, "hf", **paths, options=options)
    card, config = (folder / "README.md").read_text(), read_json(folder / "config.json")
    rows = "| training text | corpus |", "| NormMSE | 0.125 |", "| KLDiv | 0.5 | nats a token |"
    for part in ("TopK_text", *rows, "4321", "checkpoint.load", "license"):
        assert part in card, part
    assert str(tmp_path) not in card + json.dumps(config)
    assert "model_path" not in config and config["model_name"] == "private"
    front_matter = card.split("---")[1]
    assert "base_model" not in front_matter and "sparse-autoencoder" in front_matter
    folder = export(random_sae("Gated"), tmp_path, "hf", model_path="org/lm")
    assert "base_model: org/lm" in (folder / "README.md").read_text()


def test_the_demo_language_model_is_named_as_it_lies_in_the_repository():
    recipe = recipe_of(random_sae("TopK"), model_path=str(files.DEMO_LM), data_path="None")
    shown = export_formats.public_recipe(recipe)
    assert shown["model_path"] == "assets/demo_lm" and "data_path" not in shown


def test_names_from_recipes_stay_inside_the_output_folder(tmp_path):
    out = tmp_path / "out"
    for title in ("../../x", "a/../../b", "/etc/x"):
        try:
            folder = export(random_sae("TopK"), out, "hf", title=title)
            assert folder.resolve().is_relative_to(out / "export" / "hf")
        except ValueError as error:
            assert "cannot name a file" in str(error)
    assert {path.name for path in tmp_path.iterdir()} <= {"out"}
    path = export(random_sae("TopK"), out, "hf") / "config.json"
    path.write_text(json.dumps(read_json(path) | {"title": "../../x"}))
    with pytest.raises(ValueError, match="cannot name a file"):
        checkpoint.load(path.parent)


# ------------------------------------------------------------------------------- import


def saelens_folder(folder, architecture, hook="blocks.5.hook_resid_post", drop=(), **changes):
    """A folder as SAELens writes it, without the tensors in `drop`."""
    torch.manual_seed(5)
    shapes = {"W_enc": (D, F), "W_dec": (F, D), "b_dec": (D,)}
    if architecture == "gated":
        shapes |= {"b_gate": (F,), "b_mag": (F,), "r_mag": (F,)}
    else:
        shapes["b_enc"] = (F,)
    if architecture == "jumprelu":
        shapes["threshold"] = (F,)
    tensors = {name: 0.4 * torch.randn(shape) for name, shape in shapes.items() if name not in drop}
    folder.mkdir(parents=True)
    save_file(tensors, folder / "sae_weights.safetensors")
    config = {"architecture": architecture, "apply_b_dec_to_input": True, "d_in": D, "d_sae": F}
    config["normalize_activations"] = "none"
    config["metadata"] = {
        "hook_name": hook,
        "model_name": "org/lm",
        "sae_lens_version": "6.54.12",
    }
    if architecture == "topk":
        config |= {"k": 7, "rescale_acts_by_decoder_norm": True}
    (folder / "cfg.json").write_text(json.dumps(config | changes))
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
    options = {"apply_b_dec_to_input": at_input, "normalize_activations": norm}
    folder = saelens_folder(tmp_path / "sae", architecture, **options)
    sae, recipe = checkpoint.load(folder)
    assert recipe["model"] == name and sae.sites() == [6] and recipe["model_path"] == "org/lm"

    h = 3 * torch.randn(300, D) + 1
    expected = saelens_latents(folder, h)
    tolerance = {"atol": 1e-3 if norm == "none" else 1e-4, "rtol": 1e-5}
    out = sae.autoencode(sae.gather({6: h}))
    error = (out.latents - expected).abs().max()
    assert torch.allclose(out.latents, expected, **tolerance), error
    assert torch.equal(out.latents != 0, expected != 0)

    w = load_file(folder / "sae_weights.safetensors")
    norms = w["W_dec"].norm(dim=-1) if architecture == "topk" else 1
    x_hat = (expected / norms) @ w["W_dec"] + w["b_dec"]
    assert torch.allclose(out.x_hat, x_hat, atol=1e-3)
    exported = export_formats.export(sae, recipe, tmp_path, "saelens") / "blocks.5.hook_resid_post"
    assert torch.allclose(saelens_latents(exported, h), expected, **tolerance)


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
    folder = saelens_folder(tmp_path / "sae", architecture, **change)
    with pytest.raises(ValueError, match=f"cannot be held exactly here.*{reason}"):
        checkpoint.load(folder)


@pytest.mark.parametrize("level", ["config", "metadata"])
@pytest.mark.parametrize(
    "language_model, is_centred",
    [("gpt2-small", True), ("org/pythia-70m", True), ("meta-llama/Llama-3.2-1B", False)],
)
def test_saes_of_centred_states_read_states_without_their_mean(
    tmp_path, level, language_model, is_centred
):
    folder = saelens_folder(tmp_path / "sae", "standard")
    kwargs = {"model_from_pretrained_kwargs": {"center_writing_weights": True}}
    config = read_json(folder / "cfg.json")
    config["metadata"]["model_name"] = language_model
    if level == "metadata":
        config["metadata"] |= kwargs
    else:
        config |= config.pop("metadata") | kwargs
    (folder / "cfg.json").write_text(json.dumps(config))
    sae, recipe = checkpoint.load(folder)
    h = torch.randn(300, D) + 2
    mean = h.mean(-1, keepdim=True) if is_centred else torch.zeros(300, 1)
    expected = saelens_latents(folder, h - mean)
    assert torch.allclose(sae.autoencode(sae.gather({6: h})).latents, expected, atol=1e-4)
    (patch,) = sae.patches({6: h})
    w = load_file(folder / "sae_weights.safetensors")
    x_hat = expected @ w["W_dec"] + w["b_dec"] + mean
    assert torch.allclose(patch[6](h), x_hat, atol=1e-4)
    exported = export_formats.export(sae, recipe, tmp_path, "saelens") / "blocks.5.hook_resid_post"
    written = read_json(exported / "cfg.json")["metadata"]
    assert ("model_from_pretrained_kwargs" in written) == is_centred
    again, _ = checkpoint.load(exported)
    assert again.input_norm == sae.input_norm == ("mean" if is_centred else "none")
    hub, _ = checkpoint.load(export_formats.export(sae, recipe, tmp_path, "hf"))
    assert hub.input_norm == sae.input_norm


def test_what_an_sae_of_saelens_was_trained_on_is_told(tmp_path, capsys):
    folder = saelens_folder(tmp_path / "sae", "standard")
    config = read_json(folder / "cfg.json")
    kwargs = {"revision": "step3000"}
    config["metadata"] |= {"prepend_bos": False, "model_from_pretrained_kwargs": kwargs}
    (folder / "cfg.json").write_text(json.dumps(config))
    checkpoint.load(folder)
    out = capsys.readouterr().out
    assert "rows without BOS" in out and "revision 'step3000'" in out
    config["metadata"]["hook_head_index"] = 3
    (folder / "cfg.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"one attention head \(hook_head_index 3\)"):
        checkpoint.load(folder)


def test_a_scaling_factor_of_ones_is_nothing_and_another_is_refused(tmp_path):
    for factor, flag in ((1.0, True), (1.0, False), (1.5, True), (1.5, False)):
        name = f"{factor}{flag}"
        folder = saelens_folder(tmp_path / name, "standard", finetuning_scaling_factor=flag)
        path = folder / "sae_weights.safetensors"
        save_file(load_file(path) | {"scaling_factor": torch.full((F,), factor)}, path)
        if factor == 1:
            checkpoint.load(folder)
        else:
            with pytest.raises(ValueError, match="scaling_factor other than 1"):
                checkpoint.load(folder)


@pytest.mark.parametrize(
    "change",
    [
        {"metadata": [1], "hook_name": 5},
        {"metadata": {"hook_name": ["x"]}},
        {"architecture": 5},
        {"architecture": ["topk"]},
        {"activation_fn": "topk", "activation_fn_kwargs": [1]},
        {"activation_fn": "topk", "activation_fn_kwargs": {"k": True}},
        {"normalize_activations": ["x"]},
        {"reshape_activations": 7},
    ],
)
def test_values_of_other_types_in_a_saelens_folder_are_one_line(tmp_path, change):
    folder = saelens_folder(tmp_path / "sae", "standard")
    config = read_json(folder / "cfg.json")
    (folder / "cfg.json").write_text(json.dumps(config | change))
    with pytest.raises(ValueError, match="cannot be held exactly here"):
        checkpoint.load(folder)
    (folder / "cfg.json").write_text("[1]")
    with pytest.raises(ValueError, match="holds no options"):
        checkpoint.load(folder)


@pytest.mark.parametrize("name", ["W_enc", "W_dec", "b_enc", "b_dec"])
def test_saelens_tensors_of_other_shapes_are_named(tmp_path, name):
    folder = saelens_folder(tmp_path / "sae", "standard")
    path = folder / "sae_weights.safetensors"
    for shape in ((3,), (D, F, 1), (F + 1, D)):
        tensors = load_file(path) | {name: torch.zeros(shape)}
        save_file(tensors, folder / "other.safetensors")
        with pytest.raises(ValueError, match="its .* has the shape|its tensors are"):
            source = published.Source(folder, "sae", {})
            lens = import_formats._lens(tensors, read_json(folder / "cfg.json"), source)
            published.hold(lens, source)


def test_folders_written_by_saelens_before_version_6_load(tmp_path):
    folder = saelens_folder(tmp_path / "sae", "standard")
    config = {
        "hook_name": "blocks.3.hook_resid_pre",
        "activation_fn": "topk",
        "activation_fn_kwargs": {"k": 4},
        "normalize_activations": None,
        "apply_b_dec_to_input": False,
        "d_in": D,
        "d_sae": F,
    }
    (folder / "cfg.json").write_text(json.dumps(config))
    sae, recipe = checkpoint.load(folder)
    assert recipe["model"] == "TopK" and sae.k == 4 and sae.sites() == [3]
    assert "model_path" not in recipe


def test_a_folder_of_several_saes_says_which_there_are(tmp_path):
    folder = export(random_sae("MLSAE"), tmp_path, "saelens")
    with pytest.raises(ValueError, match=r"blocks\.1\.hook_resid_post.*name one"):
        checkpoint.load(folder)
    sae, _ = checkpoint.load(folder / "blocks.3.hook_resid_post")
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
    loaded, recipe = checkpoint.load(path, hints={"n_layers": 8})
    assert recipe["model"] == name
    assert {key: recipe["config"].get(key) for key in expected} == expected
    # Both repositories standardise with this epsilon.
    assert loaded.norm_eps == 1e-6 and "norm_eps 1e-06" in capsys.readouterr().out
    loaded, _ = checkpoint.load(path, hints={"n_layers": 8, "norm_eps": 1e-5})
    assert loaded.norm_eps == 1e-5


# ------------------------------------------------------------------------------- hub


def fake_hub(folder, monkeypatch, requests):
    """A hub with one repository, whose files are in `folder`. It notes (name, revision)."""

    def download(repo, revision=None, allow_patterns=None):
        requests.append((repo, revision))
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)


def test_a_hub_name_loads_a_repository_a_folder_in_it_and_a_revision(tmp_path, monkeypatch):
    sae, requests = random_sae("RouteSAE"), []
    fake_hub(export(sae, tmp_path, "hf"), monkeypatch, requests)
    assert checkpoint.load("someone/route")[1]["title"] == "RouteSAE_text"
    checkpoint.load("someone/route@v1.0")
    fake_hub(export(sae, tmp_path, "saelens"), monkeypatch, requests)
    loaded, recipe = checkpoint.load("someone/route/blocks.3.hook_resid_post")
    assert loaded.sites() == [4] and recipe["title"] == "route_blocks.3.hook_resid_post"
    repo = "someone/route"
    assert requests == [(repo, None), (repo, "v1.0"), (repo, None)]


def test_a_repository_in_the_hubs_cache_loads_offline(tmp_path, monkeypatch):
    folder = export(random_sae("TopK"), tmp_path, "hf")
    commit = "0" * 40
    cached = tmp_path / "cache" / "models--someone--topk"
    (cached / "snapshots").mkdir(parents=True)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text(commit)
    folder.rename(cached / "snapshots" / commit)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    sae, recipe = checkpoint.load("someone/topk")
    assert sae.k == 5 and recipe["title"] == "TopK_text"
    with pytest.raises(ValueError, match="no file or folder someone/other; .*HF_HUB_OFFLINE"):
        checkpoint.load("someone/other")


class Response:
    headers, request = {}, None

    def __init__(self, status_code):
        self.status_code = status_code


def test_each_way_a_hub_name_can_fail_has_its_own_line(monkeypatch):
    def message_for(error):
        def download(*_args, **_options):
            raise error

        monkeypatch.setattr("huggingface_hub.snapshot_download", download)
        with pytest.raises(ValueError, match="no file or folder someone/sae@v2; ") as caught:
            checkpoint.load("someone/sae@v2")
        message = str(caught.value)
        assert "\n" not in message
        return message

    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    message = message_for(errors.GatedRepoError("x", response=Response(401)))
    assert "gated (no token was sent)" in message
    monkeypatch.setattr("huggingface_hub.get_token", lambda: "secret")
    message = message_for(errors.GatedRepoError("x", response=Response(403)))
    assert "gated" in message and "secret" not in message and "no token" not in message
    for error, expected in (
        (errors.RepositoryNotFoundError("x", response=Response(404)), "without a typo"),
        (errors.RevisionNotFoundError("x", response=Response(404)), "not the revision"),
        (errors.LocalEntryNotFoundError("Got: ConnectError\nplease check"), "cannot be reached"),
        (errors.HfHubHTTPError("a b\nc", response=Response(500)), "answered 500"),
        (OSError("a b\nc"), "answered: a b"),
    ):
        assert expected in message_for(error)


def test_paths_that_are_not_there_are_not_sent_to_the_hub(monkeypatch):
    monkeypatch.setattr(
        "huggingface_hub.snapshot_download", lambda *_, **__: pytest.fail("asked the hub")
    )
    for path in ("outputs/none.pt", "../x/y", "./x/y", "/no/where", "alone"):
        with pytest.raises(ValueError, match="no checkpoint at"):
            checkpoint.load(path)


# ------------------------------------------------------------------------------- objects and entry


@pytest.mark.parametrize("name", EXACT)
def test_a_site_sae_reconstructs_what_the_sae_would_put_in_place(name):
    is_routed = name == "RouteSAE"
    sae = random_sae(name, **({"route_patch": "unscaled"} if is_routed else {}))
    h = 2 * torch.randn(50, D) + 1
    site_saes = formats.site_saes(sae, "org/lm")
    assert list(site_saes) == sae.sites()
    for site, site_sae in site_saes.items():
        assert site_sae.cfg.hook_layer == site - 1 and site_sae.cfg.model_name == "org/lm"
        assert site_sae.cfg.to_dict()["d_sae"] == F
        patches = sae.patches({s: h for s in sae.sites()})
        patched = next(patch for patch in patches if site in patch)[site](h)
        is_patched = (patched != h).any(-1)  # a routed SAE leaves tokens of other sites alone
        assert torch.allclose(site_sae(h)[is_patched], patched[is_patched], atol=1e-4)
        assert is_patched.all() or is_routed
    with pytest.raises(ValueError, match="encode them first"):
        site_sae.decode(torch.zeros(3, F))


def test_the_entry_exports_and_ends_with_the_reasons_of_what_it_refused(tmp_path, capsys):
    folder = tmp_path / "SAE_models"
    for name in ("TopK", "Crosscoder"):
        sae = random_sae(name)
        checkpoint.save(sae, recipe_of(sae), folder, f"{name}_text")
    entry = runpy.run_path(str(files.ROOT / "export.py"))["export"]
    topk, crosscoder = str(folder / "TopK_text.pt"), str(folder / "Crosscoder_text.pt")

    def run(*argv, out=tmp_path):
        return run_stage("export", entry, ["--SAE_path", *argv, "--output_dir", str(out)])

    assert run(crosscoder, topk, "--format", "saelens") == 2
    out, err = capsys.readouterr()
    assert "Crosscoder_text is not exported: the code of a Crosscoder" in err
    assert len(err.splitlines()) == 1 and "saved" in out
    exported = tmp_path / "export" / "saelens" / "TopK_text" / "blocks.5.hook_resid_post"
    assert (exported / "cfg.json").exists()
    assert run(crosscoder, topk) == 0

    other = tmp_path / "other"
    assert run(topk, "--norm_eps", "1e-6", "--format", "saelens", out=other) == 2
    assert "norm_eps 1e-06" in capsys.readouterr().err
    assert run(topk, "--norm_eps", "1e-6", out=other) == 0
    assert checkpoint.load(other / "export" / "hf" / "TopK_text")[0].norm_eps == 1e-6
