"""openai-agents as in `with_openai_agents`, beside waxell-workers, which is told to flush it: `drain`.

waxell-workers captures nothing here, so that what arrives came from openai-agents.
"""

from with_openai_agents import call, trace

import waxell_workers
import waxell_workers.celery

__all__ = ["call", "trace"]

waxell_workers.init(capture=(), drain=["openai-agents"])
