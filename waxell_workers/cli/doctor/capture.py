"""Which installed LLM SDKs are heard, by whom, and what would have the others heard; other tracers beside us.

What can be heard, and how, is said by `capture.sdks` alone; here are only the packages that nobody hears.
Neither an SDK nor an instrumentor is imported.
"""

from __future__ import annotations

from ...capture.sdks import SDKS, SUPPORTED, Instrumentor, Sdk
from . import claims
from .findings import Finding, Findings
from .situation import Situation
from .versions import installed

SDKS_AREA = "capture"
TRACERS_AREA = "other tracers"
BY_HAND = "record_llm_call(): https://github.com/waxell/waxell-workers/blob/main/docs/manual-calls.md"

UNHEARD = {
    "ai21": "",
    "azure-ai-inference": "",
    "cerebras-cloud-sdk": "",
    "dashscope": "",
    "fireworks-ai": "",
    "google-cloud-aiplatform": "matters only if it calls models",
    "google-generativeai": "",
    "huggingface-hub": "matters only if it calls models",
    "ibm-watsonx-ai": "",
    "replicate": "",
    "voyageai": "",
    "xai-sdk": "",
}
"""SDKs that speak to a provider themselves and that no instrumentor of `capture.sdks` hears, with a word on
those that are mostly there for something else."""

FRAMEWORKS = ("crewai", "dspy", "haystack-ai", "instructor", "pydantic-ai-slim")
"""What calls models through SDKs and is not heard itself."""

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
    """Say of each installed SDK whether its calls are heard, by whom, and what would change it."""
    chosen = situation.settings.capture
    unknown = [name for name in chosen or () if name not in SUPPORTED]
    if unknown:
        yield Finding(
            SDKS_AREA,
            "fail",
            f"capture names what is no SDK that is known here: {', '.join(unknown)}",
            f"use some of {', '.join(sorted(SUPPORTED))}",
        )
    supported = [(sdk, number) for sdk in SDKS if (number := _versions(sdk.distributions))]
    for sdk, number in supported:
        is_left_out = chosen is not None and sdk.name not in chosen
        yield _left_out(sdk, number) if is_left_out else _heard(sdk, number)
    others = [*_unheard()]
    yield from others
    if not supported and not others:
        yield Finding(SDKS_AREA, "info", "no LLM SDK that is known here is installed")


def _versions(distributions: tuple[str, ...]) -> str:
    """Return what of these is installed, each with its version."""
    return ", ".join(f"{name} {number}" for name in distributions if (number := installed(name)))


def _left_out(sdk: Sdk, number: str) -> Finding:
    return Finding(
        SDKS_AREA, "info", f"{number}: not heard, {sdk.name} is not among the SDKs that capture names"
    )


def _heard(sdk: Sdk, number: str) -> Finding:
    chosen = sdk.instrumentor()
    if chosen is None:
        return _without_instrumentor(sdk, number)
    beside = sdk.beside if chosen is sdk.instrumentors[0] else ()
    for one in (chosen, *beside):
        if refused := claims.unmet(one):
            return _refused(number, one, refused)
    by = _named(chosen) or "an instrumentor of ours"
    return Finding(SDKS_AREA, "ok", f"{number}: heard, by {by}")


def _without_instrumentor(sdk: Sdk, number: str) -> Finding:
    missing = f"{sdk.instrumentors[0].distribution} is missing"
    if sdk.is_framework:
        text = f"{number}: heard through the SDKs that it calls, where those are heard; for more, {missing}"
        return Finding(SDKS_AREA, "info", text, sdk.install_command)
    if sdk.is_common:
        text = f"{number}: not heard, {missing}; matters only if it calls models"
        return Finding(SDKS_AREA, "info", text, sdk.install_command)
    text = f"{number}: its calls are not heard, {missing}"
    return Finding(SDKS_AREA, "warn", text, sdk.install_command)


def _refused(number: str, instrumentor: Instrumentor, refused: tuple[str, ...]) -> Finding:
    by = _named(instrumentor) or "our instrumentor"
    newer = instrumentor.distribution or "waxell-workers"
    made_for = " or ".join(refused)
    return Finding(
        SDKS_AREA,
        "warn",
        f"{number}: its calls may not be heard, {by} is made for {made_for}",
        f'pip install --upgrade {newer}, or pip install "{refused[0]}"; until then, {BY_HAND}',
    )


def _named(instrumentor: Instrumentor) -> str:
    """Return an instrumentor with its version; of one that is part of this package, nothing."""
    name = instrumentor.distribution
    return f"{name} {installed(name)}" if name else ""


def _unheard() -> Findings:
    known = {name for sdk in SDKS for name in sdk.distributions}
    for distribution, remark in UNHEARD.items():
        number = installed(distribution)
        if not number or distribution in known:
            continue
        if remark:
            yield Finding(SDKS_AREA, "info", f"{distribution} {number}: not heard; {remark}", BY_HAND)
        else:
            text = f"{distribution} {number}: nobody can hear its calls yet"
            yield Finding(SDKS_AREA, "warn", text, f"record them by hand, with {BY_HAND}")
    for distribution in FRAMEWORKS:
        number = installed(distribution)
        if number and distribution not in known:
            text = f"{distribution} {number}: heard through the SDKs that it calls, where those are heard"
            yield Finding(SDKS_AREA, "info", text)


def check_tracers(situation: Situation) -> Findings:
    """Say of each other tracer that is installed what that means."""
    for distribution, meaning in TRACERS.items():
        number = installed(distribution)
        if number:
            yield Finding(TRACERS_AREA, "info", f"{distribution} {number}: {meaning}")
