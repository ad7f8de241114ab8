"""The page shows hostile text as text, loads nothing from outside and checks its data."""

import copy
import json
import re
import subprocess
import sys

import pytest

from src.feature_files import ADDED, ENTRY_PARTS, HEADER_PARTS
from src.files import ROOT, digest
from src.page import page, page_data
from src.rule_labels import BY_RULE_MARK
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
    "$script $data ${style}",
]
DATA = re.compile(r'(?<=id="data">).*?(?=</script>)', re.S)

SAMPLED_CONTEXT = {
    "tokens": ATTACKS,
    "position": 1,
    "token_activations": [[1, 2.0]],
    "layer": 4,
    "router_weight": 0.5,
    "document": 3,
    "row": 0,
    "start": 5,
    "activation": 2.0,
    "quarter": 1,
}
ENTRY = {
    "activations": [2.0],
    "tokens": [ATTACKS],
    "position": [1],
    "token_activations": [[[1, 2.0]]],
    "layer": [4],
    "router_weight": [0.5],
    "document": [3],
    "row": [0],
    "start": [5],
    "token_class": [ATTACKS[0]],
    "site_counts": [3, 1],
    "site_strengths": [1.5, 0.5],
    "nearest": [[8, 0.9], [9, 0.5]],
    "partners": [[9, 0.25]],
    "logit_histogram": {"from": -2.0, "to": 2.0, "counts": [1, 1000, 1]},
    "decoder_norms": None,
    "max_activation": 2.0,
    "density": 0.1,
    "sample_activations": [1.0, 2.0],
    "sample": [SAMPLED_CONTEXT],
    "promoted": [[ATTACKS[1], 1.0]],
    "suppressed": [[ATTACKS[0], -1.0]],
}
EVALUATION = [{"title": ATTACKS[1], "L0": 16.0, "NormMSE": 0.1}]
TEST = {"balanced_accuracy": 0.825, "n": 24}
LABELS = {"7": {"description": ATTACKS[0], "engine": ATTACKS[1], "score": 4, "detection": TEST}}


def hostile_contexts(latents=("7",)):
    contexts = {
        "latent_context_map": dict.fromkeys(latents, ENTRY),
        "sites": [4, 5],
        "model": "RouteSAE",
        "source_model": "x/demo",
        "title": ATTACKS[0],
        "latent_size": 8,
        "total_latents": 1,
        "tokens": 100,
        "threshold": 1.0,
        "data_path": "texts/<svg onload=document.title='owned'>",
        "firings": [0, 0, 0, 0, 0, 0, 0, 10],
        "codes": 100,
        "sample": {"tokens": ATTACKS, "strongest": [[[7, 2.0], [9, 1.0]]] * len(ATTACKS)},
        "routing": {
            "share": [0.75, 0.25],
            "sample": {"tokens": ATTACKS, "weights": [[0.9, 0.1]] * len(ATTACKS)},
        },
    }
    return copy.deepcopy(contexts)


def words_of(data, context):
    start, length = context[:2]
    return [data["words"][number] for number in data["passages"][start : start + length]]


def hostile_page(labels=LABELS, latents=("7",)):
    return page(hostile_contexts(latents), labels, EVALUATION, b"png")


def test_hostile_text_cannot_end_the_data_or_add_elements():
    html = hostile_page()
    assert html.count("</script>") == html.count("<script") == 2
    assert "<img src=x" not in html
    data = json.loads(DATA.search(html).group())
    feature = dict(zip(data["features"]["keys"], data["features"]["rows"][0], strict=True))
    assert feature["label"] == ATTACKS[0]
    assert words_of(data, feature["contexts"][0]) == ATTACKS
    assert "default-src 'none'" in html
    assert not re.search(r"https?://|innerHTML|document\.write|eval\(", html)


def test_a_page_without_features_is_a_page():
    html = hostile_page({}, ())
    assert json.loads(DATA.search(html).group())["features"]["rows"] == []


def test_windows_that_overlap_are_stored_once_and_cut_words_are_left_out():
    words = "the old war of ten years ended her".split()
    tokens = ["ing", *(f" {word}" for word in words), "oic"]
    entry = copy.deepcopy(ENTRY)
    entry["tokens"] = [tokens[:6]]
    entry["position"] = [3]
    entry["token_activations"] = [[[3, 2.0]]]
    later = {"tokens": tokens[2:], "start": 7, "position": 1, "token_activations": [[1, 1.0]]}
    entry["sample"] = [SAMPLED_CONTEXT | later]
    contexts = hostile_contexts()
    contexts["latent_context_map"] = {"7": entry}
    data = page_data(contexts, LABELS, [])
    feature = data["features"][0]
    shown = [words_of(data, context) for context in (*feature["contexts"], *feature["others"])]
    assert shown == [tokens[1:5], tokens[2:-2]]
    positions = feature["contexts"][0][2], feature["others"][0][2]
    assert [window[index] for window, index in zip(shown, positions, strict=True)] == [" war"] * 2
    assert len(data["passages"]) == len(tokens[1:-2])


def test_a_score_that_no_rule_stands_behind_is_left_out():
    labels = {
        "7": {"description": "[by rule] no rule found; tokens such as 'a'", "score": 1},
        "8": {"description": "[by rule] the token 'war'", "score": 4},
        "9": {"description": "texts on war", "score": 5, "engine": "gpt-4o-mini"},
    }
    data = page_data(hostile_contexts("789"), labels, [])
    shown = [(f["label"], f["engine"], f["score"], f["ruled"]) for f in data["features"]]
    assert shown == [
        ("no rule found; tokens such as 'a'", "by rule", None, False),
        ("the token 'war'", "by rule", 4, True),
        ("texts on war", "gpt-4o-mini", 5, True),
    ]


def change_routing(contexts, **values):
    contexts["routing"]["sample"].update(values)


def change_entry(contexts, **values):
    contexts["latent_context_map"]["7"].update(values)


def change_context(contexts, **values):
    contexts["latent_context_map"]["7"]["sample"][0].update(values)


@pytest.mark.parametrize(
    ("change", "values", "message"),
    [
        (change_routing, {"weights": [[0.9, 0.1]] * 5}, "router weights has 5 values, not 10"),
        (change_routing, {"weights": [[0.9]] * len(ATTACKS)}, "a row of router weights has 1"),
        (change_routing, {"tokens": [1] * len(ATTACKS)}, "tokens of sample of the routing is"),
        (dict.update, {"sites": []}, "there are no sites"),
        (dict.update, {"threshold": float("nan")}, "threshold of the contexts file is no number"),
        (change_entry, {"max_activation": float("inf")}, "max_activation of latent 7 is no number"),
        (change_entry, {"sample_activations": [1e308, -1e308]}, "sample_activations of latent 7"),
        (dict.update, {"tokens": "many"}, "tokens of the contexts file is missing or of a wrong"),
        (dict.update, {"latent_context_map": {"7": 5}}, "latent 7 is no JSON object"),
        (change_entry, {"site_counts": [1, 2, 3]}, "latent 7 by site has 3 values, not 2"),
        (change_entry, {"position": []}, "position of latent 7 has 0 values, not 1"),
        (change_entry, {"promoted": [["word"]]}, "promoted of latent 7 has 1 values"),
        (change_context, {"position": 10}, "position 10 of a context of latent 7"),
        (change_context, {"tokens": "word"}, "tokens of a context of latent 7 is no list"),
        (change_context, {"token_activations": [1, 2]}, "token_activations of a context"),
        (change_context, {"row": "0"}, "row of a context of latent 7 is missing or of a wrong"),
        (change_entry, {"site_strengths": [1.0]}, "latent 7 by site has 1 values, not 2"),
        (change_entry, {"nearest": [["8", 1.0]]}, "nearest of latent 7 is missing or of a wrong"),
        (change_entry, {"partners": 5}, "partners of latent 7 is no list"),
        (change_entry, {"logit_histogram": {"from": 0.0}}, "to of logit_histogram of latent 7"),
        (dict.update, {"sample": {"tokens": ["a"], "strongest": []}}, "strongest latents has 0"),
        (dict.update, {"firings": ["many"]}, "firings of the contexts file is missing"),
    ],
)
def test_damaged_contexts_are_refused_with_the_reason(change, values, message):
    contexts = hostile_contexts()
    change(contexts, **values)
    with pytest.raises(ValueError, match=message):
        page(contexts, LABELS, EVALUATION)


def test_damaged_labels_and_evaluations_are_refused():
    with pytest.raises(ValueError, match="score of the label of latent 7"):
        page(hostile_contexts(), {"7": {"score": "4"}}, EVALUATION)
    with pytest.raises(ValueError, match="n of detection of the label of latent 7"):
        page(hostile_contexts(), {"7": {"detection": {"balanced_accuracy": 0.5}}}, EVALUATION)
    with pytest.raises(ValueError, match="L0 of an evaluation"):
        page(hostile_contexts(), LABELS, [{"title": "a", "L0": "16"}])


# ------------------------------------------------------------------------------- in a browser

needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no chromium is installed")
VIEW_TEXT = "document.getElementById('view').textContent"
SHOWN_IDS = "[...document.querySelectorAll('#list a')].map(link => link.dataset.id)"


@pytest.fixture
def browser(tmp_path):
    tab = Browser(tmp_path / "profile", width=390)
    yield tab
    tab.close()


@pytest.fixture
def show(tmp_path, browser):
    """Opens a page's HTML at an anchor."""

    def write_and_open(html, anchor=""):
        (tmp_path / "report.html").write_text(html)
        browser.open(tmp_path / "report.html", anchor)

    return write_and_open


@needs_browser
def test_in_a_browser_the_page_shows_the_text_and_runs_none_of_it(browser, show):
    html = hostile_page()
    show(html, "#7")
    text = browser.run(VIEW_TEXT)
    assert all(part in text for part in ("Strongest contexts", *ATTACKS[:2]))
    show(html)
    text = browser.run(VIEW_TEXT)
    assert all(part in text for part in ("Share of tokens by site", ATTACKS[0], "Evaluation"))
    assert "cannot be shown" not in text
    assert browser.run("document.querySelectorAll('.map tr').length") == 1 + len(ATTACKS)
    assert browser.run("document.title").startswith(f"{ATTACKS[0]} on demo, ")
    assert browser.run("document.querySelectorAll('svg').length") == 0
    assert browser.run("document.images.length") == 1  # the picture that was given
    assert all(address.startswith("data:image/png;base64,") for address in browser.requests)
    # The bytes "png" are no picture, which is the one error.
    assert all("data:image" in json.dumps(error) for error in browser.errors)


@needs_browser
def test_a_file_of_an_earlier_version_is_shown_without_the_parts_it_lacks(browser, show):
    contexts = hostile_contexts()
    for key in (*HEADER_PARTS, "codes", "data_path"):
        del contexts[key]
    entry = contexts["latent_context_map"]["7"]
    for key in (*ENTRY_PARTS.keys() - {"site_counts"}, *ADDED):
        del entry[key]
    for key in ADDED:
        del entry["sample"][0][key]
    html = page(contexts, {}, EVALUATION)
    for anchor, shown in (("#7", "Strongest contexts"), ("", "Share of tokens by site")):
        show(html, anchor)
        text = browser.run(VIEW_TEXT)
        assert shown in text and "cannot be shown" not in text
    assert not browser.errors


@needs_browser
@pytest.mark.parametrize("sites", [[4], [4, 5]])
def test_an_sae_without_a_router_is_shown(browser, show, sites):
    contexts = hostile_contexts()
    del contexts["routing"]
    contexts["sites"] = sites
    entry = contexts["latent_context_map"]["7"]
    entry["layer"] = [None]
    entry["sample"][0]["layer"] = None
    entry["site_strengths"] = [1.0] * len(sites)
    norms = [0.5] * len(sites) if len(sites) > 1 else None
    entry |= {"site_counts": None if norms else [4], "decoder_norms": norms}
    html = page(contexts, {}, EVALUATION)
    for anchor, shown in (("#7", "Strongest contexts"), ("", "A sample of the text")):
        show(html, anchor)
        text = browser.run(VIEW_TEXT)
        assert shown in text and "cannot be shown" not in text
        assert len(sites) > 1 or "by site" not in text
    browser.run("document.querySelector('.token').click()")
    assert "7" in browser.run("document.querySelector('.panel').textContent")
    assert not browser.errors


@needs_browser
def test_a_broken_part_says_so_and_leaves_the_rest(browser, show):
    html = hostile_page()
    data = json.loads(DATA.search(html).group())
    data["routing"]["sample"]["weights"] = data["routing"]["sample"]["weights"][:5]
    data["routing"]["share"] = None
    keys, (row,) = data["features"].values()
    feature = dict(zip(keys, row, strict=True))
    feature["promoted"] = None
    feature["contexts"] = [[None], *feature["contexts"]]
    other = feature | {"id": "8", "max": "x", "others": None}
    data["features"]["rows"] = [list(feature.values()), list(other.values())]
    html = DATA.sub(lambda _: json.dumps(data).replace("<", "\\u003c"), html)
    show(html)
    text = browser.run(VIEW_TEXT)
    assert "The shares of the sites cannot be shown" in text
    assert "The sample cannot be shown" in text
    assert "Evaluation" in text
    assert browser.run("document.images.length") == 1
    assert browser.run(SHOWN_IDS) == ["7"]
    assert "Feature 8 cannot be shown" in browser.run("document.getElementById('list').textContent")
    show(html, "#7")
    text = browser.run(VIEW_TEXT)
    assert "The decoder direction cannot be shown" in text
    assert "A context cannot be shown" in text
    assert "A sample of its activations, strongest quarter" in text
    show(html, "#8")
    text = browser.run(VIEW_TEXT)
    assert "The summary cannot be shown" in text
    assert "Strongest contexts" in text
    assert "A quarter of the sample cannot be shown" in text


@needs_browser
def test_a_label_by_rule_is_short_until_the_rest_is_asked_for(browser, show):
    words = ["war", "peace", "law", "hen", "fox"]
    whole = "; or ".join(f"the token '{word}'" for word in words)
    whole += ", such as 'war' (91% of the active tokens)"
    show(hostile_page({"7": {"description": f"{BY_RULE_MARK} {whole}"}}, ["7", "8"]), "#7")
    short = "the token 'war'; or the token 'peace'; or the token 'law'"
    label = "document.querySelector('#view p.label > span')?.textContent"
    assert browser.run(label) == short
    entry = "document.querySelector('#list a[data-id=\"7\"] .label')"
    assert browser.run(f"{entry}.textContent") == f"{short}; and 2 more"
    assert browser.run(f"{entry}.title") == whole
    browser.run("document.querySelector('#view .rest').click()")
    assert browser.run(label) == whole
    assert not browser.run("document.querySelector('#view .rest')")
    browser.press("j")  # the next feature has no label
    assert browser.run(label) == "(no label)"
    assert not browser.run("document.querySelector('#view .rest')")


@pytest.fixture
def three_features(show):
    labels = {"8": {"description": "a fox"}, "7": {"description": "a hen"}}
    show(hostile_page(labels, ["7", "8", "9"]), "#8")


@needs_browser
def test_keys_step_permalinks_open_search_and_order_apply(tmp_path, browser, three_features):
    title = "document.querySelector('h2').textContent"
    assert browser.run(title) == "Feature 8"
    assert browser.run("document.querySelector('#list a.on').dataset.id") == "8"
    addresses = []
    for key in ("j", "ArrowRight", "k", "ArrowLeft", "ArrowLeft"):
        browser.press(key)
        addresses.append(browser.run("location.hash"))
    assert addresses == ["#9", "#9", "#8", "#7", "#7"]  # it stops at both ends
    browser.press("/")
    for letter in "fox":
        browser.press(letter)
    assert browser.run(SHOWN_IDS) == ["8"]
    assert browser.run("location.hash") == "#7"
    browser.run("document.getElementById('home').click()")
    browser.run("new Promise(resolve => setTimeout(resolve, 50))")
    assert browser.run(title) == f"{ATTACKS[0]} on demo"
    assert browser.run("document.documentElement.scrollWidth") <= 390  # nothing wider than a phone
    browser.open(tmp_path / "report.html", "#12345")
    assert "No feature 12345" in browser.run(VIEW_TEXT)
    assert browser.run("document.getElementById('site').options.length") == 3


@needs_browser
def test_the_search_puts_whole_tokens_first_and_says_why(browser, show):
    contexts = hostile_contexts("789")
    for latent, name in (("7", "warm"), ("8", "peace"), ("9", "war")):
        contexts["latent_context_map"][latent] = copy.deepcopy(ENTRY) | {"token_class": [name]}
    labels = {"8": {"description": "what ends a war"}}
    show(page(contexts, labels, []))
    browser.press("/")
    for letter in "war":
        browser.press(letter)
    assert browser.run(SHOWN_IDS) == ["9", "8", "7"]
    reasons = browser.run("[...document.querySelectorAll('.reason')].map(x => x.textContent)")
    assert reasons == ["found by token “war”", "found by label", "found by in token “warm”"]


@needs_browser
def test_a_context_opens_and_a_weak_activation_is_weakly_shaded(browser, show):
    contexts = hostile_contexts()
    entry = contexts["latent_context_map"]["7"]
    entry["tokens"] = [["A", " long", "\n", " war", "."]]
    entry["position"] = [2]
    entry["token_activations"] = [[[2, 2.0], [3, 0.2]]]
    show(page(contexts, {}, []), "#7")
    line = "document.querySelector('.context .line')"
    assert browser.run(f"{line}.textContent") == "A long⏎ war."
    shade = "[...document.querySelector('.context').querySelectorAll('.line [style]')]"
    opacity = "x => Number(x.style.background.match(/([0-9.]+)\\)$/)[1])"
    shades = browser.run(f"{shade}.map({opacity})")
    assert shades[0] > 0.85 and shades[1] < 0.2
    browser.run("document.querySelector('.context summary').click()")
    browser.run("new Promise(resolve => setTimeout(resolve, 50))")
    full = browser.run("document.querySelector('.context .full').textContent")
    assert full == "A long⏎\n war."


@needs_browser
def test_tokens_of_the_sample_and_the_map_lead_to_features(browser, show):
    show(hostile_page(latents="789"))
    browser.run("document.querySelectorAll('.token')[3].click()")
    panel = "document.querySelector('.panel')"
    assert "read at site 4" in browser.run(f"{panel}.textContent")
    links = browser.run(f"[...{panel}.querySelectorAll('a')].map(x => x.hash)")
    assert links == ["#7", "#9"]
    browser.run("document.querySelector('canvas').click()")
    browser.run("new Promise(resolve => setTimeout(resolve, 50))")
    assert browser.run("location.hash") in ("#7", "#8", "#9")
    assert not browser.errors


@needs_browser
def test_a_list_of_many_features_grows_when_it_is_scrolled(browser, show):
    show(hostile_page({}, [str(i) for i in range(400)]))
    assert len(browser.run(SHOWN_IDS)) == 150
    browser.run("location.hash = '390'")
    browser.run("new Promise(resolve => setTimeout(resolve, 50))")
    assert browser.run("document.querySelector('#list a.on').dataset.id") == "390"


@pytest.mark.parametrize("anchor", ["#%", "#%E0%A4%A", "#__proto__"])
def test_addresses_of_no_feature_say_so(browser, show, anchor):
    show(hostile_page(), anchor)
    assert f"No feature {anchor[1:]}" in browser.run(VIEW_TEXT)
    assert not browser.errors


# ------------------------------------------------------------------------------- command line


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("foreign.json", '{"a": 1}', "is no contexts file"),
        ("cut.json", '{"title": "TopK', "is not readable JSON"),
        ("missing.json", None, "check the name"),
    ],
)
def test_a_file_that_is_no_contexts_file_is_one_line(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_text(content)
    report = tmp_path / "page.html"
    command = [sys.executable, "-m", "src.page", str(tmp_path / name), str(report)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
    assert not report.exists()


# The page's files on disk: contexts, and labels and evaluations beside them.


def run_page(tmp_path, contexts, *, name="c", labels=None, evaluation=None):
    for folder in ("contexts", "interpret", "eval"):
        (tmp_path / folder).mkdir(exist_ok=True)
    path = tmp_path / "contexts" / f"{name}_contexts.json"
    path.write_text(json.dumps(contexts))
    if labels is not None:
        (tmp_path / "interpret" / f"interp_{name}.json").write_text(json.dumps(labels))
    if evaluation is not None:
        (tmp_path / "eval" / "e.json").write_text(json.dumps(evaluation))
    report = tmp_path / "page.html"
    command = [sys.executable, "-m", "src.page", str(path), str(report)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    html = report.read_text() if report.exists() else ""
    return done, html, digest(path.read_bytes())


def test_labels_of_other_contexts_are_left_out(tmp_path):
    label = {"description": "ten foxes", "contexts_sum": "0" * 16}
    done, html, contexts_sum = run_page(tmp_path, hostile_contexts(), labels={"7": label})
    assert done.returncode == 0
    assert "belong to other contexts and are left out" in done.stdout
    assert "ten foxes" not in html
    label["contexts_sum"] = contexts_sum
    done, html, _ = run_page(tmp_path, hostile_contexts(), labels={"7": label})
    assert "left out" not in done.stdout
    assert "ten foxes" in html


def test_a_title_in_a_contexts_file_leads_to_no_other_file(tmp_path):
    contexts = hostile_contexts()
    for folder in ("secret", "interpret/interp_"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "secret" / "s.json").write_text('{"7": {"description": "a secret label"}}')
    for title in ("/../../secret/s", "**", "\x1b]0;owned\x07"):
        contexts["title"] = title
        done, html, _ = run_page(tmp_path, contexts, evaluation={"title": title})
        assert done.returncode == 0, done.stderr
        assert "a secret label" not in html
        assert "\x1b" not in done.stdout + done.stderr


ODD_FILES = [
    {"contexts": {"title": ["a"]}},
    {"contexts": {"tokens": 10**400}},
    {"contexts": {"latent_context_map": [1]}},
    {"labels": [1]},
    {"labels": {"7": "x"}},
    {"labels": {"7": {"score": 10**400}}},
    {"evaluation": [1]},
    {"evaluation": "x"},
]


@pytest.mark.parametrize("change", ODD_FILES)
def test_files_of_other_shapes_are_one_line(tmp_path, change):
    contexts = hostile_contexts() | change.get("contexts", {})
    files_beside = {"labels": change.get("labels"), "evaluation": change.get("evaluation")}
    done, html, _ = run_page(tmp_path, contexts, **files_beside)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert not html
