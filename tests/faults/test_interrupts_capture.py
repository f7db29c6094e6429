"""Interrupts while a call of an SDK is heard: as it starts, while it streams, as it ends.

The SDKs and their instrumentors are the real ones, the models are stand-ins.
"""

from __future__ import annotations

import gc
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import anthropic
import httpx
import openai
import pytest
from google import genai
from google.genai import types
from opentelemetry.context import get_current

from tests.faults.interrupting import KINDS, Interrupt, Kind, armed, left_behind, locked, open_runs, sweep
from tests.torture import LONG, effort, found
from waxell_workers import WaxellContext, get_context, redact_texts
from waxell_workers.testing import record_runs

pytestmark = pytest.mark.timeout(effort(400, 1800))

answered: set[str] = set()
"""The models that have answered: what those calls have cost is worth a record."""
MESSAGES: list[Any] = [{"role": "user", "content": "Where is the parcel 4711?"}]


@pytest.fixture(scope="module")
def base_url() -> Iterator[str]:
    command = [sys.executable, "-m", "waxell_workers.cli.standin"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        yield process.stdout.readline().strip()
        process.terminate()


@pytest.fixture
def client(base_url: str) -> Iterator[openai.OpenAI]:
    def note(response: httpx.Response) -> None:
        answered.add(json.loads(response.request.content)["model"])

    answered.clear()
    http = httpx.Client(event_hooks={"response": [note]})
    with openai.OpenAI(base_url=base_url, api_key="none", max_retries=0, http_client=http) as client:
        yield client


@pytest.fixture(scope="module")
def providers() -> Iterator[str]:
    command = [sys.executable, "-m", "tests.providers.server"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        yield process.stdout.readline().strip()
        assert process.stdin is not None
        process.stdin.close()


@pytest.fixture
def claude(providers: str) -> Iterator[anthropic.Anthropic]:
    def note(response: Any) -> None:
        answered.add(json.loads(response.request.content)["model"])

    answered.clear()
    http = anthropic.DefaultHttpxClient(event_hooks={"response": [note]})
    with anthropic.Anthropic(base_url=providers, api_key="none", max_retries=0, http_client=http) as client:
        yield client


@pytest.fixture
def gemini(providers: str) -> genai.Client:
    def note(response: Any) -> None:
        answered.add(response.request.url.path.rpartition("/")[2].partition(":")[0])

    answered.clear()
    options = types.HttpOptions(base_url=providers, client_args={"event_hooks": {"response": [note]}})
    return genai.Client(api_key="none", http_options=options)


@pytest.fixture(params=["celery", "dramatiq"] if LONG else ["celery"])
def kind(request: pytest.FixtureRequest) -> Iterator[Kind]:
    with armed(KINDS[request.param]) as kind:
        yield kind


def chat(client: openai.OpenAI, model: str) -> None:
    client.chat.completions.create(model=model, messages=MESSAGES)


def stream(client: openai.OpenAI, model: str) -> None:
    for _ in client.chat.completions.create(model=model, messages=MESSAGES, stream=True):
        pass


def stream_left_early(client: openai.OpenAI, model: str) -> None:
    with client.chat.completions.create(model=model, messages=MESSAGES, stream=True) as chunks:
        next(iter(chunks))


def stream_helper(client: openai.OpenAI, model: str) -> None:
    with client.responses.stream(model=model, input=MESSAGES) as events:
        for _ in events:
            pass


def error(client: openai.OpenAI, model: str) -> None:
    with pytest.raises(openai.OpenAIError):
        client.with_options(base_url="http://127.0.0.1:9").chat.completions.create(
            model=model, messages=MESSAGES
        )


def messages(client: anthropic.Anthropic, model: str) -> None:
    client.messages.create(model=model, max_tokens=9, messages=MESSAGES)


def messages_stream(client: anthropic.Anthropic, model: str) -> None:
    with client.messages.stream(model=model, max_tokens=9, messages=MESSAGES) as events:
        for _ in events:
            pass


def generate(client: genai.Client, model: str) -> None:
    client.models.generate_content(model=model, contents="Where is the parcel 4711?")


def generate_stream(client: genai.Client, model: str) -> None:
    for _ in client.models.generate_content_stream(model=model, contents="Where is the parcel 4711?"):
        pass


CALLS = {chat: 23, stream: 29, stream_left_early: 29, stream_helper: 67, error: 31}
"""Calls, and each of how many instructions is hit by `make test`: for the SDK's own work takes its time."""


@pytest.mark.parametrize(
    ("call", "content"),
    [*((call, False) for call in CALLS), (stream, True)],
    ids=[*(call.__name__ for call in CALLS), "stream with content"],
)
def test_an_interrupt_anywhere_in_a_call(
    client: openai.OpenAI, call: Callable[[openai.OpenAI, str], None], content: bool, kind: Kind
) -> None:
    """Given a call of the SDK, when an interrupt surfaces at any instruction of ours, then it reaches the
    code that called; the OpenTelemetry context is as it was, and the next call is recorded, once."""
    swept(client, call, kind, content=content, step=effort(CALLS[call], 3))


@pytest.mark.parametrize("call", [messages, messages_stream])
def test_an_interrupt_anywhere_in_a_call_of_anthropics(
    claude: anthropic.Anthropic, call: Callable[[anthropic.Anthropic, str], None], kind: Kind
) -> None:
    """The same of Anthropic's SDK."""
    swept(claude, call, kind, content=False, step=effort(7, 1))


@pytest.mark.parametrize("call", [generate, generate_stream])
def test_an_interrupt_anywhere_in_a_call_of_geminis(
    gemini: genai.Client, call: Callable[[genai.Client, str], None], kind: Kind
) -> None:
    """The same of Google's SDK."""
    swept(gemini, call, kind, content=False, step=effort(7, 1))


COLLECTED_EVERY = 20


@contextmanager
def no_collection() -> Iterator[None]:
    """Let no garbage be collected but where we say.

    openai's streams are cycles. One that is dropped half read is closed by the collector: if that comes while
    httpcore's pool holds its lock, which is none that its holder may take again, the thread waits for itself.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def swept(client: Any, call: Callable[[Any, str], None], kind: Kind, *, content: bool, step: int) -> None:
    """Interrupt a call at every so many of our instructions, and check what must hold of each."""
    struck = 0
    models: set[str] = set()
    places: dict[str, str] = {}

    def interrupted(interrupt: Interrupt) -> None:
        nonlocal struck
        outside = get_current()
        hit, following = f"hit-{struck}", f"following-{struck}"
        try:
            with WaxellContext("block"), interrupt:
                call(client, hit)
            assert not interrupt.where, f"the interrupt at {interrupt.where} is lost"
        except kind.exception:
            pass
        places[hit] = interrupt.where
        if len(places) % COLLECTED_EVERY == 0:
            gc.collect()
        assert get_current() is outside, interrupt.where
        assert get_context() is None, interrupt.where
        assert open_runs() == [], interrupt.where
        call(client, following)
        models.add(following)
        struck += bool(interrupt.where)

    redact = redact_texts(str.upper) if content else None
    with record_runs(capture_content=content, redact=redact) as runs, no_collection():
        call(client, "before")
        for _ in sweep(kind.strike, interrupted, step=step):
            pass
        gc.collect()
        recorded = list({record.id: record.model for record in runs.calls}.values())
        assert len(recorded) == len(set(recorded)), "a call is there twice"
        assert set(recorded) >= models, "a call was not heard that came after one that was hit"
        assert {c.run_id for c in runs.calls if c.model.startswith("hit")} <= {run.run_id for run in runs}
        assert locked() == []
        assert left_behind() == []
    lost = {places[model] for model in places.keys() & answered - set(recorded)}
    found(f"interrupts in a call, {call.__name__}", struck=struck, lost=len(lost))
    assert struck > 20
    # Before its first instruction, nothing of ours knows that a span, or its stream, is being ended.
    assert [place for place in lost if not place.endswith((" end+0", " guarded+0", " guarded+2"))] == []
