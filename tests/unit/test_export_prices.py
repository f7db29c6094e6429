"""What is known about prices is a number; what is not is None."""

from __future__ import annotations

import subprocess
import sys
from datetime import datetime, timezone
from typing import Any

import pytest

from tests.export_cases import call
from tests.harness import environment
from waxell_workers.export import prices

genai_prices = pytest.importorskip("genai_prices")

M = 1_000_000


def usd(**fields: Any) -> float | None:
    return prices.price(call(**fields))


def test_a_known_model_has_a_price() -> None:
    """A million tokens of gpt-4o cost some dollars."""
    found = usd(model="gpt-4o", tokens_in=M, tokens_out=0)
    assert found is not None
    assert 0.1 < found < 100


@pytest.mark.parametrize(("provider", "model"), [("openai", "gpt-4o"), ("anthropic", "claude-sonnet-4-5")])
def test_cached_tokens_are_part_of_the_prompt_and_cheaper(provider: str, model: str) -> None:
    """`tokens_in` has the cached ones in it, for every provider: they cost less, and nothing counts twice."""
    whole, half, all_cached = (
        usd(provider=provider, model=model, tokens_in=100_000, tokens_out=0, tokens_cached=cached)
        for cached in (0, 50_000, 100_000)
    )
    assert whole is not None
    assert half is not None
    assert all_cached is not None
    assert 0 < all_cached < half < whole
    assert half == pytest.approx((whole + all_cached) / 2)


def test_what_is_written_to_a_cache_costs_more_where_the_provider_says_so() -> None:
    """Anthropic asks 1.25 times the price for what it keeps; OpenAI asks nothing more."""
    sizes: dict[str, Any] = {"tokens_in": 100_000, "tokens_out": 0}
    plain = usd(provider="anthropic", model="claude-sonnet-4-5", **sizes)
    kept = usd(provider="anthropic", model="claude-sonnet-4-5", tokens_cache_written=100_000, **sizes)
    assert plain is not None
    assert kept == pytest.approx(1.25 * plain)
    assert usd(tokens_cache_written=100_000, **sizes) == usd(**sizes)


def test_the_three_parts_of_a_prompt_add_up() -> None:
    """20 thousand tokens plain, 50 read, 30 written: each at its price (3.00, 0.30 and 3.75 a million)."""
    found = usd(
        provider="anthropic",
        model="claude-sonnet-4-5",
        tokens_in=100_000,
        tokens_cached=50_000,
        tokens_cache_written=30_000,
        tokens_out=0,
    )
    assert found == pytest.approx((20 * 3 + 50 * 0.3 + 30 * 3.75) / 1000)


@pytest.mark.parametrize("tokens_out", [0, None])
def test_embeddings_have_a_price_without_an_output(tokens_out: int | None) -> None:
    """There is no output to count: that nobody told its size makes nothing unknown."""
    assert usd(model="text-embedding-3-small", operation="embeddings", tokens_out=tokens_out)


def test_the_model_that_answered_is_priced_rather_than_the_name_that_was_asked_for() -> None:
    """A deployment has any name; what answered has one that the list knows."""
    assert usd(model="our-deployment", response_model="gpt-4o-2024-08-06")


@pytest.mark.parametrize(
    "fields",
    [
        {"model": "stand-in-model"},
        {"model": "gpt-4o", "provider": "a-provider-nobody-knows"},
        {"model": "gpt-4o", "provider": "ollama"},
        {"tokens_in": 0, "tokens_out": 0},
        {"tokens_in": None},
        {"tokens_out": None},
        {"tokens_in": None, "tokens_out": None},
        {"model": "text-embedding-3-small", "operation": "embeddings", "tokens_in": None},
        {"tokens_in": -5},
        {"tokens_cached": 5000, "model": "nope"},
        {"model": ""},
    ],
)
def test_the_unknown_is_none_and_not_zero(fields: dict[str, object]) -> None:
    """Half a price would pass for a whole one."""
    assert usd(**fields) is None


@pytest.mark.parametrize(
    "fields",
    [
        {"tokens_cached": 5000},
        {"tokens_cache_written": 5000},
        {"tokens_cached": 6, "tokens_cache_written": 5},
        {"tokens_cached": -1},
    ],
)
def test_counts_that_contradict_each_other_have_no_price(fields: dict[str, Any]) -> None:
    """More cached than sent: somebody counts otherwise than we do, and any sum would be wrong."""
    assert usd(tokens_in=10, **fields) is None


MODELS = {
    "anthropic": ("anthropic", "claude-sonnet-4-5"),
    "aws.bedrock": ("aws", "anthropic.claude-3-5-sonnet-20241022-v2:0"),
    "az.ai.inference": ("azure", "gpt-4o-mini"),
    "az.ai.openai": ("azure", "gpt-4o-mini"),
    "azure.ai.inference": ("azure", "gpt-4o-mini"),
    "azure.ai.openai": ("azure", "gpt-4o"),
    "cohere": ("cohere", "command-r-plus-08-2024"),
    "deepseek": ("deepseek", "deepseek-chat"),
    "gcp.gemini": ("google", "gemini-2.5-flash"),
    "gcp.gen_ai": ("google", "gemini-2.5-flash"),
    "gcp.vertex_ai": ("google", "gemini-2.5-flash"),
    "groq": ("groq", "llama-3.3-70b-versatile"),
    "mistral_ai": ("mistral", "mistral-large-latest"),
    "moonshot_ai": ("moonshotai", "kimi-k2-0711-preview"),
    "openai": ("openai", "gpt-4o"),
    "perplexity": ("perplexity", "sonar-pro"),
    "x_ai": ("x-ai", "grok-3"),
    "xai": ("x-ai", "grok-3"),
}
"""Each provider name of the conventions: whose price list counts, and a model in it."""


def test_every_provider_of_ours_is_looked_at() -> None:
    """Who adds one adds a model to look it up by."""
    assert {name: provider for name, (provider, _) in MODELS.items()} == prices.PROVIDERS


@pytest.mark.parametrize("name", MODELS)
def test_a_provider_of_the_conventions_is_one_of_the_library(name: str) -> None:
    """The price is the one that the library itself gives for its own id of the provider."""
    provider, model = MODELS[name]
    usage = genai_prices.Usage(input_tokens=1000, output_tokens=100)
    when = datetime.fromtimestamp(call().at, timezone.utc)  # some ask more by day
    theirs = genai_prices.calc_price(usage, model, provider_id=provider, genai_request_timestamp=when)
    assert theirs.provider.id == provider
    assert usd(provider=name, model=model) == pytest.approx(float(theirs.total_price))


def test_a_cost_that_somebody_knows_is_left_alone() -> None:
    """Also if it is nothing."""
    priced = prices.pricing()
    assert priced(call(cost_usd=0.0)).cost_usd == 0.0
    assert priced(call(model="stand-in-model")).cost_usd is None
    assert priced(call()).cost_usd


def test_without_the_library_there_are_no_prices(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is optional: nothing fails, nothing is priced."""
    prices._calculator.cache_clear()
    monkeypatch.setitem(sys.modules, "genai_prices", None)
    try:
        assert usd() is None
    finally:
        prices._calculator.cache_clear()


def test_pricing_starts_no_thread_and_asks_no_network() -> None:
    """The library can fetch a newer list, by a thread of its own: nothing here begins that."""
    code = (
        "import sys, threading\n"
        "asked = []\n"
        "sys.addaudithook(lambda event, _: asked.append(event) if event.startswith('socket.') else None)\n"
        "from waxell_workers.core.records import LLMCall\n"
        "from waxell_workers.export.prices import price\n"
        "assert 'genai_prices' not in sys.modules, 'imported before it is needed'\n"
        "asked.clear()  # httpx looks at its own imports\n"
        "for model in ('gpt-4o', 'nobody-knows-this'):\n"
        "    usd = price(LLMCall(id='c', at=1.75e9, model=model, tokens_in=1000, tokens_out=10))\n"
        "    assert (usd is None) == (model != 'gpt-4o'), usd\n"
        "from genai_prices import update_prices\n"
        "from genai_prices.data_snapshot import get_snapshot\n"
        "assert not get_snapshot().from_auto_update\n"
        "assert threading.enumerate() == [threading.main_thread()], threading.enumerate()\n"
        "assert not asked, asked\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env=environment(), timeout=60)
