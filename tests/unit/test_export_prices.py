"""What is known about prices is a number; what is not is None."""

from __future__ import annotations

import sys

import pytest

from tests.export_cases import call
from waxell_workers.export import prices

pytest.importorskip("genai_prices")


def test_a_known_model_has_a_price() -> None:
    usd = prices.price(call(model="gpt-4o", tokens_in=1_000_000, tokens_out=0))
    assert usd is not None
    assert 0.1 < usd < 100


def test_cached_tokens_are_cheaper() -> None:
    whole, cached = prices.price(call(tokens_cached=0)), prices.price(call(tokens_cached=1000))
    assert whole is not None
    assert cached is not None
    assert 0 < cached < whole


def test_embeddings_have_a_price() -> None:
    embedding = call(model="text-embedding-3-small", operation="embeddings", tokens_out=0)
    assert prices.price(embedding)


def test_the_model_that_answered_is_priced_rather_than_the_name_that_was_asked_for() -> None:
    assert prices.price(call(model="our-deployment", response_model="gpt-4o-2024-08-06"))


@pytest.mark.parametrize(
    "fields",
    [
        {"model": "stand-in-model"},
        {"model": "gpt-4o", "provider": "a-provider-nobody-knows"},
        {"tokens_in": 0, "tokens_out": 0},
        {"tokens_cached": 5000, "model": "nope"},
        {"model": ""},
    ],
)
def test_the_unknown_is_none_and_not_zero(fields: dict[str, object]) -> None:
    assert prices.price(call(**fields)) is None


def test_counts_that_contradict_each_other_do_no_harm() -> None:
    assert prices.price(call(tokens_in=10, tokens_cached=5000)) == prices.price(call(tokens_in=10))


def test_a_cost_that_somebody_knows_is_left_alone() -> None:
    assert prices.priced(call(cost_usd=0.0)).cost_usd == 0.0
    assert prices.priced(call(model="stand-in-model")).cost_usd is None
    assert prices.priced(call()).cost_usd


def test_without_the_library_there_are_no_prices(monkeypatch: pytest.MonkeyPatch) -> None:
    prices._calculator.cache_clear()
    monkeypatch.setitem(sys.modules, "genai_prices", None)
    try:
        assert prices.price(call()) is None
    finally:
        prices._calculator.cache_clear()
