"""Where the exporters of the other tracers hand over what they get: to an HTTP server in another process."""

import os
from collections.abc import Sequence

import httpx


def hand_over(calls: Sequence[str]) -> None:
    """POST the markers of some calls; they count as delivered when the server has answered."""
    httpx.post(os.environ["COLLECTOR_URL"], json=list(calls), timeout=10).raise_for_status()
