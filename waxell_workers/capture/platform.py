"""The platform's own SDK, `waxell_observe`, records calls itself: where it works, capture stays off.

Looks only at modules that are loaded; imports nothing.
"""

from __future__ import annotations

import logging
import sys

_logger = logging.getLogger("waxell_workers.capture")
_said: set[str] = set()


def platform_sdk_is_active() -> bool:
    """True if `waxell_observe.init()` has been called in this process (seen in 0.1.10)."""
    module = sys.modules.get("waxell_observe._init")
    if module is None or not getattr(module, "_initialized", False):
        return False
    if not _said:
        _said.add("")
        _logger.info("waxell_observe records the LLM calls of this process; waxell-workers leaves them to it")
    return True
