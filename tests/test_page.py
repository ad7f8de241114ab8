"""The page holds hostile text as text and nothing from outside; the table reads frontiers off."""

import json
import re
import shutil
import subprocess

import pytest

from src.page import page
from src.plots import between, families, table

ATTACKS = [
    "</script><script>document.title='owned'</script>", "<img src=x onerror=document.title='owned'>", "javascript:alert(1)",
    "\u2028'\"&lt;", "{{7*7}}",
]


def made(labels):
    context = {"tokens": ATTACKS, "position": 1, "token_activations": [[1, 2.0]], "layer": 4, "router_weight": 0.5, "document": 3, "activation": 2.0}
    entry = {
        "activations": [2.0], "tokens": [ATTACKS], "position": [1], "token_activations": [[[1, 2.0]]], "layer": [4], "router_weight": [0.5],
        "document": [3], "token_class": [ATTACKS[0]], "site_counts": [3, 1], "decoder_norms": None, "max_activation": 2.0, "density": 0.1,
        "sample_activations": [1.0, 2.0], "sample": [context], "promoted": [[ATTACKS[1], 1.0]], "suppressed": [[ATTACKS[0], -1.0]],
    }
    contexts = {
        "latent_context_map": {"7": entry}, "sites": [4, 5], "model": "RouteSAE", "source_model": "x/demo", "title": ATTACKS[0], "latent_size": 8,
        "total_latents": 1, "tokens": 100, "threshold": 1.0,
        "routing": {"share": [0.75, 0.25], "sample": {"tokens": ATTACKS, "weights": [[0.9, 0.1]] * 5}},
    }
    return page(contexts, labels, [{"title": ATTACKS[1], "L0": 16.0, "NormMSE": 0.1}], b"png")


def test_hostile_text_cannot_end_the_data_or_add_elements():
    html = made({"7": {"description": ATTACKS[0], "score": 4}})
    assert html.count("</script>") == 2 and html.count("<script") == 2 and "<img src=x" not in html
    data = json.loads(re.search(r'id="data">(.*?)</script>', html, re.S).group(1))
    assert data["features"][0]["label"] == ATTACKS[0] and data["features"][0]["contexts"][0]["tokens"] == ATTACKS
    assert "default-src 'none'" in html and not re.search(r"https?://|innerHTML|document\.write|eval\(", html)


@pytest.mark.skipif(shutil.which("chromium") is None, reason="no chromium here")
def test_in_a_browser_the_page_shows_the_text_and_runs_none_of_it(tmp_path):
    (tmp_path / "r.html").write_text(made({"7": {"description": ATTACKS[0], "score": 4}}))
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=3000", "--dump-dom", f"--user-data-dir={tmp_path}/u"]
    for anchor, wanted in (("#7", "Strongest contexts"), ("", "Share of tokens by site")):
        done = subprocess.run([*command, f"file://{tmp_path}/r.html{anchor}"], capture_output=True, text=True, timeout=90)
        body = done.stdout
        assert wanted in body and "<title>Features</title>" in body, done.stderr[-500:]
        assert "<img src=\"x\"" not in body and "<img src=x" not in body


def test_a_frontier_is_read_off_between_its_points_only():
    rows = [
        {"title": f"Vanilla_d_target_l0{n}", "L0": float(n), "NormMSE": e, "k": None, "sites": [12], "model": "Vanilla"}
        for n, e in ((8, 0.3), (32, 0.1))
    ]
    rows.append({"title": "TopK_d", "L0": 16.0, "NormMSE": 0.15, "k": 16, "sites": [12], "model": "TopK"})
    family = families(rows)["Vanilla_d"]
    assert between(family, 16.0)["NormMSE"] == pytest.approx(0.2) and between(family, 64.0) is None
    assert "Vanilla_d, read off its frontier" in table(rows)
