"""The names of the attributes that are read from an instrumentor's spans: all of them, and only here.

Plain strings, so that reading them imports nothing. The first part is that of the OpenTelemetry semantic
conventions for generative AI ("Generative AI client spans", https://opentelemetry.io/docs/specs/semconv/gen-ai/),
as `opentelemetry-util-genai` 1.3b0 sets them; `error.type` is from the general conventions. The second is
OpenInference's (https://github.com/Arize-ai/openinference/blob/main/spec/semantic_conventions.md).
"""

from __future__ import annotations

OPERATION = "gen_ai.operation.name"
PROVIDER = "gen_ai.provider.name"
REQUEST_MODEL = "gen_ai.request.model"
REQUEST_STREAM = "gen_ai.request.stream"
RESPONSE_MODEL = "gen_ai.response.model"
RESPONSE_ID = "gen_ai.response.id"
FINISH_REASONS = "gen_ai.response.finish_reasons"
TIME_TO_FIRST_CHUNK_S = "gen_ai.response.time_to_first_chunk"
"""In seconds."""
INPUT_TOKENS = "gen_ai.usage.input_tokens"
"""With the cached ones."""
OUTPUT_TOKENS = "gen_ai.usage.output_tokens"
"""With those of reasoning."""
CACHED_TOKENS = "gen_ai.usage.cache_read.input_tokens"
CACHE_WRITTEN_TOKENS = ("gen_ai.usage.cache_write.input_tokens", "gen_ai.usage.cache_creation.input_tokens")
"""The name of 1.3b0, and the one before."""
REASONING_TOKENS = "gen_ai.usage.reasoning.output_tokens"
ERROR_TYPE = "error.type"

INFERENCES = frozenset({"chat", "embeddings", "generate_content", "text_completion"})
"""The operations in which a model works; `fetch_response`, say, only reads what an earlier one made."""

PROVIDERS = {
    "aws": "aws.bedrock",
    "azure": "azure.ai.openai",
    "bedrock": "aws.bedrock",
    "cohere_chat": "cohere",
    "gemini": "gcp.gemini",
    "google": "gcp.gemini",
    "mistral": "mistral_ai",
    "mistralai": "mistral_ai",
    "moonshot": "moonshot_ai",
    "ollama_chat": "ollama",
    "together_ai": "together",
    "vertex_ai": "gcp.vertex_ai",
    "vertexai": "gcp.vertex_ai",
    "xai": "x_ai",
}
"""Provider names of instrumentors, where they are not those of the conventions."""

AZURE = "azure.ai.openai"
"""The provider behind openai's `AzureOpenAI`; 1.3b0 says `openai`."""

OPEN_CALL_PREFIX = "opentelemetry.genai.client."
"""How the keys begin under which `opentelemetry-util-genai` 1.3b0 notes an open call in the OpenTelemetry
context, so that a call inside a call is not told twice (`CLIENT_INFERENCE_CONTEXT_KEY` and its like)."""

ABANDONED_STREAM = ("_OTHER", "abandoned stream")
"""`error.type` and description of a stream that was dropped unread (`AbandonedStreamError` there)."""

CLOSED_GENERATOR = "GeneratorExit"
"""`error.type` of a stream that was read by a generator, which was closed before its end."""

OI_KIND = "openinference.span.kind"
"""`LLM`, `EMBEDDING`, `CHAIN`, `AGENT`, `TOOL`, …"""

OI_PROVIDER = "llm.provider"
OI_SYSTEM = "llm.system"
OI_MODEL = "llm.model_name"
"""The model that was asked for, and later the one that answered, in one place."""
OI_REQUEST_MODEL = "llm.request.model_name"
OI_RESPONSE_MODEL = "llm.response.model_name"
OI_EMBEDDING_MODEL = "embedding.model_name"
OI_PARAMETERS = "llm.invocation_parameters"
"""The arguments of the call, without messages and tools, as JSON."""
OI_EMBEDDING_PARAMETERS = "embedding.invocation_parameters"
OI_INPUT_MESSAGES = "llm.input_messages"
OI_OUTPUT_MESSAGES = "llm.output_messages"
OI_FINISH_REASON = "llm.finish_reason"
OI_PROMPT_TOKENS = "llm.token_count.prompt"
OI_COMPLETION_TOKENS = "llm.token_count.completion"
OI_CACHE_READ_TOKENS = "llm.token_count.prompt_details.cache_read"
OI_CACHE_WRITE_TOKENS = "llm.token_count.prompt_details.cache_write"
OI_REASONING_TOKENS = "llm.token_count.completion_details.reasoning"
OI_FIRST_TOKEN = "First Token Stream Event"
"""The name of an event."""
