"""Each refusal of the hub has its own one-line message. A fake hub refuses; no network is used."""

import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import huggingface_hub
import pytest
import transformers
from huggingface_hub import errors

from src import hub, lm
from src.files import ROOT

NAME = "meta-llama/Llama-3.2-1B-Instruct"


def http(kind, status):
    response = SimpleNamespace(headers={}, request=None, status_code=status)
    return kind("the hub's own many lines", response=response)


def wrapped(error):
    """The error as transformers raises it: as the cause of an OSError of its own."""
    try:
        try:
            raise error
        except Exception as cause:
            raise OSError("We couldn't connect, or something else\nwith more lines") from cause
    except OSError as outer:
        return outer


# case: (error, token in use, expected message)
CASES = {
    "gated, no token": (
        http(errors.GatedRepoError, 401),
        None,
        r"is gated \(no token was sent\): accept its terms at https://huggingface.co/.*HF_TOKEN",
    ),
    "gated, terms not accepted": (
        http(errors.GatedRepoError, 403),
        "t",
        r"is gated \(the token in use was sent\): accept its terms",
    ),
    "bad token": (http(errors.HfHubHTTPError, 401), "t", "refuses the token in use"),
    "typo": (http(errors.RepositoryNotFoundError, 404), None, r"there is no .* on the hub.*typo"),
    "no name of a repository": (
        errors.HFValidationError("bad"),
        None,
        r"there is no .* on the hub.*owner/name",
    ),
    "offline by choice": (
        errors.OfflineModeIsEnabled("offline"),
        None,
        "HF_HUB_OFFLINE forbids asking",
    ),
    "no network, not in the cache": (
        errors.LocalEntryNotFoundError("no"),
        None,
        "the hub cannot be reached: is there a network",
    ),
    "no network": (ConnectionError("refused"), None, "the hub cannot be reached"),
    "the hub has a fault": (http(errors.HfHubHTTPError, 503), None, "answered 503"),
}


@pytest.mark.parametrize("case", CASES)
def test_each_refusal_has_its_own_line(monkeypatch, tmp_path, case):
    error, token, message = CASES[case]
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: token)
    monkeypatch.setattr(hub, "reachable", lambda: True)

    def refuse(*_args, **_options):
        raise error

    def refuse_as_transformers(*_args, **_options):
        raise wrapped(error)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(ValueError, match=message) as caught:
        hub.download(NAME, tmp_path)
    assert "\n" not in str(caught.value)
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", refuse_as_transformers)
    with pytest.raises(ValueError, match=message) as caught:
        lm.get_language_model(NAME, "cpu")
    assert str(caught.value).startswith(f"cannot load language model '{NAME}'")
    assert "\n" not in str(caught.value)


def test_an_error_that_is_not_the_hubs_keeps_its_own_words(monkeypatch, tmp_path):
    def full(*_args, **_options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(hub, "reachable", lambda: True)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", full)
    with pytest.raises(ValueError, match="No space left on device"):
        hub.download(NAME, tmp_path)


def test_the_script_ends_with_code_2_and_one_line(tmp_path):
    environment = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "PATH": "/usr/bin:/bin"}
    command = [sys.executable, "-m", "src.hub", NAME, str(tmp_path / "model")]
    process = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert process.returncode == 2
    assert process.stderr.startswith("download_model: error: ")
    assert "HF_HUB_OFFLINE" in process.stderr
    assert process.stderr.count("\n") == 1


@pytest.fixture
def listening():
    """A socket of this machine that takes connections and answers none."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server


def answer_once(server):
    connection, _ = server.accept()
    connection.recv(4096)
    connection.sendall(b"HTTP/1.1 503 Busy\r\nContent-Length: 0\r\n\r\n")
    connection.close()


def test_a_hub_that_does_not_answer_is_given_up_quickly(monkeypatch, listening):
    monkeypatch.setattr(hub, "PROBE_SECONDS", 0.2)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    port = listening.getsockname()[1]
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{port}")
    assert not hub.reachable()
    listening.accept()[0].close()  # the connection of that attempt
    monkeypatch.setattr(hub, "PROBE_SECONDS", 20.0)
    with ThreadPoolExecutor(1) as pool:
        pool.submit(answer_once, listening)
        assert hub.reachable()  # an error is an answer too
    listening.close()
    assert not hub.reachable()


def test_a_download_without_a_hub_takes_what_is_there(monkeypatch, tmp_path):
    monkeypatch.setattr(hub, "reachable", lambda: False)
    with pytest.raises(ValueError, match="not in the cache"):
        hub.download(NAME, tmp_path / "model")
    (tmp_path / "model").mkdir(exist_ok=True)
    (tmp_path / "model" / "config.json").write_text("{}")
    assert hub.download(NAME, tmp_path / "model") == tmp_path / "model"
