"""Never lose an LLM call that a background worker made.

See `waxell_workers.celery` and its siblings for the one import that a worker needs, `init` for settings.
"""

from ._api import aforce_flush, force_flush, init, record_llm_call, shutdown, stats
from ._version import __version__
from .core.collector import Stats
from .core.context import WaxellContext
from .core.errors import ConfigError, WaxellWorkersError
from .core.flush import FlushResult
from .core.observe import observe
from .core.redaction import redact_texts
from .core.runs import get_context
from .core.tasks import options

__all__ = [
    "ConfigError",
    "FlushResult",
    "Stats",
    "WaxellContext",
    "WaxellWorkersError",
    "__version__",
    "aforce_flush",
    "force_flush",
    "get_context",
    "init",
    "observe",
    "options",
    "record_llm_call",
    "redact_texts",
    "shutdown",
    "stats",
]
