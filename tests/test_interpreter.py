"""Labels from contexts: against a local endpoint that misbehaves, and by rule."""

import itertools
import json
import os
import signal
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from src import files
from src.config import parse, run_stage
from src.interpreter import (
    Interpreter,
    balanced_accuracy,
    choose,
    entries,
    heuristic,
    parse_answer,
    parse_labels,
    safe,
)

GOOD = json.dumps(
    {"category": "low-level", "score": 4, "polysemantic": False, "explanation": "the word fox"}
)


def one(word, value, text="a <ACTIVATED>fox</ACTIVATED> ran"):
    return {"activation": value, "context": text, "token_class": word}


@pytest.fixture
def contexts(tmp_path):
    sample = [
        {"tokens": ["a", " fox", f" {i}"], "position": 1, "token_activations": [[1, 2.0]]}
        for i in range(4)
    ]
    table = {
        str(i): {
            "contexts": {
                f"w{i}": [
                    {"activation": 9.0 - j, "context": f"n{i} <ACTIVATED>x</ACTIVATED> {j}"}
                    for j in range(5)
                ]
            },
            "sample": sample,
            "negatives": [0, 1, 2, 3],
        }
        for i in range(12)
    }
    pool = [{"tokens": ["no", " animal", f" {i}"]} for i in range(4)]
    path = tmp_path / "S_contexts.json"
    path.write_text(json.dumps({"model": "TopK", "negatives": pool, "latent_context_map": table}))
    return path


class Server:
    """An endpoint whose nth answer to a feature follows `plan(feature, nth request)`; keeps the ledger of tokens it billed."""

    def __init__(self, plan):
        self.pause = ""
        self.plan, self.seen, self.billed, self.bodies, self.heads, self.lock = (
            plan,
            {},
            0,
            [],
            [],
            threading.Lock(),
        )
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                prompt = body["messages"][-1]["content"]
                name = next((f"{i}" for i in range(12) if f"n{i} <" in prompt), "test")
                with outer.lock:
                    outer.bodies.append(body)
                    outer.heads.append(
                        (self.path, {name.lower(): value for name, value in self.headers.items()})
                    )
                    outer.seen[name] = outer.seen.get(name, 0) + 1
                    status, content = outer.plan(name, outer.seen[name])
                if status == "hang":
                    time.sleep(1.5)
                    status = 500
                if status == 200:
                    answer = {
                        "id": "x",
                        "object": "chat.completion",
                        "created": 0,
                        "model": "m",
                        "usage": {
                            "prompt_tokens": 100,
                            "completion_tokens": 10,
                            "total_tokens": 110,
                        },
                    }
                    message = (
                        {"role": "assistant", "content": content}
                        if isinstance(content, str)
                        else content
                    )
                    answer["choices"] = [{"index": 0, "finish_reason": "stop", "message": message}]
                    data = json.dumps(answer).encode()
                    with outer.lock:
                        outer.billed += 110
                else:
                    data = (
                        content.encode()
                        if content
                        else json.dumps(
                            {"error": {"message": f"status {status}", "code": None}}
                        ).encode()
                    )
                try:
                    self.send_response(status)
                    self.send_header("Content-Type", "application/json")
                    self.send_header(
                        *(("Retry-After", outer.pause) if outer.pause else ("Retry-After-Ms", "5"))
                    )
                    self.send_header("Content-Length", str(len(data)))
                    self.end_headers()
                    self.wfile.write(data)
                except BrokenPipeError:  # the client gave up waiting: what the test wants
                    pass

            def log_message(self, *_):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.http.serve_forever, daemon=True).start()
        self.address = f"http://127.0.0.1:{self.http.server_port}/v1"


@pytest.fixture
def serve():
    servers = []

    def start(plan):
        servers.append(Server(plan))
        return servers[-1]

    yield start
    for server in servers:
        server.http.shutdown()


def ask(contexts, tmp_path, server, *more):
    argv = [
        str(contexts),
        "--api_base",
        server.address,
        "--output_dir",
        str(tmp_path / "out"),
        "--engine",
        "m",
        "--timeout",
        "0.5",
        *more,
    ]
    code = run_stage("interpret", lambda cfg: Interpreter(cfg).run(), argv)
    out = tmp_path / "out" / "interpret"
    return (
        code,
        json.loads((out / "interp_S.json").read_text()),
        json.loads((out / "interp_S.summary.json").read_text()),
    )


def test_every_feature_ends_in_one_record_whatever_the_server_does(contexts, tmp_path, serve):
    def plan(name, nth):
        if name == "1" and nth == 1:
            return 429, ""
        if name == "2" and nth <= 2:
            return 500, ""
        if name == "3" and nth == 1:
            return "hang", ""
        if name == "4":
            return 200, "no idea at all"
        if name == "5":
            return 200, {"role": "assistant", "content": None, "refusal": "I cannot"}
        if name == "6":
            return 500, "<html>not json</html>"
        return 200, GOOD

    server = serve(plan)
    code, results, summary = ask(contexts, tmp_path, server)
    assert code == 4 and len(results) == 12  # one feature keeps failing: incomplete, and said so
    assert {n: r["status"] for n, r in results.items() if r["status"] != "ok"} == {
        "4": "unparsable",
        "5": "refused",
        "6": "failed",
    }
    assert (
        results["0"]["description"] == "the word fox"
        and results["0"]["similarity_score"] == 4
        and results["0"]["polysemantic"] is False
    )
    assert results["4"]["raw"] == "no idea at all"
    assert summary["prompt_tokens"] + summary["completion_tokens"] == server.billed
    assert (
        summary["features_scored"] == 9
        and summary["average_score"] == 4
        and summary["high_level_score"] is None
    )
    lines = (tmp_path / "out" / "interpret" / "interp_S.jsonl").read_text().splitlines()
    assert sorted(json.loads(line)["latent"] for line in lines) == sorted(map(str, range(12)))

    server.plan = lambda name, nth: (200, GOOD)
    before = len(server.bodies)
    code, results, _ = ask(contexts, tmp_path, server)
    assert code == 0 and len(server.bodies) == before + 1  # only the failed one was asked again
    assert results["6"]["status"] == "ok"


def test_a_killed_run_continues_and_a_torn_line_is_passed_over(contexts, tmp_path, serve):
    server = serve(lambda name, nth: (200, GOOD))
    ask(contexts, tmp_path, server)
    log = tmp_path / "out" / "interpret" / "interp_S.jsonl"
    log.write_bytes(log.read_bytes()[:-20])
    before = len(server.bodies)
    code, results, summary = ask(contexts, tmp_path, server)
    assert code == 0 and len(results) == 12 and len(server.bodies) == before + 1
    assert (
        summary["prompt_tokens"] == 1200 and summary["requests"] == 12
    )  # what earlier runs paid is still counted


def test_wrong_keys_stop_at_once_and_are_shown_nowhere(
    contexts, tmp_path, serve, capsys, monkeypatch
):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret123")
    server = serve(
        lambda name, nth: (
            401,
            json.dumps(
                {"error": {"message": "Incorrect key sk-secret123", "code": "invalid_api_key"}}
            ),
        )
    )
    code, results, _ = ask(contexts, tmp_path, server, "--concurrency", "2")
    assert code == 4 and results == {} and len(server.bodies) <= 2
    said = capsys.readouterr()
    assert "sk-secret" not in said.out + said.err
    assert not any(
        "sk-secret" in f.read_text() for f in (tmp_path / "out").rglob("*") if f.is_file()
    )


@pytest.mark.parametrize(
    "status, body, said",
    [
        (429, {"message": "no money", "code": "insufficient_quota"}, "no money"),
        (404, {"message": "no model m"}, "no model m"),
        (403, {"message": "not for you"}, "not for you"),
    ],
)
def test_what_no_retry_mends_stops_after_the_first_answers(
    contexts, tmp_path, serve, capsys, status, body, said
):
    server = serve(lambda name, nth: (status, json.dumps({"error": body})))
    code, results, _ = ask(contexts, tmp_path, server, "--concurrency", "1")
    assert (
        code == 4 and results == {} and len(server.bodies) <= 4 and said in capsys.readouterr().err
    )  # the client tries a 429 four times


def test_a_server_that_wants_a_long_pause_is_not_asked_on(contexts, tmp_path, serve, capsys):
    server = serve(lambda name, nth: (200, GOOD) if len(server.bodies) < 4 else (429, ""))
    server.pause = "3600"
    code, results, _ = ask(contexts, tmp_path, server, "--concurrency", "1")
    assert (
        code == 4
        and len(results) == 3
        and len(server.bodies) == 4
        and "9 of 12 features are not answered" in capsys.readouterr().err
    )


def test_an_interrupt_keeps_what_is_answered_and_the_next_run_asks_the_rest(
    contexts, tmp_path, serve
):
    asked = itertools.count(1)  # two requests come at one time: a length could pass by 5
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it

    def answer(name, nth):
        if next(asked) == 5:
            os.kill(os.getpid(), signal.SIGINT)
        return 200, GOOD

    server = serve(answer)
    argv = [
        str(contexts),
        "--api_base",
        server.address,
        "--output_dir",
        str(tmp_path / "out"),
        "--engine",
        "m",
        "--concurrency",
        "2",
    ]
    assert run_stage("interpret", lambda cfg: Interpreter(cfg).run(), argv) == 130
    kept = len((tmp_path / "out" / "interpret" / "interp_S.jsonl").read_text().splitlines())
    assert 4 <= kept == len(server.bodies) < 12
    code, results, summary = ask(contexts, tmp_path, server)
    assert code == 0 and len(results) == 12 == len(server.bodies) and summary["requests"] == 12


def test_a_second_interpreter_of_one_output_is_refused_and_asks_nothing(
    contexts, tmp_path, serve, capsys
):
    server = serve(lambda name, nth: (200, GOOD))
    (tmp_path / "out" / "interpret").mkdir(parents=True)
    argv = [
        str(contexts),
        "--api_base",
        server.address,
        "--output_dir",
        str(tmp_path / "out"),
        "--engine",
        "m",
    ]
    with files.locked(tmp_path / "out" / "interpret", ".interp_S.lock"):
        assert run_stage("interpret", lambda cfg: Interpreter(cfg).run(), argv) == 2
    assert "is being written by process" in capsys.readouterr().err and not server.bodies


def test_the_reason_of_a_connection_that_fails_is_said(contexts, tmp_path, capsys):
    argv = [
        str(contexts),
        "--api_base",
        "http://127.0.0.1:9/v1",
        "--output_dir",
        str(tmp_path / "out"),
        "--engine",
        "m",
        "--sample_latents",
        "1",
    ]
    assert run_stage("interpret", lambda cfg: Interpreter(cfg).run(), argv) == 4
    assert "Connection refused" in capsys.readouterr().err


@pytest.mark.parametrize(
    "change, kept",
    [
        (lambda t: t.update(x=t.pop("3"), **{"-1": t["4"], "1.5": t["4"]}), 11),
        (lambda t: t["3"].update(contexts={"w": []}), 11),
        (lambda t: t["3"]["contexts"]["w3"][0].update(activation="9"), 12),
        (lambda t: t["3"]["contexts"].update(w3=[{"activation": None}, 5]), 11),
        (lambda t: [one.update(context=7) for one in t["3"]["contexts"]["w3"]], 11),
        (lambda t: t["3"]["contexts"]["w3"][0].update(activation=1e999), 12),
        (lambda t: t.clear(), None),
        (lambda t: t.update({"3": 5}), None),
    ],
)
def test_damaged_entries_of_a_contexts_file_are_passed_over_and_counted(
    contexts, tmp_path, capsys, change, kept
):
    content = json.loads(contexts.read_text())
    change(content["latent_context_map"])
    contexts.write_text(json.dumps(content))
    argv = [str(contexts), "--engine", "heuristic", "--output_dir", str(tmp_path / "out")]
    assert run_stage("interpret", lambda cfg: Interpreter(cfg).run(), argv) == (0 if kept else 3)
    said = capsys.readouterr()
    assert f"{kept} features in" in said.out if kept else "contexts" in said.err
    assert kept in (12, None) or "are passed over" in said.out


@pytest.mark.parametrize(
    "content", ["", "{", "[1]", '{"a": [', "[" * 10**5, '{"latent_context_map": []}', "\x00"]
)
def test_a_contexts_file_that_is_none_is_exit_3_and_named(tmp_path, capsys, content):
    path = tmp_path / "S_contexts.json"
    path.write_text(content)
    argv = [str(path), "--engine", "heuristic", "--output_dir", str(tmp_path / "out")]
    assert (
        run_stage("interpret", lambda cfg: Interpreter(cfg).run(), argv) == 3
        and str(path) in capsys.readouterr().err
    )


def test_what_failed_attempts_cost_stays_counted(contexts, tmp_path, serve):
    def broken(name, nth):  # the label of feature 0 is answered, the test of it is not
        return (200, GOOD) if name != "test" else (500, "")

    server = serve(broken)
    more = ("--score", "detection", "--sample_latents", "1", "--concurrency", "1")
    code, _, summary = ask(contexts, tmp_path, server, *more)
    assert (
        code == 4
        and summary["prompt_tokens"] + summary["completion_tokens"] == server.billed == 110
    )
    ask(contexts, tmp_path, server, *more)
    server.plan = lambda name, nth: (200, GOOD if name != "test" else "[1, 0, 1, 0, 1, 0, 1, 0]")
    code, _, summary = ask(contexts, tmp_path, server, *more)
    assert (
        code == 0
        and summary["prompt_tokens"] + summary["completion_tokens"] == server.billed == 440
    )


def test_the_azure_form_has_its_address_version_and_key(contexts, tmp_path, serve, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.setenv("AZURE_OPENAI_API_KEY", "secret")
    server = serve(lambda name, nth: (200, GOOD))
    server.address = server.address.removesuffix("/v1")
    code, results, _ = ask(
        contexts, tmp_path, server, "--api_type", "azure", "--api_version", "2024-06-01"
    )
    assert code == 0 and len(results) == 12
    for path, headers in server.heads:
        assert path == "/openai/deployments/m/chat/completions?api-version=2024-06-01"
        assert headers["api-key"] == "secret" and "secret" not in headers.get("authorization", "")


def test_a_server_without_structured_output_is_asked_more_plainly(contexts, tmp_path, serve):
    server = serve(
        lambda name, nth: (
            200,
            "**Category:** [High-level]\n**Score:** 5/5\n**Explanation:** animals",
        )
    )
    original = server.plan

    def plan(name, nth):
        return (400, "") if "response_format" in server.bodies[-1] else original(name, nth)

    server.plan = plan
    code, results, _ = ask(contexts, tmp_path, server, "--concurrency", "1")
    assert code == 0 and results["0"]["category"] == "high-level" and results["0"]["score"] == 5
    assert "response_format" not in server.bodies[-1]


def test_budgets_and_dry_runs(contexts, tmp_path, serve):
    server = serve(lambda name, nth: (200, GOOD))
    code, results, _ = ask(
        contexts, tmp_path, server, "--budget_tokens", "300", "--concurrency", "1"
    )
    assert code == 4 and len(results) == 3
    before = len(server.bodies)
    argv = [str(contexts), "--dry_run", "--output_dir", str(tmp_path / "dry")]
    assert run_stage("interpret", lambda cfg: Interpreter(cfg).run(), argv) == 0
    assert (
        len(server.bodies) == before
        and len(json.loads((tmp_path / "dry/interpret/interp_S.prompts.json").read_text())) == 12
    )


def test_explanations_are_tested_on_contexts_they_were_not_made_from(contexts, tmp_path, serve):
    def plan(name, nth):
        if name != "test":
            return 200, GOOD
        texts = [
            line
            for line in server.bodies[-1]["messages"][-1]["content"].splitlines()
            if line[:1].isdigit()
        ]
        return 200, json.dumps([int("fox" in line) for line in texts])

    server = serve(plan)
    _, results, summary = ask(
        contexts, tmp_path, server, "--score", "detection", "--concurrency", "1"
    )
    assert (
        results["0"]["detection"] == {"balanced_accuracy": 1.0, "n": 8}
        and summary["detection_balanced_accuracy"] == 1.0
    )
    prompts = [body["messages"][-1]["content"] for body in server.bodies]
    assert not any('"a fox' in p for p in prompts if "described so" not in p)


def test_without_a_key_there_is_one_clear_line(contexts, tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    assert (
        run_stage(
            "interpret",
            lambda cfg: Interpreter(cfg).run(),
            [str(contexts), "--output_dir", str(tmp_path)],
        )
        == 2
    )
    assert "OPENAI_API_KEY" in capsys.readouterr().err


def test_rules_name_tokens_prefixes_and_nothing():
    assert "'fox'" in heuristic({"contexts": [one("fox", 3), one("fox", 2)]})["explanation"]
    assert (
        "begin with 'walk'"
        in heuristic({"contexts": [one(w, 1) for w in ("walks", "walked", "walking")]})[
            "explanation"
        ]
    )
    far = [
        one(w, 1, f"{w}z <ACTIVATED>{w}</ACTIVATED>")
        for w in ("sky", "hen", "map", "oil", "urn", "pit")
    ]
    assert heuristic({"contexts": far})["category"] == "undiscernible"


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


def test_small_parts():
    assert parse_answer("hello") is None and parse_answer("Score: 9\nExplanation: x") is None
    assert (
        parse_labels("so: [1, 0, true]", 3) == [True, False, True]
        and parse_labels("[1]", 2) is None
    )
    assert (
        balanced_accuracy([True, True, False], [True, False, False]) == 0.75
        and balanced_accuracy([True], [True]) is None
    )
    many = [{"activation": 50 - i} for i in range(50)]
    kept = choose(many)
    assert len(kept) == 20 and kept[:10] == many[:10] and kept[-1] == many[-1]
    forged = safe("x <ACTIVATED>y</ACTIVATED> z <ACTIVATED>w</ACTIVATED>")
    assert forged.count("<ACTIVATED>") == 1 and forged.count("</ACTIVATED>") == 1


def test_both_documented_context_files_are_read(tmp_path):
    nested = {
        "latent_context_map": {
            "7": {"fox": [{"activation": 2.0, "context": "a <ACTIVATED>fox</ACTIVATED>"}]}
        }
    }
    flat = {"latent_context_map": {"7": {"activations": [2.0], "tokens": [["a", " fox"]]}}}
    assert entries(nested, tmp_path)["7"]["contexts"][0]["token_class"] == "fox"
    assert entries(flat, tmp_path)["7"]["contexts"][0]["context"] == "a fox"
    with pytest.raises(ValueError, match="apply.py"):
        entries([1], tmp_path)
    assert parse("interpret", []).contexts is None
