"""The stand-in model server answers the real `openai` client, and never passes for a model."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest

from waxell_workers.cli.standin import count_tokens

MESSAGES: list[Any] = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": [{"type": "text", "text": "Where's my parcel?"}]},
]
REPLY = "[stand-in] You wrote: Where's my parcel?"


@pytest.fixture(scope="module")
def base_url() -> Iterator[str]:
    command = [sys.executable, "-m", "waxell_workers.cli.standin", "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        yield process.stdout.readline().strip()
        process.terminate()
        assert process.stdout.read() == "", "the address is the only line on stdout"
        assert process.stderr.read() == ""


@pytest.fixture
def client(base_url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=base_url, api_key="none", max_retries=0) as client:
        yield client


def test_it_says_where_it_listens(base_url: str) -> None:
    """The line on stdout is the base URL, and the server takes connections by then."""
    assert base_url.startswith("http://127.0.0.1:")
    assert base_url.endswith("/v1")
    assert httpx.get(f"{base_url}/models").json()["data"][0]["owned_by"] == "waxell-standin"


def test_every_answer_is_labelled(client: openai.OpenAI, base_url: str) -> None:
    """Text, fingerprint and header say that no model answered, on errors too."""
    raw = client.chat.completions.with_raw_response.create(model="any-name-at-all", messages=MESSAGES)
    completion = raw.parse()
    assert raw.headers["X-Waxell-Standin"] == "1"
    assert completion.system_fingerprint == "waxell-standin"
    assert completion.model == "any-name-at-all"
    assert completion.choices[0].message.content == REPLY
    with pytest.raises(openai.RateLimitError) as refused:
        client.chat.completions.create(model="fail-429", messages=MESSAGES)
    assert refused.value.response.headers["X-Waxell-Standin"] == "1"


def test_tokens_are_those_of_the_texts(client: openai.OpenAI) -> None:
    """Usage counts the words and punctuation marks that came and went."""
    usage = client.chat.completions.create(model="m", messages=MESSAGES).usage
    assert usage is not None
    asked = count_tokens("Be brief.") + count_tokens("Where's my parcel?")
    assert (usage.prompt_tokens, usage.completion_tokens) == (asked, count_tokens(REPLY))
    assert usage.total_tokens == asked + count_tokens(REPLY)
    response = client.responses.create(model="m", instructions="Be brief.", input="Where's my parcel?")
    assert response.usage is not None
    assert (response.usage.input_tokens, response.usage.output_tokens) == (asked, count_tokens(REPLY))
    assert client.embeddings.create(model="m", input=["one, two", "three"]).usage.prompt_tokens == 4


def test_a_token_is_a_word_or_a_mark() -> None:
    """The tokenizer is simple enough to check by hand."""
    assert [count_tokens(text) for text in ("", "  ", "one", "one two", "Hi, Bob!", "4.5 €")] == [
        0,
        0,
        1,
        2,
        4,
        4,
    ]


@pytest.mark.parametrize("include_usage", [True, False])
def test_a_stream_is_the_same_reply_in_pieces(client: openai.OpenAI, include_usage: bool) -> None:
    """Chunks add up to the reply; usage comes last, and only if it was asked for."""
    stream = client.chat.completions.create(
        model="m", messages=MESSAGES, stream=True, stream_options={"include_usage": include_usage}
    )
    chunks = list(stream)
    texts = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    assert len(texts) > 3
    assert "".join(texts) == REPLY
    assert [chunk.usage is not None for chunk in chunks] == [*[False] * (len(chunks) - 1), include_usage]
    assert {chunk.system_fingerprint for chunk in chunks} == {"waxell-standin"}


def test_a_streamed_response_has_the_events_of_one(client: openai.OpenAI) -> None:
    """The client's own accumulator takes the events, numbered from 0, and ends with the whole response."""
    with client.responses.stream(model="m", input="Where's my parcel?") as stream:
        events = list(stream)
        assert stream.get_final_response().output_text == REPLY
    assert events[0].type == "response.created"
    assert events[-1].type == "response.completed"
    numbers = [event.sequence_number for event in client.responses.create(model="m", input="x", stream=True)]
    assert numbers == list(range(len(numbers)))


def test_the_same_text_has_the_same_vector(client: openai.OpenAI) -> None:
    """Embeddings are of length 1, one per text, and the same each time."""
    first, second, third = client.embeddings.create(model="m", input=["abc", "abc", "xyz"]).data
    assert first.embedding == second.embedding != third.embedding
    assert sum(number**2 for number in first.embedding) == pytest.approx(1)


@pytest.mark.parametrize(
    ("model", "error"),
    [
        ("fail-429-once", openai.RateLimitError),
        ("fail-500", openai.InternalServerError),
        ("fail-503", openai.InternalServerError),
        ("fail-401", openai.AuthenticationError),
    ],
)
def test_a_models_name_can_ask_for_an_error(
    client: openai.OpenAI, model: str, error: type[openai.APIStatusError]
) -> None:
    """The status is that of the name, the body has OpenAI's shape and quotes the request as theirs may."""
    with pytest.raises(error, match=r"Error code: \d+ - \[stand-in\] .*Where's my parcel") as raised:
        client.chat.completions.create(model=model, messages=MESSAGES)
    assert raised.value.status_code == int(model.split("-")[1])
    assert raised.value.code


def test_a_models_name_can_ask_for_time(client: openai.OpenAI) -> None:
    """`slow-<ms>-` waits that long, and another call does not wait with it."""
    began = time.monotonic()
    client.chat.completions.create(model="slow-300-x", messages=MESSAGES)
    assert 0.3 <= time.monotonic() - began < 5
    with pytest.raises(openai.APITimeoutError):
        client.with_options(timeout=0.1).chat.completions.create(model="slow-5000-x", messages=MESSAGES)


def test_what_is_no_request_is_refused(base_url: str) -> None:
    """A body without a model is a 400 in OpenAI's shape."""
    for body in (b"", b"[]", b'{"messages": []}'):
        answer = httpx.post(f"{base_url}/chat/completions", content=body)
        assert answer.status_code == 400
        assert answer.json()["error"]["type"] == "invalid_request_error"


def test_it_can_be_slow_altogether() -> None:
    """`--delay-ms` makes every answer wait."""
    command = [sys.executable, "-m", "waxell_workers.cli.standin", "--delay-ms", "300"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        base_url = process.stdout.readline().strip()
        began = time.monotonic()
        httpx.post(f"{base_url}/embeddings", json={"model": "m", "input": "x"}).raise_for_status()
        assert time.monotonic() - began >= 0.3
        process.terminate()
