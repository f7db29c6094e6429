"""What a call cost: the user's own prices, then an estimate by the optional library genai-prices.

genai-prices has its list inside: its updates from the network are never started here. It is imported when the
first call is priced, in the shipper, never in a task. What nobody knows is None and not 0: a free call and an
unknown price are two things.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime, timezone
from functools import lru_cache

import msgspec

from ..core.records import LLMCall
from .counts import Counts, counts
from .own_prices import own_prices

Pricing = Callable[[LLMCall], LLMCall]
"""Returns a call with its price, if it had none and one can be known."""


def pricing(setting: str = "") -> Pricing:
    """Return what prices calls.

    Args:
        setting: the setting `prices`; empty for the list alone.
    """
    own = own_prices(setting) if setting else None

    def priced(call: LLMCall) -> LLMCall:
        if call.cost_usd is not None:
            return call
        said = None if own is None else own(call)
        usd = price(call) if said is None else said.usd
        return call if usd is None else msgspec.structs.replace(call, cost_usd=usd)

    return priced


def price(call: LLMCall) -> float | None:
    """Estimate the price of a call in USD, at the list's prices of its day.

    The model that answered is looked up first, then the one that was asked for (a deployment's name, say, is
    known to nobody), under the call's provider, or under any if the call names none.

    Returns:
        USD; None if genai-prices is not installed, the model is not in its list, or `counts` are not known.
    """
    counted = counts(call)
    if counted is None:
        return None
    calculate = _calculator()
    if calculate is None:
        return None
    for model in dict.fromkeys((call.response_model, call.model)):
        if model and (usd := calculate(call, counted, model)) is not None:
            return usd
    return None


@lru_cache(maxsize=1)
def _calculator() -> Callable[[LLMCall, Counts, str], float | None] | None:
    try:
        from genai_prices import Usage, calc_price
    except ImportError:
        return None

    def calculate(call: LLMCall, counted: Counts, model: str) -> float | None:
        # As with us, its `input_tokens` have the cached ones in them, whoever the provider is.
        usage = Usage(
            input_tokens=counted.input,
            cache_read_tokens=counted.cached,
            cache_write_tokens=counted.cache_written,
            output_tokens=counted.output,
        )
        try:
            when = datetime.fromtimestamp(call.at, timezone.utc)
            found = calc_price(
                usage,
                model,
                provider_id=PROVIDERS.get(call.provider, call.provider) or None,
                genai_request_timestamp=when,
            )
        except (LookupError, ValueError, ArithmeticError, OSError):
            return None  # unknown model or provider; counts or a time that make no sense
        return float(found.total_price) or None  # 0 is a model in the list that has no price there

    return calculate


PROVIDERS = {
    "anthropic": "anthropic",
    "aws.bedrock": "aws",
    "az.ai.inference": "azure",
    "az.ai.openai": "azure",
    "azure.ai.inference": "azure",
    "azure.ai.openai": "azure",
    "cohere": "cohere",
    "deepseek": "deepseek",
    "gcp.gemini": "google",
    "gcp.gen_ai": "google",
    "gcp.vertex_ai": "google",
    "groq": "groq",
    "mistral_ai": "mistral",
    "moonshot_ai": "moonshotai",
    "openai": "openai",
    "perplexity": "perplexity",
    "x_ai": "x-ai",
    "xai": "x-ai",
}
"""Values of `gen_ai.provider.name` (GenAI conventions) to the ids of genai-prices. Others are looked up as
they are: it knows `openrouter`, `together`, `fireworks`, …, and has no prices for `ollama`."""
