"""explore.py: its page in a browser, its steering, and whom its server answers."""

import http.client
import json
import subprocess
import sys
import threading
import time

import pytest

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")

from src import names
from src import server as server_module
from src.applier import Applier
from src.config import parse, run_stage
from src.explorer import Busy, Explorer
from src.files import DEMO_LM, ROOT
from src.interpreter import Interpreter
from src.steerer import Steerer
from src.trainer import Trainer
from src.zoo import ZOO
from tests.browser import CHROMIUM, Browser

NAMES = ("RouteSAE", "TopK", "Crosscoder")
TEXT = "Returns the value of"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """An SAE of each model of the zoo, on the demo LM; the RouteSAE has contexts and labels."""
    folder = tmp_path_factory.mktemp("explore")
    lines = [{"text": f"The {i}th value is {i % 7}. Returns the size! " * 4} for i in range(60)]
    (folder / "text.jsonl").write_text("\n".join(map(json.dumps, lines)))
    argv = ["--output_dir", str(folder), "--dtype", "float32"]
    text = ["--data_path", str(folder / "text.jsonl"), "--max_length", "32", "--batch_size", "4"]
    sizes = "--latent_size 64 --k 4 --max_samples 40 --split all".split()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DATA_DIR", str(folder / "data"))
        train = ["--model", *ZOO, "--model_path", str(DEMO_LM)]
        Trainer(parse("train", [*train, *argv, *text, *sizes])).run()
        path = ["--SAE_path", str(sae_path(folder, "RouteSAE"))]
        apply = [*path, *argv, *text, "--lines", "1", "--split", "all"]
        Applier(parse("apply", apply)).run()
        Interpreter(parse("interpret", ["--engine", "heuristic", *argv[:2]])).run()
    return folder


def sae_path(folder, name):
    return folder / "SAE_models" / f"{name}_text.pt"


def explorer_of(folder, names, n_tokens):
    paths = [str(sae_path(folder, name)) for name in names]
    argv = ["--SAE_path", *paths, "--output_dir", str(folder), "--dtype", "float32"]
    return Explorer(parse("explore", [*argv, "--max_new_tokens", str(n_tokens)]))


@pytest.fixture(scope="module")
def explorer(folder):
    return explorer_of(folder, NAMES, 5)


@pytest.fixture
def served():
    """Serves answers in a thread: served(answers) -> address."""
    runners = []

    def start(answers):
        listener = server_module.listening(0)
        runner, address = server_module.server(answers, listener)
        thread = threading.Thread(target=runner.run, args=([listener],))
        thread.start()
        runners.append((runner, thread, listener))
        while not runner.started:
            time.sleep(0.01)
        return address

    yield start
    for runner, thread, listener in runners:
        runner.should_exit = True
        thread.join()
        listener.close()


# ------------------------------------------------------------------------------ what it answers


def test_all_saes_are_read_from_one_pass_as_a_reader_reads_each(explorer, monkeypatch):
    answer = explorer.read(TEXT)
    assert "".join(answer["tokens"]) == TEXT
    for reader, result in zip(explorer.readers, answer["saes"], strict=True):
        reading = reader.read(TEXT)
        assert result["sites"] == reading.sites
        pairs = [
            [(latent, round(value, 3)) for latent, value in row] for row in reading.strongest(6)
        ]
        assert [[tuple(pair) for pair in row] for row in result["strongest"]] == pairs
    labels = answer["saes"][0]["labels"]
    assert labels and all(isinstance(label, str) for label in labels.values())
    assert not answer["saes"][1]["labels"]


def test_any_sae_of_the_zoo_is_read_and_steered(folder):
    explorer = explorer_of(folder, ZOO, 1)
    results = explorer.read(TEXT)["saes"]
    assert len(results) == len(ZOO)
    for index, name in enumerate(ZOO):
        edits = [[["set", latent, 500.0]] for latent in range(4)]
        steps = [step for edit in edits for step in explorer.steer(index, TEXT, edit)]
        assert any(step["steered"] != step["as_is"] for step in steps), name
        assert f"{name}_text on {names.language_model(DEMO_LM)}" in explorer.page(index)


@pytest.mark.parametrize("index", range(len(NAMES)))
def test_it_writes_what_steer_py_writes(folder, tmp_path, explorer, index):
    path = str(sae_path(folder, NAMES[index]))
    argv = ["--SAE_path", path, "--output_dir", str(tmp_path), "--dtype", "float32"]
    argv += ["--prompt", TEXT, "--set", "3=40", "--max_new_tokens", "5"]
    expected = Steerer(parse("steer", argv)).run()["outputs"]["0"][0]
    steps = list(explorer.steer(index, TEXT, [["set", 3, 40.0]]))
    assert steps[-1]["as_is"] == expected["original_output"]
    assert steps[-1]["steered"] == expected["clamped_output"] != steps[-1]["as_is"]
    assert [step["step"] for step in steps] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ((7, TEXT, [["set", 3, 1]]), "SAE 7: there are 0 ... 2"),
        ((0, "", [["set", 3, 1]]), "no text"),
        ((0, "a" * 5000, [["set", 3, 1]]), "at most 4,000 are read"),
        ((0, None, [["set", 3, 1]]), "no text"),
        ((0, TEXT, []), "no edit"),
        ((0, TEXT, [["drop", 3, 1]]), "an edit is"),
        ((0, TEXT, [["set", 3, 1e400]]), "an edit is"),
        ((0, TEXT, [["set", True, 1]]), "an edit is"),
        ((0, TEXT, [["set", 64, 1]]), "has latents 0 ... 63"),
    ],
)
def test_requests_that_cannot_be_answered_say_why(explorer, request_, message):
    with pytest.raises(ValueError, match=message):
        list(explorer.steer(*request_))


def test_a_busy_language_model_is_waited_for_and_then_named(explorer, monkeypatch):
    monkeypatch.setattr("src.explorer.PATIENCE", 0.05)
    steps = explorer.steer(0, TEXT, [["set", 3, 1.0]])
    next(steps)
    assert explorer.read(TEXT)["tokens"]  # between two tokens it is free
    with explorer._turn():
        with pytest.raises(Busy, match="busy"):
            explorer.read(TEXT)
    assert next(steps)["step"] == 2


# ------------------------------------------------------------------------- whom the server answers


class Echo:
    """Answers without a model."""

    def page(self, index):
        return f"page {index}"

    def read(self, text):
        return {"text": text}

    def steer(self, index, text, operations):
        yield {"step": 1}
        raise ValueError("no more")


def answer(address, path="", method="GET", body=None, **headers):
    """(status, text) of a request. Underscores in the names of headers stand for hyphens."""
    _, _, host, token, _ = address.split("/")
    connection = http.client.HTTPConnection(host, timeout=20)
    headers = {name.replace("_", "-"): value for name, value in headers.items()}
    path = path if path.startswith("/") else f"/{token}/{path}"
    connection.request(method, path, body, headers)
    response = connection.getresponse()
    text = response.read().decode()
    connection.close()
    return response.status, text, response.headers


JSON_TYPE = {"Content_Type": "application/json"}


def test_only_requests_of_its_own_page_are_answered(served):
    address = served(Echo())
    host = address.split("/")[2]
    status, text, headers = answer(address, "?sae=2")
    assert (status, text) == (200, "page 2")
    assert headers["Content-Security-Policy"] == "frame-ancestors 'none'"
    assert headers["Referrer-Policy"] == "no-referrer"
    body = json.dumps({"text": "a"})
    assert answer(address, "read", "POST", body, **JSON_TYPE)[:2] == (200, '{"text":"a"}')
    own = {"Origin": f"http://{host}", "Sec_Fetch_Site": "same-origin"}
    assert answer(address, "read", "POST", body, **JSON_TYPE, **own)[0] == 200
    refused = [
        ({"path": "/"}, "wrong token"),
        ({"path": "/wrong/"}, "wrong token"),
        ({"path": "/caf%C3%A9/"}, "wrong token"),
        ({"Host": "evil.example"}, "another host"),
        ({"Host": "127.0.0.1"}, "another host"),
        ({"Origin": "http://evil.example"}, "another origin"),
        ({"Origin": "null"}, "another origin"),
        ({"Sec_Fetch_Site": "cross-site"}, "another site"),
        ({"path": "read", "method": "POST", "body": body}, "a request is JSON"),
        ({"path": "read", "method": "POST", "body": body, "Content_Type": "text/plain"}, "is JSON"),
    ]
    for options, message in refused:
        status, text, _ = answer(address, **options)
        assert status == 403 and message in text, options


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("{", "JSON"),
        ("[1]", "a request is a JSON object"),
        ('{"text": "' + "a" * 70_000 + '"}', "at most 65536 bytes"),
        ("[" * 60_000, "JSON"),
    ],
)
def test_bodies_that_are_no_requests_are_refused(served, body, message):
    status, text, _ = answer(served(Echo()), "read", "POST", body, **JSON_TYPE)
    assert status == 400 and message in text


def test_the_steps_come_as_lines_and_an_error_is_the_last(served):
    _, text, _ = answer(served(Echo()), "steer", "POST", "{}", **JSON_TYPE)
    lines = [json.loads(line) for line in text.splitlines()]
    assert lines == [{"step": 1}, {"error": "no more", "busy": False}]


def test_a_missing_server_library_is_named(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    monkeypatch.delitem(sys.modules, "src.server")
    from explore import explore

    assert run_stage("explore", explore, []) == 2
    message = "explore.py needs the package uvicorn; pip install -r requirements-explore.txt"
    assert message in capsys.readouterr().err


def test_a_port_that_is_taken_is_an_error_before_models_load(tmp_path):
    with server_module.listening(0) as taken:
        taken.listen()
        port = str(taken.getsockname()[1])
        command = [sys.executable, "explore.py", "--port", port, "--output_dir", str(tmp_path)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert f"--port {port} cannot be used" in done.stderr


# ------------------------------------------------------------------------------- in a browser

needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no chromium is installed")
STRIPS = "document.querySelectorAll('.readings > div').length"


@pytest.fixture
def browser(tmp_path):
    tab = Browser(tmp_path / "profile", width=1100)
    yield tab
    tab.close()


def type_text(browser, text):
    browser.run("document.getElementById('typed').select()")
    browser.send("Input.insertText", text=text)


def read_tokens(browser, text):
    """Wait until the first strip shows a text."""
    strip = "[...document.querySelectorAll('.readings > div:first-child .token')]"
    shown = f"{strip}.map(token => token.textContent).join('')"
    browser.wait_for(f"{shown} === {json.dumps(text)}")


@needs_browser
def test_a_typed_text_is_read_and_its_tokens_lead_to_cards_and_to_other_saes(
    browser, served, explorer
):
    browser.go(served(explorer))
    browser.wait_for(f"{STRIPS} === {len(NAMES)}")
    type_text(browser, TEXT)
    read_tokens(browser, TEXT)
    attack = "</script><img src=x onerror=document.title='owned'> <b>a"
    type_text(browser, attack)
    read_tokens(browser, attack)
    assert browser.run("document.images.length") == 0
    assert "owned" not in browser.run("document.title")
    browser.run("document.querySelector('.readings .token').click()")
    links = "[...document.querySelectorAll('.readings > div:nth-child({}) a.feature')]"
    own, other = (
        browser.run(f"{links.format(n)}.map(a => a.getAttribute('href'))") for n in (1, 2)
    )
    assert own and all(link.startswith("#") for link in own)
    assert other and all(link.startswith("?sae=1#") for link in other)
    browser.run(f"{links.format(1)}[0].click()")
    browser.wait_for(f"document.querySelector('h2')?.textContent === 'Feature {own[0][1:]}'")
    assert not browser.errors


@needs_browser
def test_a_feature_is_held_and_switched_off_by_the_slider(browser, served, explorer):
    latent = next(iter(explorer.readers[0].labels))
    browser.go(served(explorer) + f"#{latent}")
    browser.wait_for("document.getElementById('strength')")
    type_text(browser, TEXT)
    as_is = "document.getElementById('as-is').textContent"
    steered = "document.getElementById('steered').textContent"
    done = "document.getElementById('live-note').textContent === ''"
    browser.wait_for(f"{as_is} && {done}")
    move = "const s = document.getElementById('strength'); s.value = 100; "
    browser.run(f"{{ {move} s.dispatchEvent(new Event('input')); }}")
    maximum = explorer_maximum(browser)
    *_, expected = explorer.steer(0, TEXT, [["set", latent, maximum]])
    browser.wait_for(f"{steered} === {json.dumps(expected['steered'])} && {done}")
    assert browser.run(as_is) == expected["as_is"]
    choose = "const k = document.getElementById('kind'); k.value = 'zero'; "
    browser.run(f"{{ {choose} k.dispatchEvent(new Event('change')); }}")
    *_, expected = explorer.steer(0, TEXT, [["set", latent, 0]])
    browser.wait_for(f"{steered} === {json.dumps(expected['steered'])} && {done}")
    assert not browser.errors


def explorer_maximum(browser):
    """The strength at the end of the slider, as the page sends it."""
    return browser.run("Number((2 * featureById.get(current).max).toPrecision(3))")


@needs_browser
def test_an_sae_without_contexts_can_be_read_and_steered(browser, served, explorer):
    browser.go(served(explorer) + "?sae=2#3")
    browser.wait_for("document.getElementById('strength')")
    assert "No feature 3 on this page" in browser.run("document.getElementById('view').textContent")
    browser.run("document.querySelector('.controls button').click()")
    browser.wait_for("document.getElementById('as-is').textContent")
    assert not browser.errors


@needs_browser
def test_a_wrong_token_shows_why_and_a_busy_model_is_asked_again(
    browser, served, explorer, monkeypatch
):
    address = served(explorer)
    browser.go(address[:-6] + "/")
    assert "wrong token" in browser.run("document.body.textContent")
    monkeypatch.setattr("src.explorer.PATIENCE", 0.05)
    with explorer._turn():
        browser.go(address)
        note = "document.getElementById('live-note').textContent"
        browser.wait_for(f"{note} === 'The language model is busy; waiting.'")
    browser.wait_for(f"{STRIPS} === {len(NAMES)}")


@needs_browser
def test_two_users_read_while_one_of_them_steers(tmp_path, browser, served, explorer):
    address = served(explorer)
    latent = next(iter(explorer.readers[0].labels))
    browser.go(address + f"#{latent}")
    browser.wait_for("document.getElementById('strength')")
    type_text(browser, TEXT)
    second = Browser(tmp_path / "second", width=390, dark=True)
    try:
        second.go(address)
        second.wait_for(f"{STRIPS} === {len(NAMES)}")
        type_text(second, "another text")
        read_tokens(second, "another text")
        assert second.run("document.documentElement.scrollWidth") <= 390
    finally:
        second.close()
    browser.wait_for("document.getElementById('as-is').textContent")
