"""One question to an OpenAI-compatible endpoint, bounded in time and size.

Servers differ in what they accept and in how they fail. A question is asked again in a plainer
form where the server refuses a part of it, again after a pause where it is busy, and again with
room for more tokens where the answer was cut, unless it repeats itself.
"""

from __future__ import annotations

import email.utils
import os
import re
import threading
import time
from argparse import Namespace
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from src import files

MAX_ANSWER_BYTES = 8 * 2**20
MAX_KEY_BYTES = 10_000
MAX_COUNT = 10**9  # tokens that one answer may claim to have used
MAX_PAUSE = 120  # seconds a server may ask to wait
LAST_PAUSE = 8.0  # seconds; the pauses between attempts double from half a second to this
ANSWER_CHARS = 10_000  # of an answer, from its end: a model that thinks aloud answers there
ERROR_CHARS = 300
ANSWER_TOKENS = (1000, 4000, 16_000)  # room for an answer; the next one if it was cut
LOOP_CHARS, LOOPS = 80, 4  # an answer whose end occurs so often in it would never end
NO_USAGE = {"prompt_tokens": 0, "completion_tokens": 0, "requests": 0}

OPENAI_HOST = "api.openai.com"
# Headers that the client fills from the environment, with names of the user at OpenAI.
HEADERS_FOR_OPENAI = ("OpenAI-Organization", "OpenAI-Project")

STATUS_OF_FORM = (400, 422)  # the server does not accept the request as it is
STATUS_OF_ACCOUNT = (401, 402, 403, 404)  # every further request would end in the same way
STATUS_OF_MOMENT = (408, 409, 429)  # and all from 500
NO_MONEY = ("insufficient_quota", "billing_hard_limit_reached")
FILTERED = ("content_filter", "ResponsibleAIPolicyViolation")
# The parts of a request that some servers do not know, in the order in which they are left out,
# and how an error names them.
OPTIONAL = {
    "response_format": r"response_format|json_schema|structured output",
    "temperature": r"temperature",
    "max_completion_tokens": r"max_completion_tokens",
    "seed": r"\bseed\b",
    "max_tokens": r"\bmax_tokens\b",
    "system": r"\bsystem\b|developer instruction|\broles?\b",
}


class Failed(Exception):
    """There is no usable answer.

    stops: no other question would be answered either. retry: the same request may be answered
    later, after `pause` seconds if the server named them. refused: the server's filter does not
    let this question pass. form: the request has to be plainer.
    """

    def __init__(
        self,
        message: str,
        *,
        stops: bool = False,
        retry: bool = False,
        pause: float | None = None,
        refused: bool = False,
        form: bool = False,
    ) -> None:
        super().__init__(message)
        self.stops = stops
        self.retry = retry
        self.pause = pause
        self.refused = refused
        self.form = form


class Answer(NamedTuple):
    text: str
    refusal: str | None


# ------------------------------------------------------------------------------ keys


def read_key(cfg: Namespace) -> str | None:
    """Return the key of --api_key, --api_key_file or the environment, or None."""
    if getattr(cfg, "api_key", None):
        if "api_key" in getattr(cfg, "typed", set()) - getattr(cfg, "from_file", set()):
            files.say(
                "warning: --api_key is visible to every user of this machine; "
                "prefer OPENAI_API_KEY or --api_key_file"
            )
        return _clean_key(cfg.api_key, "--api_key")
    if getattr(cfg, "api_key_file", None):
        with open(Path(cfg.api_key_file), "rb") as file:
            content = file.read(MAX_KEY_BYTES)
        return _clean_key(content.decode("utf-8-sig", "replace"), f"{cfg.api_key_file}")
    for name in ("OPENAI_API_KEY", "AZURE_OPENAI_API_KEY"):
        if os.environ.get(name, "").strip():
            return _clean_key(os.environ[name], name)
    return None


def _clean_key(text: str, source: str) -> str:
    """The key without white space around it. Raises ValueError if it cannot stand in a header.

    An HTTP library would quote such a key in its error.
    """
    key = text.strip()
    if not re.fullmatch(r"[!-~]+", key):
        raise ValueError(
            f"the key in {source} is empty or holds white space, control characters or characters "
            "outside ASCII; it must be one word"
        )
    return key


# ------------------------------------------------------------------------------ failures


def _failure(status: int, error: Any, headers: Mapping[str, str]) -> Failed:
    """What an error of the server means. error: the object in its body, whatever that is."""
    fields = error if isinstance(error, dict) else {}
    code = str(fields.get("code"))
    inner = fields.get("innererror")
    inner_code = str(inner.get("code")) if isinstance(inner, dict) else ""
    message = str(fields.get("message") or error or "no reason given")
    text = f"status {status}: {message}"
    if status in STATUS_OF_FORM and {code, inner_code} & set(FILTERED):
        return Failed(text, refused=True)
    asked_pause = _pause_of(headers)
    too_long = asked_pause is not None and asked_pause > MAX_PAUSE
    if status in STATUS_OF_ACCOUNT or code in NO_MONEY or too_long:
        return Failed(text, stops=True)
    if status in STATUS_OF_FORM and code != "context_length_exceeded":
        return Failed(text, form=True)
    if status in STATUS_OF_MOMENT or status >= 500:
        return Failed(text, retry=True, pause=asked_pause)
    return Failed(text)


def _pause_of(headers: Mapping[str, str]) -> float | None:
    """Seconds that a server asks to wait: a number with or without a fraction, or a date."""
    for name, unit in (("retry-after-ms", 1000), ("retry-after", 1)):
        try:
            seconds = float(headers.get(name, "")) / unit
        except ValueError:
            continue
        if seconds >= 0:  # not NaN
            return seconds
    date = email.utils.parsedate_tz(headers.get("retry-after", ""))
    try:
        return max(0.0, email.utils.mktime_tz(date) - time.time()) if date else None
    except (ValueError, OverflowError, OSError):
        return None


def _content_of(completion: Any) -> tuple[str, str | None, str | None]:
    """(text, refusal, finish reason) of a parsed answer. Raises Failed if it holds none."""
    if not isinstance(completion, dict):
        raise Failed("the answer is no JSON object")
    choices = completion.get("choices")
    if not choices and completion.get("error"):
        error = completion["error"]
        code = str(error.get("code", "")) if isinstance(error, dict) else ""
        status = int(code) if re.fullmatch(r"[45]\d\d", code) else 500
        raise _failure(status, error, {})
    if not isinstance(choices, list) or not choices:
        raise Failed("the answer holds no choices", retry=True)
    choice = choices[0]
    message = choice.get("message") if isinstance(choice, dict) else None
    if not isinstance(message, dict):
        raise Failed("the answer holds no message")
    content = message.get("content")
    if isinstance(content, list):
        parts = [part.get("text") for part in content if isinstance(part, dict)]
        content = "".join(part for part in parts if isinstance(part, str))
    refusal = message.get("refusal")
    finish = choice.get("finish_reason")
    if finish == "content_filter":
        refusal = refusal or "the server's content filter"
    text = content if isinstance(content, str) else ""
    return text, refusal if isinstance(refusal, str) else None, finish


def _usage_of(completion: Any) -> dict[str, int]:
    """One request and the tokens that the server counted, as far as they are numbers."""
    usage = NO_USAGE | {"requests": 1}
    counts = completion.get("usage") if isinstance(completion, dict) else None
    for key in ("prompt_tokens", "completion_tokens"):
        count = counts.get(key) if isinstance(counts, dict) else None
        if isinstance(count, int) and not isinstance(count, bool) and 0 < count <= MAX_COUNT:
            usage[key] = count
    return usage


def sum_usage(usages: Sequence[Mapping[str, int]]) -> dict[str, int]:
    return {key: sum(usage[key] for usage in usages) for key in NO_USAGE}


# ------------------------------------------------------------------------------ bounds of an answer


def _limit_size(response: Any) -> None:
    """A hook of the HTTP client: refuse compressed and endless answers, of any status."""
    encoding = response.headers.get("content-encoding", "identity")
    if encoding.strip().lower() not in ("", "identity"):
        raise Failed(f"the answer is compressed ({encoding}), which was not asked for")
    response.stream = _limited(response.stream)


def _limited(stream: Any) -> Any:
    # The class of httpx or httpx2, whichever the client of the endpoint is built on.
    (base,) = (cls for cls in type(stream).__mro__ if cls.__name__ == "SyncByteStream")

    class Limited(base):
        def __iter__(self) -> Iterator[bytes]:
            size = 0
            for chunk in stream:
                size += len(chunk)
                if size > MAX_ANSWER_BYTES:
                    raise Failed(f"the answer has more than {MAX_ANSWER_BYTES:,} bytes")
                yield chunk

        def close(self) -> None:
            stream.close()

    return Limited()


def repeats_itself(text: str) -> bool:
    """Whether an answer has come to say the same again and again, as small models do."""
    return len(text) >= LOOP_CHARS and text.count(text[-LOOP_CHARS:]) >= LOOPS


# ------------------------------------------------------------------------------ the endpoint


class Endpoint:
    """Asks the questions of several threads. `usage` counts what this process paid."""

    def __init__(self, cfg: Namespace, key: str | None) -> None:
        self.cfg = cfg
        self.key = key
        self.usage = dict(NO_USAGE)
        self.thread = threading.local()  # .usage: of the thread's feature; .http: its client
        self.lock = threading.Lock()
        self.stopped = threading.Event()  # set: requests under way end, no other is sent
        self.next_request_time = 0.0
        self.left_out: frozenset[str] = frozenset()  # parts of a request that the server refuses
        self.room = 0  # index of ANSWER_TOKENS

    def client(self, max_retry: int) -> Any:
        """Return the API client: openai's, or Azure's if --api_type or the address asks for it.

        Raises ValueError if none can be made.
        """
        try:
            return self._client(max_retry)
        except Exception as error:  # its HTTP library has errors of its own for addresses
            reason = self.storable(files.first_line(error))
            raise ValueError(
                f"no request can be made ({reason}); check --api_base, and the variables of the "
                "environment for proxies and certificates"
            ) from error

    def _client(self, max_retry: int) -> Any:
        import openai

        cfg = self.cfg
        common = {"api_key": self.key, "max_retries": max_retry, "timeout": cfg.timeout}
        azure_address = cfg.api_base and "azure.com" in cfg.api_base
        if cfg.api_type == "azure" or (cfg.api_type == "auto" and azure_address):
            return openai.AzureOpenAI(
                azure_endpoint=cfg.api_base,
                api_version=cfg.api_version or "2024-02-15-preview",
                **common,
            )
        return openai.OpenAI(base_url=cfg.api_base, **common)

    def storable(self, text: Any) -> str:
        """The end of a server's text, without keys and without unpaired surrogates."""
        text = text if isinstance(text, str) else ""
        password = re.search(r"//[^/@]*:([^/@]+)@", self.cfg.api_base or "")
        secrets = (self.key, password and password[1])
        text = files.redacted(text.encode("utf-8", "replace").decode(), *secrets)
        return re.sub(r"sk-[\w*-]{8,}", "[key]", text)[-ANSWER_CHARS:]

    def error_text(self, error: Exception) -> str:
        if isinstance(error, Failed):
            return self.storable(str(error))[:ERROR_CHARS]
        # The cause of a connection error says why there is no connection.
        cause = f" ({error.__cause__})" if error.__cause__ is not None else ""
        return self.storable(f"{type(error).__name__}: {error}{cause}")[:ERROR_CHARS]

    def ask(
        self,
        client: Any,
        messages: tuple[str, str],
        schema: Mapping[str, Any] | None = None,
        is_complete: Callable[[str], bool] = bool,
        max_retry: int = 3,
    ) -> Answer:
        """Ask one question: (instructions, prompt). Raises Failed.

        is_complete tells whether a text that stops at the limit of tokens is an answer yet.
        """
        first = max(self.room, 1 if "temperature" in self.left_out else 0)
        for room in range(first, len(ANSWER_TOKENS)):
            completion = self._accepted(client, messages, schema, room, max_retry)
            self._count(_usage_of(completion))
            text, refusal, finish = _content_of(completion)
            if refusal:
                return Answer("", self.storable(refusal))
            if finish != "length" or is_complete(text) or repeats_itself(text):
                if not text.strip():
                    raise Failed("the answer is empty")
                self.room = max(self.room, room)
                return Answer(self.storable(text), None)
            if "max_tokens" in self.left_out or self.stopped.is_set():
                break
        raise Failed(f"the answer was cut at the limit of tokens: {text[:80]!r}")

    def _count(self, usage: Mapping[str, int]) -> None:
        self.thread.usage = sum_usage([getattr(self.thread, "usage", NO_USAGE), usage])
        with self.lock:
            self.usage = sum_usage([self.usage, usage])

    def _accepted(
        self, client: Any, messages: tuple[str, str], schema: Any, room: int, max_retry: int
    ) -> Any:
        """The parsed answer to the first form of the request that the server accepts."""
        left_out = self.left_out
        while True:
            request = self._request(messages, schema, room, left_out)
            try:
                completion = self._sent(client, request, max_retry)
            except Failed as failure:
                plainer = _plainer(request, messages[0], left_out, str(failure))
                if not failure.form or plainer == left_out:
                    raise
                reason = self.error_text(failure)
                left_out = plainer
                continue
            with self.lock:
                new = left_out - self.left_out
                self.left_out |= left_out
            if new:
                files.say(f"the endpoint is asked without {', '.join(sorted(new))} ({reason})")
            return completion

    def _request(
        self, messages: tuple[str, str], schema: Any, room: int, left_out: Collection[str]
    ) -> dict[str, Any]:
        instructions, prompt = messages
        asked: list[dict[str, str]] = [
            {"role": "system", "content": instructions},
            {"role": "user", "content": prompt},
        ]
        if "system" in left_out:
            asked = [{"role": "user", "content": f"{instructions}\n\n{prompt}"}]
        request: dict[str, Any] = {"temperature": 0, "seed": self.cfg.seed}
        if schema:
            json_schema = {"name": "answer", "strict": True, "schema": schema}
            request["response_format"] = {"type": "json_schema", "json_schema": json_schema}
        if "max_completion_tokens" in left_out:
            request["max_tokens"] = ANSWER_TOKENS[room]
        else:
            request["max_completion_tokens"] = ANSWER_TOKENS[room]
        kept = {name: value for name, value in request.items() if name not in left_out}
        return {"model": self.cfg.engine, "messages": asked} | kept

    def _sent(self, client: Any, request: Mapping[str, Any], max_retry: int) -> Any:
        """The parsed answer, perhaps after pauses."""
        for attempt in range(max_retry + 1):
            self._wait_for_turn()
            try:
                return self._attempt(client, request)
            except Failed as failure:
                if not failure.retry or attempt == max_retry or self.stopped.is_set():
                    raise
                usual = min(LAST_PAUSE, 0.5 * 2**attempt)
                pause = usual if failure.pause is None else failure.pause
            if self.stopped.wait(pause):
                raise Failed("stopped before it was answered")
        raise AssertionError

    def _attempt(self, client: Any, request: Mapping[str, Any]) -> Any:
        """The parsed body of one answer with status 200. Raises Failed for everything else."""
        import openai

        try:
            content = self._body(client, request)
        except openai.APIStatusError as error:
            body = error.body if error.body is not None else error.response.text[:ERROR_CHARS]
            raise _failure(error.status_code, body, error.response.headers) from None
        except (TimeoutError, openai.APITimeoutError):
            reason = f"no whole answer within {self.cfg.timeout:g} seconds (--timeout)"
            raise Failed(reason, retry=True) from None
        except openai.APIConnectionError as error:
            raise Failed(self.error_text(error), retry=True) from None
        try:
            completion = files.parse_json(content.decode("utf-8", "replace"))
        except ValueError:
            text = content[:ERROR_CHARS].decode("utf-8", "replace")
            raise Failed(f"the answer is no JSON: {text}") from None
        if isinstance(completion, dict) and not completion.get("choices"):
            _content_of(completion)  # an error may pass if the same is asked again
        return completion

    def _body(self, client: Any, request: Mapping[str, Any]) -> bytes:
        """The bytes of one answer. Raises TimeoutError if it is not whole in time.

        The client's own timeout starts anew with each byte, so that a server which sends them one
        by one would hold a thread for ever: at the deadline another thread closes the connection.
        """
        http = self._http()
        is_late = threading.Event()

        def give_up() -> None:
            is_late.set()
            http.close()

        timer = threading.Timer(self.cfg.timeout, give_up)
        timer.daemon = True
        timer.start()
        try:
            bounded = client.with_options(http_client=http, max_retries=0)
            reply = bounded.chat.completions.with_raw_response.create(
                **request, extra_headers=_headers(client)
            )
            return reply.content
        except Exception as error:
            if is_late.is_set():  # the closed connection is told in the HTTP library's own errors
                raise TimeoutError from error
            raise
        finally:
            timer.cancel()
            if is_late.is_set():
                self.thread.http = None

    def _http(self) -> Any:
        """The HTTP client of this thread."""
        import openai

        if getattr(self.thread, "http", None) is None:
            hooks = {"response": [_limit_size]}
            self.thread.http = openai.DefaultHttpxClient(event_hooks=hooks)
        return self.thread.http

    def _wait_for_turn(self) -> None:
        """Keep to --requests_per_minute."""
        if not self.cfg.requests_per_minute:
            return
        with self.lock:
            now = time.monotonic()
            turn = max(now, self.next_request_time)
            self.next_request_time = turn + 60 / self.cfg.requests_per_minute
        if self.stopped.wait(max(0.0, turn - now)):
            raise Failed("stopped before it was asked")


def _headers(client: Any) -> dict[str, Any]:
    """The headers of a request that differ from those of the client."""
    import openai

    headers: dict[str, Any] = {"Accept-Encoding": "identity"}
    if client.base_url.host != OPENAI_HOST:
        headers |= dict.fromkeys(HEADERS_FOR_OPENAI, openai.Omit())
    return headers


def _plainer(
    request: Mapping[str, Any], instructions: str, left_out: frozenset[str], message: str
) -> frozenset[str]:
    """left_out and what the message names; if it names nothing that was sent, the next part."""
    sent = [name for name in OPTIONAL if name in request]
    if instructions and "system" not in left_out:
        sent.append("system")
    named = [name for name in sent if re.search(OPTIONAL[name], message, flags=re.I)]
    return left_out | set(named or sent[:1])
