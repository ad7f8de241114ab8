"""Features for Neuronpedia, checked against the schema of its upload (upload-batch/route.tsx)."""

import json
import re

import pytest
from test_formats import random_sae, recipe_of

from src import checkpoint, export_formats, files, neuronpedia

SITES = {"TopK": [6], "RouteSAE": [2, 3, 4]}


def context(site, activation, tokens=("Re", "turn", "", " the", " value"), position=1):
    active = [[position, activation], [4, round(activation / 4, 3)]]
    return {
        "activation": activation,
        "tokens": list(tokens),
        "position": position,
        "token_activations": active,
        "token_class": "turn",
        "layer": site,
        "router_weight": 1.0,
        "document": 3,
    }


def entry(*contexts, sites=1):
    keys = contexts[0].keys() - {"activation"}
    columns = {key: [one[key] for one in contexts] for key in keys}
    return columns | {
        "activations": [one["activation"] for one in contexts],
        "max_activation": contexts[0]["activation"],
        "density": 0.25,
        "site_counts": [3, 1, 0][:sites] if sites > 1 else [4],
        "sample": [contexts[0] | {"quarter": 1}],
        "sample_activations": [1.0, 2.0],
        "promoted": [[" the", 1.5], ["", 1.25]],
        "suppressed": [[" a", 0.75]],
    }


def contexts_of(name, **changes):
    """What apply.py writes, for a few latents."""
    sites = SITES[name]
    at_sites = [context(site, 4.0 - number) for number, site in enumerate(sites)]
    table = {"7": entry(*at_sites, sites=len(sites)), "3": entry(at_sites[0], sites=len(sites))}
    header = {
        "title": f"{name}_text",
        "model": name,
        "source_model": "Org/Llama-3.2-1B_x",
        "sites": sites,
        "latent_size": 80,
        "total_latents": len(table),
        "tokens": 1000,
        "threshold": 1.0,
        "latent_context_map": table,
    }
    return header | changes


def labels_of():
    return {"7": {"description": "the rest of a word " * 60, "category": "low-level", "score": 4}}


def check_schema(body):
    """The rules of uploadBatchSchema, written out."""
    assert body.keys() == {"modelId", "source", "features"}
    for name in (body["modelId"], body["source"]):
        assert name and name == name.lower()
    assert re.fullmatch(r"\d+-[a-z0-9.-]{1,32}", body["source"])
    assert 1 <= len(body["features"]) <= 128
    indices = [feature["index"] for feature in body["features"]]
    assert len(set(indices)) == len(indices)
    for feature in body["features"]:
        assert 0 <= feature["index"] <= 10_000_000 and isinstance(feature["index"], int)
        assert 0 <= feature["density"] <= 1
        for logits in (feature["topLogits"], feature["bottomLogits"]):
            assert logits is None or len(logits) <= 20
            assert all(one["token"] and isinstance(one["value"], float) for one in logits or ())
        for explanation in feature["explanations"]:
            assert 1 <= len(explanation["text"]) <= 512
            # Other names than those it knows are refused.
            assert explanation["methodName"] is None and explanation["modelName"] is None
        assert feature["activations"]
        for activation in feature["activations"]:
            tokens, values = activation["tokens"], activation["values"]
            assert 1 <= len(tokens) == len(values) <= 1024
            assert all(isinstance(token, str) and token for token in tokens)
            assert all(isinstance(value, float) for value in values)


def test_features_follow_the_schema_and_keep_contexts_and_labels():
    ((source, body),) = neuronpedia.bodies(contexts_of("TopK"), labels_of())
    check_schema(body)
    assert source == body["source"] == "5-topk-text" and body["modelId"] == "llama-3.2-1b-x"
    first, second = body["features"]
    assert (first["index"], second["index"]) == (3, 7)
    assert first["explanations"] == [] and second["explanations"][0]["text"].startswith("the rest")
    assert second["density"] == 0.25
    activation = second["activations"][0]
    # A token without a text of its own is joined to the one before it.
    assert activation["tokens"] == ["Re", "turn", " the", " value"]
    assert activation["values"] == [0.0, 4.0, 0.0, 1.0]
    assert second["topLogits"] == [{"token": " the", "value": 1.5}]
    assert second["bottomLogits"] == [{"token": " a", "value": -0.75}]


def test_an_sae_of_several_sites_fills_a_source_for_each_and_a_joint_code_is_refused():
    bodies = dict(neuronpedia.bodies(contexts_of("RouteSAE"), {}))
    assert list(bodies) == ["1-routesae-text", "2-routesae-text", "3-routesae-text"]
    for body in bodies.values():
        check_schema(body)
    densities = [f["density"] for f in bodies["1-routesae-text"]["features"]]
    assert densities == [0.25 * 3 / 4] * 2
    assert [f["index"] for f in bodies["3-routesae-text"]["features"]] == [7]
    joint = contexts_of("TopK")
    joint["latent_context_map"]["7"]["layer"] = [None]
    with pytest.raises(ValueError, match="read from sites 6 together"):
        list(neuronpedia.bodies(joint, {}))


def test_many_features_are_divided_and_long_contexts_are_cut():
    contexts = contexts_of("TopK")
    long = context(6, 2.0, tokens=["x"] * 3000, position=2990)
    contexts["latent_context_map"] = {str(n): entry(long) for n in range(300)}
    bodies = [body for _, body in neuronpedia.bodies(contexts, {})]
    assert [len(body["features"]) for body in bodies] == [128, 128, 44]
    for body in bodies:
        check_schema(body)
    assert max(bodies[0]["features"][0]["activations"][0]["values"]) == 2.0


@pytest.mark.parametrize(
    "damage",
    [
        lambda c: c.update(sites="6"),
        lambda c: c["latent_context_map"]["7"].update(tokens=[["a"], ["b"]]),
        lambda c: c["latent_context_map"]["7"].update(promoted=[[1, 2]]),
        lambda c: c["latent_context_map"].update({"3": 5}),
    ],
)
def test_damaged_contexts_end_in_one_line(damage):
    contexts = contexts_of("TopK")
    damage(contexts)
    with pytest.raises(ValueError, match="damaged contexts"):
        list(neuronpedia.bodies(contexts, {}))


def test_the_export_needs_contexts_of_these_weights(tmp_path):
    sae = random_sae("TopK")
    recipe = recipe_of(sae, model_path="org/lm", weights_sum=checkpoint.weights_sum(sae))
    with pytest.raises(ValueError, match="TopK_text_contexts.json; run apply.py first"):
        export_formats.export(sae, recipe, tmp_path, "neuronpedia")
    path = tmp_path / "contexts" / "TopK_text_contexts.json"
    files.save_json(contexts_of("TopK", weights_sum="another"), path)
    with pytest.raises(ValueError, match="of another SAE that had this name"):
        export_formats.export(sae, recipe, tmp_path, "neuronpedia")
    files.save_json(contexts_of("TopK", weights_sum=recipe["weights_sum"]), path)
    files.save_json(labels_of(), tmp_path / "interpret" / "interp_TopK_text.json")
    folder = export_formats.export(sae, recipe, tmp_path, "neuronpedia")
    body = json.loads((folder / "5-topk-text" / "batch-0000.json").read_text())
    check_schema(body)
    assert body["modelId"] == "lm" and body["features"][1]["explanations"]
    text = (folder / "README.md").read_text()
    assert 'SourceSet.new(model_id="lm", name="topk-text")' in text
