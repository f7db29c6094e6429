"""How many of the demo's tasks have ended, framework by framework, by the account of each."""

from __future__ import annotations

from . import demo_rq
from .demo_tally import Tally


def ends(tally: Tally) -> dict[str, int]:
    """Return how many tasks have ended: Celery's and Dramatiq's apps are told of it, RQ keeps registries."""
    return {
        "celery": tally.ended("celery"),
        "rq": demo_rq.ended(tally.connection),
        "dramatiq": tally.ended("dramatiq"),
    }
