"""Endpoints that are odd, slow, endless or expensive: what is asked, kept, bounded and shown."""

import email.utils
import gzip
import json
import os
import signal
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from src import endpoint, files
from src.interpreter import parse_answer, parse_labels
from tests.test_interpreter import GOOD, completion, entry, interpret

CANARY = "canary0123456789abcdef"
LABELS = "[1, 0, 1, 0, 1, 0, 1, 0]"


def reply(content, finish="stop"):
    """Status and body of an answer."""
    body = completion({"role": "assistant", "content": content})
    body["choices"][0]["finish_reason"] = finish
    return 200, body


def refuse(status, message, **more):
    return status, {"error": {"message": message, **more}}


class Raw:
    """An endpoint whose `answer(body, n)` gives (status, JSON) of its nth request.

    `raw(handler)` writes the bytes itself. `bodies` keeps the requests.
    """

    def __init__(self):
        self.answer = lambda body, n: reply(GOOD)
        self.raw = None
        self.headers = {}
        self.bodies = []
        self.lock = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with outer.lock:
                    outer.bodies.append(body)
                    n = len(outer.bodies)
                try:
                    if outer.raw:
                        outer.raw(self)
                    else:
                        self.write(*outer.answer(body, n))
                except OSError:  # the client gave up, as some tests want
                    self.close_connection = True

            def write(self, status, body):
                content = body if isinstance(body, bytes) else json.dumps(body).encode()
                self.send_response(status)
                for name, value in ({"Retry-After-Ms": "5"} | outer.headers).items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *_):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        threading.Thread(target=self.http.serve_forever, args=(0.02,), daemon=True).start()
        self.address = f"http://127.0.0.1:{self.http.server_port}/v1"


@pytest.fixture
def server():
    raw = Raw()
    yield raw
    raw.http.shutdown()


@pytest.fixture(autouse=True)
def usual_key_and_short_pauses(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-test-123456")
    monkeypatch.setattr(endpoint, "LAST_PAUSE", 0.05)


def write_contexts(tmp_path, n=3, **changes):
    table = {str(number): entry(number) | changes for number in range(n)}
    negatives = [{"tokens": ["no", " animal", f" {i}"]} for i in range(4)]
    path = tmp_path / "S_contexts.json"
    path.write_text(json.dumps({"negatives": negatives, "latent_context_map": table}))
    return path


def labels_of(tmp_path):
    return json.loads((tmp_path / "out" / "interpret" / "interp_S.json").read_text())


def log_of(tmp_path):
    return tmp_path / "out" / "interpret" / "interp_S.jsonl"


def command(tmp_path, server, *more):
    path = tmp_path / "S_contexts.json"
    if not path.exists():
        write_contexts(tmp_path)
    fixed = ["--output_dir", tmp_path / "out", "--api_base", server.address, "--engine", "m"]
    return [path, *fixed, "--concurrency", "1", *more]


def ask(tmp_path, server, *more):
    """(exit code, labels) of one run."""
    code = interpret(*command(tmp_path, server, *more))
    return code, labels_of(tmp_path)


def statuses(labels):
    return {label["status"] for label in labels.values()}


@pytest.mark.parametrize("is_default", [True, False])
def test_names_at_openai_are_sent_to_openai_alone(tmp_path, server, monkeypatch, is_default):
    named = {"OpenAI-Organization": "org-canary", "OpenAI-Project": "proj-canary"}
    monkeypatch.setenv("OPENAI_ORG_ID", named["OpenAI-Organization"])
    monkeypatch.setenv("OPENAI_PROJECT_ID", named["OpenAI-Project"])
    if is_default:
        monkeypatch.setattr(endpoint, "OPENAI_HOST", "127.0.0.1")
    received = []

    def keep_headers(handler):
        received.append({name: handler.headers[name] for name in named})
        handler.write(*reply(GOOD))

    server.raw = keep_headers
    code, _ = ask(tmp_path, server, "--sample_latents", "1")
    assert code == 0 and received == [named if is_default else dict.fromkeys(named)]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("--api_base", "http://[::1/v1"),
        ("OPENAI_BASE_URL", "::::"),
        ("ALL_PROXY", "nothing://127.0.0.1:9"),
        ("SSL_CERT_FILE", "/nonexistent"),
    ],
)
def test_an_endpoint_that_cannot_be_asked_is_one_line(tmp_path, monkeypatch, capsys, name, value):
    address = "https://127.0.0.1:9/v1"
    if name.startswith("--"):
        address = value
    else:
        monkeypatch.setenv(name, value)
    path = write_contexts(tmp_path)
    more = [] if name == "OPENAI_BASE_URL" else ["--api_base", address]
    code = interpret(path, "--output_dir", tmp_path / "out", "--engine", "m", *more)
    error = capsys.readouterr().err
    assert code == 2 and error.count("\n") == 1 and "no request can be made" in error


# ------------------------------------------------------------------------------- what is read


@pytest.mark.parametrize(
    "text",
    [
        f'<think>draft: {{"score": 1, "explanation": "draft"}} but no</think>\n{GOOD}',
        f'A first idea: {{"score": 1, "explanation": "draft"}}. Better: {GOOD}',
        f'[THINK]{{"score": 1, "explanation": "draft"}}[/THINK]{GOOD}',
        GOOD[:-1] + ",\n}",
        GOOD.replace('"', "'"),
        GOOD.replace('"', "'").replace("false", "False"),
        GOOD.replace('"category"', '"Category"'),
    ],
)
def test_the_last_valid_object_after_the_thoughts_is_the_answer(text):
    result = parse_answer(text)
    assert (result["score"], result["explanation"]) == (4, "the word fox")
    assert result["polysemantic"] is False


def test_line_breaks_in_strings_and_lists_after_thoughts_are_read():
    assert parse_answer(GOOD.replace("word fox", "word\nfox"))["explanation"] == "the word\nfox"
    assert parse_labels("<think>[0, 0, 0]</think> [1, 0, 1], I hope", 3) == [True, False, True]
    assert parse_labels("[1, 0, 1] or rather [1, 1, 1]", 3) == [True, True, True]
    assert parse_labels("[1, 0, 1] for the texts [12]", 3) == [True, False, True]
    assert parse_answer("<think>the score: 4, explanation: it") is None


@pytest.mark.parametrize("character", "\u2028\u2029\u0085\x1c\x0c")
def test_answers_with_unusual_line_ends_are_not_asked_for_again(tmp_path, server, character):
    answer = GOOD.replace("word fox", f"word{character}fox")
    server.answer = lambda body, n: reply(answer)
    assert ask(tmp_path, server)[0] == 0
    assert ask(tmp_path, server)[0] == 0
    assert len(server.bodies) == 3


def test_a_label_whose_test_failed_is_kept_and_not_paid_again(tmp_path, server):
    def tests_fail(body, n):
        is_test = "described so" in body["messages"][-1]["content"]
        return refuse(500, "down") if is_test else reply(GOOD)

    server.answer = tests_fail
    code, labels = ask(tmp_path, server, "--score", "detection")
    assert code == 4
    assert statuses(labels) == {"ok"}
    before = len(server.bodies)
    server.answer = lambda body, n: reply(LABELS)
    code, labels = ask(tmp_path, server, "--score", "detection")
    assert code == 0
    assert len(server.bodies) == before + 3  # the tests alone
    assert all(label["detection"]["n"] == 8 for label in labels.values())
    # Another test does not cost the labels a second time either.
    code, labels = ask(tmp_path, server, "--score", "detection", "fuzzing")
    assert code == 0
    assert len(server.bodies) == before + 3 + sum("fuzzing" in label for label in labels.values())


UNUSABLE = {
    "an error": (200, {"error": {"message": "Provider returned error", "code": 429}}),
    "no choices": (200, {"choices": []}),
    "no content": reply(None),
    "thoughts alone": reply(None, "length"),
    "cut": reply(GOOD[:60], "length"),
    "cut in silence": reply(GOOD[:-20]),
    "blank": reply("  "),
}


@pytest.mark.parametrize("kind", UNUSABLE)
def test_an_answer_that_is_none_is_a_failure_and_asked_again(tmp_path, server, kind):
    server.answer = lambda body, n: UNUSABLE[kind]
    code, labels = ask(tmp_path, server)
    assert code == 4
    assert statuses(labels) == {"failed"}
    server.answer = lambda body, n: reply(GOOD)
    code, labels = ask(tmp_path, server)
    assert code == 0
    assert statuses(labels) == {"ok"}


def test_content_in_parts_is_read(tmp_path, server):
    server.answer = lambda body, n: reply([{"type": "text", "text": GOOD}])
    assert statuses(ask(tmp_path, server)[1]) == {"ok"}


def test_an_answer_cut_at_its_limit_is_asked_for_with_more_tokens(tmp_path, server):
    def thinking(body, n):
        return reply(GOOD) if body["max_completion_tokens"] > 2500 else reply(None, "length")

    server.answer = thinking
    code, labels = ask(tmp_path, server)
    assert code == 0
    assert statuses(labels) == {"ok"}
    assert len(server.bodies) == 4  # the first question is asked twice, the others with room
    usage = [label["usage"]["requests"] for label in labels.values()]
    assert usage == [2, 1, 1]


@pytest.mark.parametrize("unit", ["The text is about war. ", '{"score": 4, "explanation": "on '])
def test_an_answer_that_repeats_itself_is_not_paid_again(tmp_path, server, unit):
    server.answer = lambda body, n: reply(unit * 200, "length")
    for _ in range(2):
        code, labels = ask(tmp_path, server)
        assert code == 0 and statuses(labels) == {"unparsable"}
        assert len(server.bodies) == 3  # once for each feature
    assert all(unit in label["raw"] for label in labels.values())


def no_system(body):
    roles = [message["role"] for message in body["messages"]]
    return refuse(400, "System role not supported") if "system" in roles else None


def no_seed(body):
    error = {"code": 400, "message": 'Unknown name "seed": Cannot find field.'}
    return (400, [{"error": error}]) if "seed" in body else None


def no_unknown(body):
    fields = sorted({"max_completion_tokens", "seed"} & set(body))
    detail = [{"type": "extra_forbidden", "loc": ["body", field]} for field in fields]
    return (422, {"detail": detail}) if fields else None


def nothing_optional(body):
    """A server that does not say what it dislikes."""
    plain = {"model", "messages", "max_tokens"}
    roles = [message["role"] for message in body["messages"]]
    return (400, b"bad request") if set(body) - plain or "system" in roles else None


@pytest.mark.parametrize("habit", [no_system, no_seed, no_unknown, nothing_optional])
def test_a_server_that_refuses_parts_of_a_request_is_asked_more_plainly(
    tmp_path, server, capsys, habit
):
    server.answer = lambda body, n: habit(body) or reply(GOOD)
    code, labels = ask(tmp_path, server)
    assert code == 0
    assert statuses(labels) == {"ok"}
    assert len(server.bodies) <= 9
    assert "the endpoint is asked without" in capsys.readouterr().out
    plain = server.bodies[-1]
    # What was not refused is still sent.
    assert ("response_format" in plain) is (habit is not nothing_optional)
    assert "You study which texts" in plain["messages"][0]["content"]


@pytest.mark.parametrize(
    "pause",
    ["3600", "3600.0", email.utils.formatdate(time.time() + 3600, usegmt=True), "9" * 400],
)
def test_a_long_pause_in_any_form_stops_the_run(tmp_path, server, pause):
    server.headers = {"Retry-After-Ms": "", "Retry-After": pause}
    server.answer = lambda body, n: refuse(429, "slow down")
    assert interpret(*command(tmp_path, server)) == 4
    assert len(server.bodies) == 1


def test_an_account_without_money_stops_the_run(tmp_path, server, capsys):
    server.answer = lambda body, n: refuse(402, "Insufficient Balance")
    assert interpret(*command(tmp_path, server)) == 4
    assert len(server.bodies) == 1
    assert "Insufficient Balance" in capsys.readouterr().err


def test_what_a_content_filter_stops_is_refused_once(tmp_path, server):
    server.answer = lambda body, n: refuse(400, "filtered", code="content_filter")
    code, labels = ask(tmp_path, server)
    assert code == 0
    assert statuses(labels) == {"refused"}
    ask(tmp_path, server)
    assert len(server.bodies) == 3


# ------------------------------------------------------------------------------- bounds


def drip_body(handler):
    handler.send_response(200)
    handler.send_header("Content-Length", "100000")
    handler.end_headers()
    drip(handler, b" ")


def drip_headers(handler):
    handler.wfile.write(b"HTTP/1.1 200 OK\r\n")
    drip(handler, b"X-Header: y\r\n")


def drip(handler, data):
    for _ in range(300):
        handler.wfile.write(data)
        handler.wfile.flush()
        time.sleep(0.1)


@pytest.mark.parametrize("raw", [drip_body, drip_headers])
def test_a_server_that_sends_byte_by_byte_does_not_outlast_the_timeout(tmp_path, server, raw):
    server.raw = raw
    write_contexts(tmp_path, 1)
    start = time.monotonic()
    code, labels = ask(tmp_path, server, "--timeout", "0.5")
    assert code == 4
    assert "--timeout" in labels["0"]["error"]
    assert time.monotonic() - start < 60  # four attempts would take two minutes


@pytest.mark.parametrize("status", [200, 400])
def test_an_endless_answer_ends_at_a_cap(tmp_path, server, status):
    sent = []

    def flood(handler):
        handler.send_response(status)
        handler.send_header("Transfer-Encoding", "chunked")
        handler.end_headers()
        for _ in range(200):
            handler.wfile.write(b"100000\r\n" + b" " * 2**20 + b"\r\n")
            sent.append(1)

    server.raw = flood
    write_contexts(tmp_path, 1)
    code, labels = ask(tmp_path, server)
    assert code == 4
    assert "more than 8,388,608 bytes" in labels["0"]["error"]
    assert len(sent) < 100


def test_a_compressed_answer_is_not_unpacked(tmp_path, server):
    server.headers = {"Content-Encoding": "gzip"}
    server.answer = lambda body, n: (200, gzip.compress(b" " * 10**7))
    write_contexts(tmp_path, 1)
    code, labels = ask(tmp_path, server)
    assert code == 4
    assert "compressed" in labels["0"]["error"]


def test_prompts_of_tests_are_bounded(tmp_path, server):
    window = {"tokens": ["a", " fox", "y" * 10**6], "position": 1, "token_activations": [[1, 2.0]]}
    write_contexts(tmp_path, 1, sample=[window] * 4)
    server.answer = lambda body, n: reply(GOOD if n == 1 else LABELS)
    assert ask(tmp_path, server, "--score", "detection", "fuzzing")[0] == 0
    assert max(len(json.dumps(body)) for body in server.bodies) < 60_000


def test_rules_are_quick_on_a_long_token(tmp_path):
    text = "x" * 40_000 + " <ACTIVATED>y</ACTIVATED>"
    table = {
        "1": {
            "contexts": {
                word: [{"activation": 1.0, "context": text}] for word in ("a" * 10**5, "b", "c9")
            }
        }
    }
    path = tmp_path / "S_contexts.json"
    path.write_text(json.dumps({"latent_context_map": table}))
    start = time.process_time()
    assert interpret(path, "--engine", "heuristic", "--output_dir", tmp_path / "out") == 0
    assert time.process_time() - start < 5
    assert len(labels_of(tmp_path)["1"]["explanation"]) <= 1000


def test_a_packed_contexts_file_that_unpacks_without_end_is_refused(tmp_path, capsys):
    path = tmp_path / "S_contexts.json.gz"
    path.write_bytes(gzip.compress(b" " * 10**8))
    assert interpret(path, "--engine", "heuristic", "--output_dir", tmp_path / "out") == 3
    assert "unpacks to more than" in capsys.readouterr().err


def test_counts_beyond_reason_are_not_counted(tmp_path, server):
    for count in (10**400, True, 1.5e300, -1):
        body = reply(GOOD)[1]
        body["usage"]["prompt_tokens"] = count
        assert endpoint._usage_of(json.loads(json.dumps(body)))["prompt_tokens"] == 0


# ------------------------------------------------------------------------------- secrets


KEYS = [
    f"{CANARY}\n",
    f"{CANARY}\r\n",
    f"  {CANARY}  ",
    f"{CANARY}\nsecondline",
    f"{CANARY}\u2019rest",
    f"{CANARY}\x7f",
    f"{CANARY} rest",
]


def words_written(tmp_path, capsys):
    output = capsys.readouterr()
    texts = [path.read_text() for path in (tmp_path / "out").rglob("*") if path.is_file()]
    return "\n".join([output.out, output.err, *texts])


@pytest.mark.parametrize("source", ["environment", "file"])
@pytest.mark.parametrize("key", KEYS)
def test_a_key_is_one_clean_word_or_refused(tmp_path, server, capsys, monkeypatch, key, source):
    more = []
    if source == "environment":
        monkeypatch.setenv("OPENAI_API_KEY", key)
    else:
        monkeypatch.delenv("OPENAI_API_KEY")
        (tmp_path / "key").write_text(key)
        more = ["--api_key_file", tmp_path / "key"]
    code = interpret(*command(tmp_path, server, *more))
    assert CANARY not in words_written(tmp_path, capsys)
    if key.strip() == CANARY:
        assert code == 0
    else:
        assert code == 2
        assert not server.bodies


def test_every_spelling_of_a_secret_is_taken_out(monkeypatch):
    secret = "tück'e\"sehr\\geheim"
    monkeypatch.setenv("HF_TOKEN", f"{secret}\nzweitezeile\n")
    shown = [repr(secret), ascii(secret), json.dumps(secret), secret, "zweitezeile"]
    text = files.redacted(" ".join(shown) + f" {secret}\nzweitezeile\n")
    for part in ("geheim", "zweitezeile", "sehr"):
        assert part not in text


def test_a_password_in_the_address_is_not_shown(tmp_path, server, capsys):
    server.address = server.address.replace("//", f"//user:{CANARY}@")
    server.answer = lambda body, n: refuse(404, f"no such page at {server.address}")
    interpret(*command(tmp_path, server))
    assert CANARY not in words_written(tmp_path, capsys)


# ------------------------------------------------------------------------------- nothing is lost


def start_process(tmp_path, server, *more, **streams):
    argv = [sys.executable, "interpret.py", *command(tmp_path, server, *more)]
    return subprocess.Popen(list(map(str, argv)), cwd=files.ROOT, **streams)


def wait_for_requests(server, n):
    deadline = time.monotonic() + 120
    while len(server.bodies) < n:
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGUSR2])
def test_a_signal_keeps_the_answers_under_way(tmp_path, server, number):
    def slow(body, n):
        time.sleep(1)
        return reply(GOOD)

    server.answer = slow
    write_contexts(tmp_path, 80)  # 20 s; the run ends at the signal
    process = start_process(
        tmp_path, server, "--concurrency", "4", stderr=subprocess.PIPE, text=True
    )
    wait_for_requests(server, 4)
    process.send_signal(number)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 143
    assert "run the same command to continue" in errors
    kept = log_of(tmp_path).read_text().count('"status": "ok"')
    assert kept == len(server.bodies) < 80


def test_a_reader_that_is_gone_does_not_hang_the_run_or_lose_answers(tmp_path, server):
    def slow(body, n):
        time.sleep(0.1)
        return reply(GOOD)

    server.answer = slow
    write_contexts(tmp_path, 30)
    reading, writing = os.pipe()
    process = start_process(tmp_path, server, "--concurrency", "4", stdout=writing, stderr=writing)
    os.close(writing)
    wait_for_requests(server, 5)
    os.close(reading)
    process.wait(timeout=120)
    assert len(labels_of(tmp_path)) == 30
    assert process.returncode == 0


def test_labels_are_not_replaced_by_less(tmp_path, server, capsys):
    write_contexts(tmp_path, 8)
    code, labels = ask(tmp_path, server)
    assert code == 0
    assert len(labels) == 8
    # A smaller sample, a dead endpoint under another name, rules: all labels stay.
    dead = ["--api_base", "http://127.0.0.1:9/v1", "--engine", "other"]
    rules = ["--engine", "heuristic"]
    for more in (["--sample_latents", "2"], [*dead, "--sample_latents", "2"], rules):
        interpret(*command(tmp_path, server, *more))
        assert labels_of(tmp_path) == labels
    summary = json.loads((tmp_path / "out/interpret/interp_S.summary.json").read_text())
    assert summary["features_scored"] == 8
    assert "kept from earlier runs" in capsys.readouterr().out
    # A label of another model that was paid for is worth as much.
    interpret(*command(tmp_path, server, "--engine", "other", "--sample_latents", "2"))
    engines = [label["engine"] for label in labels_of(tmp_path).values()]
    assert sorted(engines) == ["m"] * 6 + ["other"] * 2
    summary = json.loads((tmp_path / "out/interpret/interp_S.summary.json").read_text())
    assert summary["engines"] == {"m": 6, "other": 2}
    assert summary["cost"] is None


def test_labels_belong_to_the_contexts_they_were_made_from(tmp_path, server, capsys):
    write_contexts(tmp_path, 3)
    _, labels = ask(tmp_path, server)
    write_contexts(tmp_path, 2)  # as after another training under the same name
    code, new = ask(tmp_path, server)
    assert code == 0
    assert set(new) == {"0", "1"}
    assert len(server.bodies) == 5
    assert "labels of other contexts are kept in" in capsys.readouterr().out
    (kept,) = (tmp_path / "out" / "interpret").glob("interp_S.????????????????.json")
    assert json.loads(kept.read_text()) == labels


def test_contexts_replaced_during_the_start_do_not_get_the_labels_of_the_old(
    tmp_path, server, monkeypatch
):
    from src import interpreter

    path = write_contexts(tmp_path, 2)
    other = write_contexts(tmp_path, 3).read_bytes()
    write_contexts(tmp_path, 2)
    read = interpreter.read_entries

    def replace_then_read(data, name):
        path.write_bytes(other)
        return read(data, name)

    with monkeypatch.context() as patch:
        patch.setattr(interpreter, "read_entries", replace_then_read)
        ask(tmp_path, server)
    ask(tmp_path, server)
    assert len(server.bodies) == 5  # the new contexts were asked about anew


def test_half_written_contexts_are_passed_over_and_removed(tmp_path, server, capsys):
    folder = tmp_path / "out" / "contexts"
    folder.mkdir(parents=True)
    whole = write_contexts(tmp_path, 2).replace(folder / "S_contexts.json")
    torn = folder / ".S_contexts.json.abc.tmp"
    torn.write_bytes(whole.read_bytes()[:50])
    os.utime(torn, (time.time() + 100, time.time() + 100))
    argv = ["--output_dir", tmp_path / "out", "--engine", "heuristic"]
    assert interpret(*argv) == 0
    assert len(labels_of(tmp_path)) == 2
    assert not torn.exists()


def test_the_temporary_file_of_a_living_writer_stays(tmp_path):
    leftover = tmp_path / ".x.json.abc.tmp"
    leftover.write_text("half")
    seen = []

    def write(file):
        (temporary,) = tmp_path.glob(".x.json.*.tmp")
        files.remove_leftovers(tmp_path)
        seen.append(temporary.exists())
        file.write(b"whole")

    files.write_atomic(tmp_path / "x.json", write)
    assert seen == [True]
    assert not leftover.exists()
    assert [path.name for path in tmp_path.iterdir()] == ["x.json"]


# ------------------------------------------------------------------------------- odd files


WINDOW = {"tokens": ["a", "b"], "position": 1, "token_activations": [[1, 2.0]]}
ODD = {
    "tokens are a number": {"sample": [WINDOW | {"tokens": 5}] * 4},
    "no tokens": {"sample": [{"x": 1}] * 4},
    "negatives are words": {"sample": [WINDOW] * 4, "negatives": ["x", -1, 10**30, True]},
    "no sample": {"sample": None, "negatives": None},
    "position is outside": {"sample": [WINDOW | {"position": 7}] * 4},
    "pairs are empty": {"sample": [WINDOW | {"token_activations": [[]]}] * 4},
    "a huge activation": {"contexts": {"w": [{"activation": 10**400, "context": "a"}]}},
    "activations are a number": {"contexts": 5, "activations": 5, "tokens": 5},
}


@pytest.mark.parametrize("kind", ODD)
def test_odd_entries_of_a_contexts_file_end_in_no_traceback(tmp_path, capsys, kind):
    path = write_contexts(tmp_path, 2)
    content = json.loads(path.read_text())
    content["latent_context_map"]["0"] |= ODD[kind]
    path.write_text(json.dumps(content))
    tests = ["--score", "detection", "fuzzing", "--output_dir", tmp_path / "out"]
    assert interpret(path, "--engine", "heuristic", *tests) == 0
    assert interpret(path, "--dry_run", "--output_dir", tmp_path / "dry") == 0
    content["negatives"] = 5
    path.write_text(json.dumps(content))
    assert interpret(path, "--engine", "heuristic", *tests) == 0


@pytest.mark.parametrize("missing", ["latent", "usage", "status", "explanation"])
def test_damaged_lines_of_the_answers_are_passed_over(tmp_path, server, missing):
    ask(tmp_path, server)
    log = log_of(tmp_path)
    records = [json.loads(line) for line in log.read_text().split("\n") if line]
    del records[0][missing]
    records.append({"latent": ["1"], "mark": records[0]["mark"], "usage": {}, "status": "ok"})
    log.write_text("".join(json.dumps(record) + "\n" for record in records))
    before = len(server.bodies)
    assert ask(tmp_path, server)[0] == 0
    assert len(server.bodies) == before + 1


def test_escapes_in_the_name_of_a_contexts_file_are_spelt_out(tmp_path, capsys):
    path = write_contexts(tmp_path).rename(tmp_path / "\x1b]0;owned\x07_contexts.json")
    assert interpret(path, "--engine", "heuristic", "--output_dir", tmp_path / "out") == 0
    output = capsys.readouterr().out
    assert "owned" in output
    assert "\x1b" not in output
