"""Which installed LLM SDKs are heard, and which other tracers stand beside us. Imports none of them."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import metadata

from ...capture import SUPPORTED
from .findings import Finding, Findings
from .situation import Situation
from .versions import installed

SDKS_AREA = "capture"
TRACERS_AREA = "other tracers"
_BY_HAND = "record its calls with record_llm_call() until it is supported"


@dataclass(frozen=True, slots=True)
class Sdk:
    """A package by which applications call models."""

    distribution: str
    module: str
    """What applications import, and what `capture` calls it."""
    through: str = ""
    """Not empty for what calls other SDKs, as a rule: how its calls are heard."""


SDKS = (
    Sdk("openai", "openai"),
    Sdk("anthropic", "anthropic"),
    Sdk("google-genai", "google.genai"),
    Sdk("google-generativeai", "google.generativeai"),
    Sdk("google-cloud-aiplatform", "vertexai"),
    Sdk("mistralai", "mistralai"),
    Sdk("cohere", "cohere"),
    Sdk("groq", "groq"),
    Sdk("ollama", "ollama"),
    Sdk("together", "together"),
    Sdk("huggingface-hub", "huggingface_hub", "not heard; matters only if it calls models"),
    Sdk("boto3", "boto3", "not heard; matters only if it calls Bedrock"),
    Sdk("litellm", "litellm", "heard where it goes through the openai SDK, not where it speaks HTTP itself"),
    Sdk("langchain-core", "langchain_core", "heard through the SDKs that it calls"),
    Sdk("llama-index-core", "llama_index.core", "heard through the SDKs that it calls"),
    Sdk("openai-agents", "agents", "heard through the openai SDK"),
    Sdk("pydantic-ai-slim", "pydantic_ai", "heard through the SDKs that it calls"),
    Sdk("dspy", "dspy", "calls models through litellm"),
)
"""Every SDK that the doctor knows. What `capture` supports is not written here but asked of it."""

TRACERS = {
    "waxell-observe": "where it is initialised in the same process, it records the LLM calls and "
    "waxell-workers does not; tasks are recorded all the same",
    "opentelemetry-sdk": "your own spans, parents and metrics stay as they are without us",
    "openai-agents": "its own tracing goes to OpenAI as before, from memory: what a killed worker had not "
    "sent is lost there",
    "ddtrace": "its traces are its own; the shipper is not traced by it",
    "sentry-sdk": "its events are its own; errors of tasks are told to both",
    "langfuse": "it keeps records in memory: what a killed worker had not sent is lost there",
    "langsmith": "it keeps records in memory: what a killed worker had not sent is lost there",
    "logfire": "it is OpenTelemetry: your own spans stay as they are without us",
    "traceloop-sdk": "it instruments the same SDKs by instrumentors of its own; not tried beside ours",
    "newrelic": "its traces are its own; the shipper is not traced by it",
}
"""Distribution to what its presence means, in a sentence."""


def check_sdks(situation: Situation) -> Findings:
    """Say of each installed SDK whether its calls are heard."""
    found = [(sdk, number) for sdk in SDKS if (number := installed(sdk.distribution))]
    if not found:
        yield Finding(SDKS_AREA, "info", "no LLM SDK that is known here is installed")
    for sdk, number in found:
        yield _of_sdk(situation, sdk, number)


def _of_sdk(situation: Situation, sdk: Sdk, number: str) -> Finding:
    name = f"{sdk.distribution} {number}"
    if sdk.module not in SUPPORTED:
        if sdk.through:
            return Finding(SDKS_AREA, "info", f"{name}: {sdk.through}")
        return Finding(SDKS_AREA, "warn", f"{name}: its calls are not heard by this version", _BY_HAND)
    chosen = situation.settings.capture
    if chosen is not None and sdk.module not in chosen:
        return Finding(SDKS_AREA, "info", f"{name}: not among the SDKs that capture names")
    instrumentor = distribution_of(SUPPORTED[sdk.module][1])
    its_version = installed(instrumentor)
    if its_version:
        return Finding(SDKS_AREA, "ok", f"{name}: heard, by {instrumentor} {its_version}")
    return Finding(
        SDKS_AREA,
        "warn",
        f"{name}: its calls are not heard, {instrumentor} is missing",
        f'pip install "waxell-workers[{_extra(sdk)}]"',
    )


def distribution_of(instrumentor: str) -> str:
    """Return the distribution of an instrumentor's module: theirs are named alike."""
    return instrumentor.replace(".", "-").replace("_", "-")


def _extra(sdk: Sdk) -> str:
    extras = metadata("waxell-workers").get_all("Provides-Extra") or []
    return next((name for name in (sdk.module, sdk.distribution) if name in extras), "all")


def check_tracers(situation: Situation) -> Findings:
    """Say of each other tracer that is installed what that means."""
    for distribution, meaning in TRACERS.items():
        number = installed(distribution)
        if number:
            yield Finding(TRACERS_AREA, "info", f"{distribution} {number}: {meaning}")
