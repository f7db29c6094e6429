"""What holds for every test."""

from __future__ import annotations

import signal

# A shell that starts us in its background has us, and all that we start, ignore Ctrl-C; some tests send one.
signal.signal(signal.SIGINT, signal.default_int_handler)
