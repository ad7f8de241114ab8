"""Labels from contexts: by rule, and from a local endpoint that misbehaves."""

import itertools
import json
import os
import signal
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from src import files, rule_labels
from src.config import parse, run_stage
from src.interpreter import (
    Interpreter,
    balanced_accuracy,
    choose_contexts,
    parse_answer,
    parse_labels,
    quote_context,
    read_entries,
)
from src.utils import load_contexts

N_FEATURES = 12
ANSWER_TOKENS = 110  # the usage that the server reports for each answer
GOOD = json.dumps(
    {"category": "low-level", "score": 4, "polysemantic": False, "explanation": "the word fox"}
)


def context(word, activation, text="a <ACTIVATED>fox</ACTIVATED> ran"):
    return {"activation": activation, "context": text, "token_class": word}


def entry(number):
    contexts = [
        {"activation": 9.0 - j, "context": f"n{number} <ACTIVATED>x</ACTIVATED> {j}"}
        for j in range(5)
    ]
    sample = [
        {"tokens": ["a", " fox", f" {i}"], "position": 1, "token_activations": [[1, 2.0]]}
        for i in range(4)
    ]
    return {"contexts": {f"w{number}": contexts}, "sample": sample, "negatives": [0, 1, 2, 3]}


@pytest.fixture
def contexts(tmp_path):
    """A contexts file of twelve features. The prompt of feature i holds "n{i} <"."""
    content = {
        "model": "TopK",
        "negatives": [{"tokens": ["no", " animal", f" {i}"]} for i in range(4)],
        "latent_context_map": {str(number): entry(number) for number in range(N_FEATURES)},
    }
    path = tmp_path / "S_contexts.json"
    path.write_text(json.dumps(content))
    return path


class Server:
    """An endpoint that gives `plan(feature, n)` as its nth answer about a feature.

    A plan returns (status, content). The server keeps the bodies and headers of all requests and
    counts the tokens that it billed.
    """

    def __init__(self, plan):
        self.plan = plan
        self.pause = ""  # the seconds of its Retry-After header
        self.requests_of = {}  # {feature: number of requests}
        self.billed = 0
        self.bodies = []
        self.headers = []  # (path, headers)
        self.lock = threading.Lock()
        handler = type("ServerHandler", (Handler,), {"endpoint": self})
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        threading.Thread(target=self.http.serve_forever, daemon=True).start()
        self.address = f"http://127.0.0.1:{self.http.server_port}/v1"

    def answer(self, path, headers, body):
        """(status, data) of one request."""
        prompt = body["messages"][-1]["content"]
        names = (str(number) for number in range(N_FEATURES))
        name = next((name for name in names if f"n{name} <" in prompt), "test")
        with self.lock:
            self.bodies.append(body)
            self.headers.append((path, headers))
            self.requests_of[name] = self.requests_of.get(name, 0) + 1
            status, content = self.plan(name, self.requests_of[name])
        if status == "hang":
            time.sleep(1.5)
            status = 500
        if status == 200:
            with self.lock:
                self.billed += ANSWER_TOKENS
            return status, json.dumps(completion(content))
        error = {"error": {"message": f"status {status}", "code": None}}
        return status, content or json.dumps(error)


def completion(content):
    """The JSON of an answer; content is its text or its whole message."""
    message = {"role": "assistant", "content": content} if isinstance(content, str) else content
    return {
        "id": "x",
        "object": "chat.completion",
        "created": 0,
        "model": "m",
        "usage": {
            "prompt_tokens": 100,
            "completion_tokens": 10,
            "total_tokens": ANSWER_TOKENS,
        },
        "choices": [{"index": 0, "finish_reason": "stop", "message": message}],
    }


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        headers = {name.lower(): value for name, value in self.headers.items()}
        status, data = self.endpoint.answer(self.path, headers, body)
        pause = self.endpoint.pause
        try:
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            if pause:
                self.send_header("Retry-After", pause)
            else:
                self.send_header("Retry-After-Ms", "5")
            self.send_header("Content-Length", str(len(data.encode())))
            self.end_headers()
            self.wfile.write(data.encode())
        except BrokenPipeError:  # the client gave up waiting, as the test wants
            pass

    def log_message(self, *_):
        pass


@pytest.fixture
def serve():
    servers = []

    def start(plan):
        servers.append(Server(plan))
        return servers[-1]

    yield start
    for server in servers:
        server.http.shutdown()


def always_good(name, n):
    return 200, GOOD


def interpret(*argv):
    """The exit code of interpret.py."""
    return run_stage("interpret", lambda cfg: Interpreter(cfg).run(), list(map(str, argv)))


def options(contexts, tmp_path, address, *more):
    return [
        contexts,
        "--api_base",
        address,
        "--output_dir",
        tmp_path / "out",
        "--engine",
        "m",
        *more,
    ]


def ask(contexts, tmp_path, server, *more):
    """(exit code, labels, summary) of one run."""
    code = interpret(*options(contexts, tmp_path, server.address, "--timeout", "0.5", *more))
    folder = tmp_path / "out" / "interpret"
    labels = json.loads((folder / "interp_S.json").read_text())
    summary = json.loads((folder / "interp_S.summary.json").read_text())
    return code, labels, summary


def answers_file(tmp_path):
    return tmp_path / "out" / "interpret" / "interp_S.jsonl"


def tokens_of(summary):
    return summary["prompt_tokens"] + summary["completion_tokens"]


# ------------------------------------------------------------------------------- a bad endpoint


def misbehaving(name, n):
    if name == "1" and n == 1:
        return 429, ""
    if name == "2" and n <= 2:
        return 500, ""
    if name == "3" and n == 1:
        return "hang", ""
    if name == "4":
        return 200, "no idea at all"
    if name == "5":
        return 200, {"role": "assistant", "content": None, "refusal": "I cannot"}
    if name == "6":
        return 500, "<html>not json</html>"
    return 200, GOOD


def test_every_feature_ends_in_one_record_whatever_the_server_does(contexts, tmp_path, serve):
    server = serve(misbehaving)
    code, results, summary = ask(contexts, tmp_path, server)
    assert code == 4  # one feature keeps failing
    assert len(results) == N_FEATURES
    status = {name: record["status"] for name, record in results.items()}
    not_ok = {name: value for name, value in status.items() if value != "ok"}
    assert not_ok == {"4": "unparsable", "5": "refused", "6": "failed"}
    assert results["0"]["description"] == "the word fox"
    assert results["0"]["similarity_score"] == 4
    assert results["0"]["polysemantic"] is False
    assert results["4"]["raw"] == "no idea at all"
    assert tokens_of(summary) == server.billed
    assert summary["features_scored"] == 9
    assert summary["average_score"] == 4
    assert summary["high_level_score"] is None
    lines = answers_file(tmp_path).read_text().splitlines()
    logged = sorted(json.loads(line)["latent"] for line in lines)
    assert logged == sorted(map(str, range(N_FEATURES)))

    server.plan = always_good
    before = len(server.bodies)
    code, results, _ = ask(contexts, tmp_path, server)
    assert code == 0
    assert len(server.bodies) == before + 1  # only the failed one was asked again
    assert results["6"]["status"] == "ok"


def test_a_killed_run_continues_and_a_torn_line_is_passed_over(contexts, tmp_path, serve):
    server = serve(always_good)
    ask(contexts, tmp_path, server)
    log = answers_file(tmp_path)
    log.write_bytes(log.read_bytes()[:-20])
    before = len(server.bodies)
    code, results, summary = ask(contexts, tmp_path, server)
    assert code == 0
    assert len(results) == N_FEATURES
    assert len(server.bodies) == before + 1
    # What earlier runs paid is still counted.
    assert summary["prompt_tokens"] == 1200
    assert summary["requests"] == 12


def test_wrong_keys_stop_at_once_and_are_shown_nowhere(
    contexts, tmp_path, serve, capsys, monkeypatch
):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret123")
    error = {"message": "Incorrect key sk-secret123", "code": "invalid_api_key"}
    server = serve(lambda name, n: (401, json.dumps({"error": error})))
    code, results, _ = ask(contexts, tmp_path, server, "--concurrency", "2")
    assert code == 4
    assert results == {}
    assert len(server.bodies) <= 2
    output = capsys.readouterr()
    assert "sk-secret" not in output.out + output.err
    written = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert not any("sk-secret" in path.read_text() for path in written)


@pytest.mark.parametrize(
    ("status", "error", "reason"),
    [
        (429, {"message": "no money", "code": "insufficient_quota"}, "no money"),
        (404, {"message": "no model m"}, "no model m"),
        (403, {"message": "not for you"}, "not for you"),
    ],
)
def test_what_no_retry_mends_stops_after_the_first_answers(
    contexts, tmp_path, serve, capsys, status, error, reason
):
    server = serve(lambda name, n: (status, json.dumps({"error": error})))
    code, results, _ = ask(contexts, tmp_path, server, "--concurrency", "1")
    assert code == 4
    assert results == {}
    assert len(server.bodies) <= 4  # the client tries a 429 four times
    assert reason in capsys.readouterr().err


def test_a_server_that_wants_a_long_pause_is_not_asked_on(contexts, tmp_path, serve, capsys):
    server = serve(lambda name, n: (200, GOOD) if len(server.bodies) < 4 else (429, ""))
    server.pause = "3600"
    code, results, _ = ask(contexts, tmp_path, server, "--concurrency", "1")
    assert code == 4
    assert len(results) == 3
    assert len(server.bodies) == 4
    assert "9 of 12 features are not answered" in capsys.readouterr().err


def test_an_interrupt_keeps_what_is_answered_and_the_next_run_asks_the_rest(
    contexts, tmp_path, serve
):
    # Two requests come at a time, so that len(server.bodies) could pass by 5.
    requests = itertools.count(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it

    def interrupting(name, n):
        if next(requests) == 5:
            os.kill(os.getpid(), signal.SIGINT)
        return 200, GOOD

    server = serve(interrupting)
    assert interpret(*options(contexts, tmp_path, server.address, "--concurrency", "2")) == 130
    kept = len(answers_file(tmp_path).read_text().splitlines())
    assert 4 <= kept == len(server.bodies) < N_FEATURES
    code, results, summary = ask(contexts, tmp_path, server)
    assert code == 0
    assert len(results) == len(server.bodies) == summary["requests"] == N_FEATURES


def test_a_second_interpreter_of_one_output_is_refused_and_asks_nothing(
    contexts, tmp_path, serve, capsys
):
    server = serve(always_good)
    folder = tmp_path / "out" / "interpret"
    folder.mkdir(parents=True)
    with files.locked(folder, ".interp_S.lock"):
        assert interpret(*options(contexts, tmp_path, server.address)) == 2
    assert "is being written by process" in capsys.readouterr().err
    assert not server.bodies


def test_the_reason_of_a_connection_that_fails_is_said(contexts, tmp_path, capsys):
    closed = "http://127.0.0.1:9/v1"
    assert interpret(*options(contexts, tmp_path, closed, "--sample_latents", "1")) == 4
    assert "Connection refused" in capsys.readouterr().err


def test_what_failed_attempts_cost_stays_counted(contexts, tmp_path, serve):
    # The label of feature 0 is answered, its test is not.
    server = serve(lambda name, n: (200, GOOD) if name != "test" else (500, ""))
    more = ("--score", "detection", "--sample_latents", "1", "--concurrency", "1")
    code, _, summary = ask(contexts, tmp_path, server, *more)
    assert code == 4
    assert tokens_of(summary) == server.billed == ANSWER_TOKENS
    ask(contexts, tmp_path, server, *more)
    server.plan = lambda name, n: (200, GOOD if name != "test" else "[1, 0, 1, 0, 1, 0, 1, 0]")
    code, _, summary = ask(contexts, tmp_path, server, *more)
    assert code == 0
    assert tokens_of(summary) == server.billed == 2 * ANSWER_TOKENS  # the label was kept


def test_the_azure_form_has_its_address_version_and_key(contexts, tmp_path, serve, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.setenv("AZURE_OPENAI_API_KEY", "secret")
    server = serve(always_good)
    server.address = server.address.removesuffix("/v1")
    azure = ("--api_type", "azure", "--api_version", "2024-06-01")
    code, results, _ = ask(contexts, tmp_path, server, *azure)
    assert code == 0
    assert len(results) == N_FEATURES
    for path, headers in server.headers:
        assert path == "/openai/deployments/m/chat/completions?api-version=2024-06-01"
        assert headers["api-key"] == "secret"
        assert "secret" not in headers.get("authorization", "")


def test_a_server_without_structured_output_is_asked_more_plainly(contexts, tmp_path, serve):
    prose = "**Category:** [High-level]\n**Score:** 5/5\n**Explanation:** animals"

    def plan(name, n):
        return (400, "") if "response_format" in server.bodies[-1] else (200, prose)

    server = serve(plan)
    code, results, _ = ask(contexts, tmp_path, server, "--concurrency", "1")
    assert code == 0
    assert results["0"]["category"] == "high-level"
    assert results["0"]["score"] == 5
    assert "response_format" not in server.bodies[-1]


# ------------------------------------------------------------------------------- contexts files


def first_context(table):
    return table["3"]["contexts"]["w3"][0]


def rename_some(table):
    table.update({"x": table.pop("3"), "-1": table["4"], "1.5": table["4"]})


def make_texts_numbers(table):
    for item in table["3"]["contexts"]["w3"]:
        item["context"] = 7


@pytest.mark.parametrize(
    ("damage", "kept"),
    [
        (rename_some, 11),
        (lambda table: table["3"].update(contexts={"w": []}), 11),
        (lambda table: first_context(table).update(activation="9"), 12),
        (lambda table: table["3"]["contexts"].update(w3=[{"activation": None}, 5]), 11),
        (make_texts_numbers, 11),
        (lambda table: first_context(table).update(activation=1e999), 12),
        (lambda table: table.clear(), None),
        (lambda table: table.update({"3": 5}), None),
    ],
)
def test_damaged_entries_of_a_contexts_file_are_passed_over_and_counted(
    contexts, tmp_path, capsys, damage, kept
):
    content = json.loads(contexts.read_text())
    damage(content["latent_context_map"])
    contexts.write_text(json.dumps(content))
    code = interpret(contexts, "--engine", "heuristic", "--output_dir", tmp_path / "out")
    output = capsys.readouterr()
    if kept is None:
        assert code == 3
        assert "contexts" in output.err
    else:
        assert code == 0
        assert f"{kept} features in" in output.out
        assert ("are passed over" in output.out) or kept == N_FEATURES


def test_the_rule_of_a_latent_is_chosen_once_for_its_label_and_its_tests(
    contexts, tmp_path, monkeypatch
):
    chosen = []
    choose_rule = rule_labels.choose_rule
    monkeypatch.setattr(
        rule_labels, "choose_rule", lambda entry: (chosen.append(entry), choose_rule(entry))[1]
    )
    out = ["--engine", "heuristic", "--output_dir", tmp_path / "out"]
    assert interpret(contexts, *out, "--score", "detection", "fuzzing") == 0
    assert len(chosen) == N_FEATURES
    labels = json.loads((tmp_path / "out" / "interpret" / "interp_S.json").read_text())
    assert all(label["detection"] and label["fuzzing"] for label in labels.values())


@pytest.mark.parametrize(
    "content", ["", "{", "[1]", '{"a": [', "[" * 10**5, '{"latent_context_map": []}', "\x00"]
)
def test_a_contexts_file_that_is_none_is_exit_3_and_named(tmp_path, capsys, content):
    path = tmp_path / "S_contexts.json"
    path.write_text(content)
    assert interpret(path, "--engine", "heuristic", "--output_dir", tmp_path / "out") == 3
    assert str(path) in capsys.readouterr().err


def test_both_documented_context_files_are_read(tmp_path):
    text = "a <ACTIVATED>fox</ACTIVATED>"
    nested = {"latent_context_map": {"7": {"fox": [{"activation": 2.0, "context": text}]}}}
    flat = {"latent_context_map": {"7": {"activations": [2.0], "tokens": [["a", " fox"]]}}}
    assert read_entries(nested, tmp_path)["7"]["contexts"][0]["token_class"] == "fox"
    assert read_entries(flat, tmp_path)["7"]["contexts"][0]["context"] == "a fox"
    ours = {"activations": [3.0, 2.0], "tokens": [["a", " fox"], ["the", " fox"]]}
    ours |= {"position": [1, 0], "token_class": ["fox", "the"]}
    path = tmp_path / "c.json.gz"
    files.save_json({"latent_context_map": {"7": ours}}, path)
    table = load_contexts(path)["7"]
    assert {name: context[0]["context"] for name, context in table.items()} == {
        "fox": "a <ACTIVATED>fox</ACTIVATED>",
        "the": "<ACTIVATED>the</ACTIVATED> fox",
    }
    with pytest.raises(ValueError, match="apply.py"):
        read_entries([1], tmp_path)
    assert parse("interpret", []).contexts is None


# --------------------------------------------------------------------------- budgets and tests


def test_budgets_and_dry_runs(contexts, tmp_path, serve):
    server = serve(always_good)
    budget = ("--budget_tokens", "300", "--concurrency", "1")
    code, results, _ = ask(contexts, tmp_path, server, *budget)
    assert code == 4
    assert len(results) == 3
    before = len(server.bodies)
    assert interpret(contexts, "--dry_run", "--output_dir", tmp_path / "dry") == 0
    assert len(server.bodies) == before
    prompts = json.loads((tmp_path / "dry" / "interpret" / "interp_S.prompts.json").read_text())
    assert len(prompts) == N_FEATURES


def test_explanations_are_tested_on_contexts_they_were_not_made_from(contexts, tmp_path, serve):
    def prompt_of(body):
        return body["messages"][-1]["content"]

    def right_answers(name, n):
        if name != "test":
            return 200, GOOD
        lines = prompt_of(server.bodies[-1]).splitlines()
        texts = [line for line in lines if line[:1].isdigit()]
        return 200, json.dumps([int("fox" in text) for text in texts])

    server = serve(right_answers)
    detection = ("--score", "detection", "--concurrency", "1")
    _, results, summary = ask(contexts, tmp_path, server, *detection)
    assert results["0"]["detection"] == {"balanced_accuracy": 1.0, "n": 8}
    assert summary["detection_balanced_accuracy"] == 1.0
    prompts = [prompt_of(body) for body in server.bodies]
    questions = [prompt for prompt in prompts if "described so" not in prompt]
    assert not any('"a fox' in prompt for prompt in questions)


def test_without_a_key_there_is_one_clear_line(contexts, tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    assert interpret(contexts, "--output_dir", tmp_path) == 2
    assert "OPENAI_API_KEY" in capsys.readouterr().err


# ---------------------------------------------------------------------------------- small parts


@pytest.mark.parametrize(
    "text",
    [
        GOOD,
        "```json\n" + GOOD + "\n```",
        "Category: low-level\nScore: 4\nExplanation: the word fox",
    ],
)
def test_answers_of_many_forms_are_read(text):
    assert parse_answer(text) == {
        "category": "low-level",
        "score": 4,
        "polysemantic": False,
        "explanation": "the word fox",
    }


def test_answers_without_a_score_from_1_to_5_are_not_read():
    assert parse_answer("hello") is None
    assert parse_answer("Score: 9\nExplanation: x") is None


def test_labels_are_read_from_a_list_of_the_right_length():
    assert parse_labels("so: [1, 0, true]", 3) == [True, False, True]
    assert parse_labels("[1]", 2) is None


def test_balanced_accuracy_needs_both_kinds():
    assert balanced_accuracy([True, True, False], [True, False, False]) == 0.75
    assert balanced_accuracy([True], [True]) is None


def test_the_strongest_contexts_and_some_of_the_others_are_chosen():
    many = [{"activation": 50 - i} for i in range(50)]
    chosen = choose_contexts(many)
    assert len(chosen) == 20
    assert chosen[:10] == many[:10]
    assert chosen[-1] == many[-1]


def test_a_text_cannot_forge_marks():
    forged = quote_context("x <ACTIVATED>y</ACTIVATED> z <ACTIVATED>w</ACTIVATED>")
    assert forged.count("<ACTIVATED>") == forged.count("</ACTIVATED>") == 1
