"""The SDKs and frameworks whose calls are heard, and the packages that know how to hear them: one table.

An instrumentor is found by the entry point of its distribution (group `opentelemetry_instrumentor`), so that
what is installed decides, and nothing is imported to find out. The official OpenTelemetry GenAI instrumentors
come first, OpenInference's after them.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, distribution
from typing import Any

_GROUP = "opentelemetry_instrumentor"


@dataclass(frozen=True, slots=True)
class Instrumentor:
    """A package that instruments one SDK."""

    distribution: str
    """Empty if it needs nothing but the SDK."""
    module: str
    """Importing this imports the SDK."""
    requires: tuple[str, ...] = ()
    """Versions of the SDK that are known to work, by tests, where the package itself claims fewer."""
    entry_point: str = ""
    """`module:class`, where it has no entry point: it is ours."""
    is_openinference: bool = False
    """True if its spans are described by OpenInference's attributes."""
    counts_cached_apart: bool = False
    """True if cached tokens are not among the tokens in that it tells."""

    def is_installed(self) -> bool:
        """True if it can be imported, as far as one can tell without doing it."""
        return not self.distribution or self._distribution() is not None

    def load(self) -> type[Any]:
        """Import it, and return its class.

        Raises:
            ImportError: it is not installed, or cannot be imported.
        """
        if self.entry_point:
            module, _, name = self.entry_point.partition(":")
            loaded: type[Any] = getattr(importlib.import_module(module), name)
            return loaded
        found = self._distribution()
        points = found.entry_points.select(group=_GROUP) if found is not None else ()
        for point in points:
            return point.load()  # type: ignore[no-any-return]
        raise ModuleNotFoundError(f"No module named {self.module!r}", name=self.module)

    def _distribution(self) -> Any:
        try:
            return distribution(self.distribution)
        except PackageNotFoundError:
            return None


@dataclass(frozen=True, slots=True)
class Sdk:
    """An SDK, or a framework that calls models through SDKs."""

    name: str
    """What `capture=` calls it: the name under which applications import it, as a rule."""
    module: str
    """Once this has been imported, it can be instrumented."""
    distributions: tuple[str, ...]
    instrumentors: tuple[Instrumentor, ...]
    """The first one that is installed is used."""
    places: tuple[str, ...] = ()
    """Packages of the SDK in whose classes the instrumentor puts its wrappers; gates are set there. Empty for
    one that cannot be gated, or needs no gate."""
    beside: tuple[Instrumentor, ...] = ()
    """What is used besides the chosen instrumentor, for what that does not hear."""
    extra: str = ""
    """Our extra that brings SDK and instrumentor; empty if there is none."""
    is_framework: bool = False
    """True if its calls are made through other SDKs, which are heard themselves where they can be."""
    calls_itself: bool = True
    """True if a method of the SDK that makes a call may be made of others that make it."""
    kept: tuple[str, ...] = ()
    """Arguments that the instrumentor would change."""
    variables: tuple[str, ...] = ()
    """Context variables (`module:name`) that the instrumentor reads after a call, and clears."""
    heard_by: str = "waxell_workers.capture.layers"
    """The module of ours whose `listen` and `release` see to it."""
    has_managers: bool = False
    """True if a method named `stream` returns a manager, and makes its call when that is entered."""
    provider: str = ""
    """Who answers, by OpenTelemetry's conventions, where the instrumentor does not always say it."""
    has_prefixed_models: bool = False
    """True if its models are named with their providers, as in `anthropic/claude-sonnet-4-5`."""
    is_common: bool = False
    """True if it is imported by many who call no model: that its instrumentor is missing is not said."""

    @property
    def install_command(self) -> str:
        """What a user runs to have it heard."""
        if self.extra:
            return f'pip install "waxell-workers[{self.extra}]"'
        return f"pip install {self.instrumentors[0].distribution}"

    def instrumentor(self) -> Instrumentor | None:
        """Return the installed instrumentor that is preferred, or None."""
        return next((one for one in self.instrumentors if one.is_installed()), None)


def _genai(name: str, requires: tuple[str, ...] = ()) -> Instrumentor:
    return Instrumentor(
        f"opentelemetry-instrumentation-genai-{name}", f"opentelemetry.instrumentation.genai.{name}", requires
    )


def _openinference(name: str, entry_point: str = "") -> Instrumentor:
    return Instrumentor(
        f"openinference-instrumentation-{name}",
        f"openinference.instrumentation.{name.replace('-', '_')}",
        entry_point=entry_point,
        is_openinference=True,
    )


_BEDROCK = replace(_genai("bedrock"), counts_cached_apart=True)

_COMPLETIONS = Instrumentor(
    "opentelemetry-util-genai",
    "waxell_workers.capture.completions",
    entry_point="waxell_workers.capture.completions:CompletionsInstrumentor",
)

SDKS = (
    Sdk(
        "openai",
        "openai",
        ("openai",),
        (_genai("openai"), _openinference("openai")),
        ("openai.resources.",),
        beside=(_COMPLETIONS,),
        extra="openai",
        has_managers=True,
    ),
    Sdk(
        "anthropic",
        "anthropic",
        ("anthropic",),
        (_genai("anthropic"), _openinference("anthropic")),
        ("anthropic.resources.", "anthropic._response"),
        extra="anthropic",
        has_managers=True,
    ),
    Sdk(
        "google-genai",
        "google.genai",
        ("google-genai",),
        (
            Instrumentor(
                "opentelemetry-instrumentation-google-genai",
                "opentelemetry.instrumentation.google_genai",
                ("google-genai >= 1.32.0, < 4",),
            ),
            _openinference("google-genai"),
        ),
        ("google.genai.models", "google.genai._interactions", "google.genai._gaos.interactions"),
        extra="google-genai",
        calls_itself=False,  # but its tools do, and theirs are calls of their own
        kept=("config",),
        variables=("opentelemetry.instrumentation.google_genai.embeddings:_RAW_RESPONSE_BODY",),
    ),
    Sdk(
        "bedrock",
        "botocore.client",
        ("boto3", "botocore", "aiobotocore"),
        (_BEDROCK, _openinference("bedrock")),
        ("botocore.client", "aiobotocore.client"),
        is_common=True,
    ),
    Sdk(
        "mistralai",
        "mistralai.client",
        ("mistralai",),
        (_openinference("mistralai"),),
        ("mistralai.client.chat", "mistralai.client.agents"),
        provider="mistral_ai",
    ),
    Sdk(
        "groq",
        "groq",
        ("groq",),
        (_openinference("groq"),),
        ("groq.resources.chat.completions",),
        provider="groq",
    ),
    Sdk("ollama", "ollama", ("ollama",), (_openinference("ollama"),), ("ollama._client",), provider="ollama"),
    Sdk(
        "cohere", "cohere", ("cohere",), (_openinference("cohere"),), ("cohere.v2.client",), provider="cohere"
    ),
    Sdk(
        "together",
        "together",
        ("together",),
        (_openinference("together"),),
        ("together.resources.chat.completions",),
        provider="together",
    ),
    Sdk(
        "openai-agents",
        "agents",
        ("openai-agents",),
        (
            Instrumentor(
                "",
                "waxell_workers.capture.agents",
                ("openai-agents >= 0.2",),
                entry_point="waxell_workers.capture.agents:Processor",
            ),
        ),
        is_framework=True,
        heard_by="waxell_workers.capture.agents",
    ),
    Sdk(
        "litellm",
        "litellm",
        ("litellm",),
        (_openinference("litellm"),),
        is_framework=True,
        has_prefixed_models=True,
    ),
    # The official instrumentor hears ChatOpenAI and ChatBedrock alone, whose SDKs are heard themselves.
    # OpenInference's is silent where the user's is switched on, or silences that: ours uses what it knows.
    Sdk(
        "langchain",
        "langchain_core.language_models.base",
        ("langchain-core",),
        (_openinference("langchain", "waxell_workers.capture.langchain:LangchainInstrumentor"),),
        is_framework=True,
    ),
    # The official instrumentor hears agents and tools, no models. OpenInference's is silent beside the user's
    # likewise, makes its spans current in an order that cannot be undone with two of them, and has a thread.
    Sdk(
        "llama-index",
        "llama_index.core",
        ("llama-index-core",),
        (
            Instrumentor(
                "opentelemetry-instrumentation",
                "waxell_workers.capture.llama_index",
                entry_point="waxell_workers.capture.llama_index:LlamaIndexInstrumentor",
            ),
        ),
        is_framework=True,
    ),
)

SUPPORTED = {sdk.name: sdk for sdk in SDKS}
