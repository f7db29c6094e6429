"""What a call cost, estimated by the optional library genai-prices from its own list: no network.

It is imported when the first call is priced, in the shipper, never in a task. What nobody knows is None and
not 0: a free call and an unknown price are two things.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime, timezone
from functools import lru_cache
from typing import Any

import msgspec

from ..core.records import LLMCall


def price(call: LLMCall) -> float | None:
    """Estimate the price of a call in USD, at the prices of its day.

    The model that answered is looked up first, then the one that was asked for (a deployment's name, say, is
    known to nobody), under the call's provider, or under any if the call names none.

    Returns:
        USD; None if genai-prices is not installed, the model is not in its list, or no tokens were counted.
    """
    if call.tokens_in <= 0 and call.tokens_out <= 0:
        return None
    calculate = _calculator()
    if calculate is None:
        return None
    for model in dict.fromkeys((call.response_model, call.model)):
        if model and (usd := calculate(call, model)) is not None:
            return usd
    return None


def priced(call: LLMCall) -> LLMCall:
    """Return the call with its `cost_usd`, if it had none and it can be known."""
    if call.cost_usd is not None or (usd := price(call)) is None:
        return call
    return msgspec.structs.replace(call, cost_usd=usd)


@lru_cache(maxsize=1)
def _calculator() -> Callable[[LLMCall, str], float | None] | None:
    try:
        from genai_prices import Usage, calc_price
    except ImportError:
        return None

    def calculate(call: LLMCall, model: str) -> float | None:
        counts: dict[str, Any] = {"input_tokens": call.tokens_in, "output_tokens": call.tokens_out}
        if 0 < call.tokens_cached <= call.tokens_in:
            counts["cache_read_tokens"] = call.tokens_cached
        try:
            when = datetime.fromtimestamp(call.at, timezone.utc)
            found = calc_price(
                Usage(**counts),
                model,
                provider_id=_PROVIDERS.get(call.provider, call.provider) or None,
                genai_request_timestamp=when,
            )
        except (LookupError, ValueError, ArithmeticError, OSError):
            return None  # unknown model or provider; counts or a time that make no sense
        return float(found.total_price) or None  # 0 is a model in the list that has no price there

    return calculate


_PROVIDERS = {"azure.ai.inference": "azure", "gcp.gen_ai": "google", "x_ai": "x-ai"}
"""Values of `gen_ai.provider.name` that genai-prices does not recognise; it knows the others."""
