"""What the hub refuses is told apart in one line each; a fake hub refuses in each way, no network."""

import subprocess
import sys
from types import SimpleNamespace

import huggingface_hub
import pytest
import transformers
from huggingface_hub import errors

from src import hub, lm
from src.files import ROOT

NAME = "meta-llama/Llama-3.2-1B-Instruct"


def http(kind, status):
    return kind(
        "the hub's own many lines",
        response=SimpleNamespace(headers={}, request=None, status_code=status),
    )


def wrapped(error):
    """As transformers raises it: an OSError of its own, whose cause is the hub's."""
    try:
        try:
            raise error
        except Exception as cause:
            raise OSError("We couldn't connect, or something else\nwith more lines") from cause
    except OSError as outer:
        return outer


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
    "the hub is ill": (http(errors.HfHubHTTPError, 503), None, "answered 503"),
}


@pytest.mark.parametrize("case", CASES)
def test_each_refusal_has_its_own_line(monkeypatch, tmp_path, case):
    error, token, said = CASES[case]
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: token)

    def refuse(*_args, **_named):
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(ValueError, match=said) as told:
        hub.download(NAME, tmp_path)
    assert "\n" not in str(told.value)
    monkeypatch.setattr(
        transformers.AutoTokenizer,
        "from_pretrained",
        lambda *a, **k: (_ for _ in ()).throw(wrapped(error)),
    )
    with pytest.raises(ValueError, match=said) as told:
        lm.get_language_model(NAME, "cpu")
    assert str(told.value).startswith(f"cannot load language model '{NAME}'") and "\n" not in str(
        told.value
    )


def test_an_error_that_is_not_the_hubs_keeps_its_own_words(monkeypatch, tmp_path):
    def full(*_args, **_named):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", full)
    with pytest.raises(ValueError, match="No space left on device"):
        hub.download(NAME, tmp_path)


def test_the_script_ends_with_code_2_and_one_line(tmp_path):
    environment = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "PATH": "/usr/bin:/bin"}
    done = subprocess.run(
        [sys.executable, "-m", "src.hub", NAME, str(tmp_path / "model")],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert (
        done.returncode == 2
        and done.stderr.startswith("download_model: error: ")
        and "HF_HUB_OFFLINE" in done.stderr
    )
    assert done.stderr.count("\n") == 1
