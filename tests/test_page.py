"""The page holds hostile text as text and nothing from outside; the table reads frontiers off."""

import json
import re
import subprocess
import sys

import pytest

from src.files import ROOT
from src.page import page
from src.plots import between, families, table
from tests.browser import CHROMIUM, Browser

ATTACKS = [
    "</script><script>document.title='owned'</script>",
    "<img src=x onerror=document.title='owned'>",
    "javascript:alert(1)",
    "\u2028'\"&lt;",
    "{{7*7}}",
    "<!--<script>",
    "<svg/onload=document.title='owned'>",
    "\u202e\u200b\u2066e\u0301\U0001f9d1\u200d\U0001f680",
    "w" * 10**5,
]


def made(labels, latents=("7",)):
    context = {
        "tokens": ATTACKS,
        "position": 1,
        "token_activations": [[1, 2.0]],
        "layer": 4,
        "router_weight": 0.5,
        "document": 3,
        "activation": 2.0,
        "quarter": 1,
    }
    entry = {
        "activations": [2.0],
        "tokens": [ATTACKS],
        "position": [1],
        "token_activations": [[[1, 2.0]]],
        "layer": [4],
        "router_weight": [0.5],
        "document": [3],
        "token_class": [ATTACKS[0]],
        "site_counts": [3, 1],
        "decoder_norms": None,
        "max_activation": 2.0,
        "density": 0.1,
        "sample_activations": [1.0, 2.0],
        "sample": [context],
        "promoted": [[ATTACKS[1], 1.0]],
        "suppressed": [[ATTACKS[0], -1.0]],
    }
    contexts = {
        "latent_context_map": {name: entry for name in latents},
        "sites": [4, 5],
        "model": "RouteSAE",
        "source_model": "x/demo",
        "title": ATTACKS[0],
        "latent_size": 8,
        "total_latents": 1,
        "tokens": 100,
        "threshold": 1.0,
        "routing": {
            "share": [0.75, 0.25],
            "sample": {"tokens": ATTACKS, "weights": [[0.9, 0.1]] * 5},
        },
    }
    return page(contexts, labels, [{"title": ATTACKS[1], "L0": 16.0, "NormMSE": 0.1}], b"png")


def test_hostile_text_cannot_end_the_data_or_add_elements():
    html = made({"7": {"description": ATTACKS[0], "score": 4}})
    assert html.count("</script>") == 2 and html.count("<script") == 2 and "<img src=x" not in html
    data = json.loads(re.search(r'id="data">(.*?)</script>', html, re.S).group(1))
    assert (
        data["features"][0]["label"] == ATTACKS[0]
        and [data["words"][i] for i in data["features"][0]["contexts"][0][0]] == ATTACKS
    )
    assert "default-src 'none'" in html and not re.search(
        r"https?://|innerHTML|document\.write|eval\(", html
    )


def test_a_page_without_features_is_a_page():
    html = made({}, ())
    assert json.loads(re.search(r'id="data">(.*?)</script>', html, re.S).group(1))["features"] == []


needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no chromium here")


@pytest.fixture
def browser(tmp_path):
    opened = Browser(tmp_path / "profile", width=390)
    yield opened
    opened.close()


@needs_browser
def test_in_a_browser_the_page_shows_the_text_and_runs_none_of_it(tmp_path, browser):
    (tmp_path / "r.html").write_text(made({"7": {"description": ATTACKS[0], "score": 4}}))
    for anchor, wanted in (
        ("#7", ["Strongest contexts", *ATTACKS[:2]]),
        ("", ["Share of tokens by site", ATTACKS[0]]),
    ):
        browser.open(tmp_path / "r.html", anchor)
        text = browser.run("document.getElementById('view').textContent")
        assert all(part in text for part in wanted)
    assert (
        browser.run("document.title") == "Features" and browser.run("document.images.length") == 1
    )  # the picture given, no forged one
    assert all(address.startswith("data:image/png;base64,") for address in browser.requests)
    assert not [
        e for e in browser.errors if "data:image" not in json.dumps(e)
    ]  # the picture of this test is none


@needs_browser
def test_keys_step_permalinks_open_search_and_order_apply(tmp_path, browser):
    (tmp_path / "r.html").write_text(
        made({"8": {"description": "a fox"}, "7": {"description": "a hen"}}, ["7", "8", "9"])
    )
    browser.open(tmp_path / "r.html", "#8")
    title = "document.querySelector('h2').textContent"
    assert (
        browser.run(title) == "Feature 8"
        and browser.run("document.querySelector('#list a.on').dataset.id") == "8"
    )
    seen = []
    for key in ("j", "ArrowRight", "k", "ArrowLeft", "ArrowLeft"):
        browser.press(key)
        seen.append(browser.run("location.hash"))
    assert seen == ["#9", "#9", "#8", "#7", "#7"]  # it stops at both ends
    browser.press("/")
    for letter in "fox":
        browser.press(letter)
    assert (
        browser.run("[...document.querySelectorAll('#list a')].map(a => a.dataset.id)") == ["8"]
        and browser.run("location.hash") == "#7"
    )
    browser.run("document.getElementById('home').click()")
    browser.run("new Promise(f => setTimeout(f, 50))")
    assert browser.run(title) == ATTACKS[0]
    assert browser.run("document.documentElement.scrollWidth") <= 390  # nothing wider than a phone
    browser.open(tmp_path / "r.html", "#12345")
    assert "No feature 12345" in browser.run("document.getElementById('view').textContent")
    assert browser.run("document.getElementById('site').options.length") == 3


def test_a_frontier_is_read_off_between_its_points_only():
    rows = [
        {
            "title": f"Vanilla_d_target_l0{n}",
            "L0": float(n),
            "NormMSE": e,
            "k": None,
            "sites": [12],
            "model": "Vanilla",
        }
        for n, e in ((8, 0.3), (32, 0.1))
    ]
    rows.append(
        {"title": "TopK_d", "L0": 16.0, "NormMSE": 0.15, "k": 16, "sites": [12], "model": "TopK"}
    )
    family = families(rows)["Vanilla_d"]
    assert between(family, 16.0)["NormMSE"] == pytest.approx(0.2) and between(family, 64.0) is None
    assert "Vanilla_d, read off its frontier" in table(rows)


def test_a_file_that_is_no_contexts_file_is_one_line(tmp_path):
    (tmp_path / "foreign.json").write_text('{"a": 1}')
    (tmp_path / "cut.json").write_text('{"title": "TopK')
    for name, wanted in (
        ("foreign.json", "is no contexts file"),
        ("cut.json", "is not readable JSON"),
        ("missing.json", "No such file"),
    ):
        done = subprocess.run(
            [sys.executable, "-m", "src.page", str(tmp_path / name), str(tmp_path / "p.html")],
            cwd=ROOT,
            capture_output=True,
            text=True,
        )
        assert (
            done.returncode == 2
            and wanted in done.stderr
            and done.stderr.count("\n") == 1
            and not (tmp_path / "p.html").exists()
        )
