"""Dramatiq's part: a pipeline."""

import dramatiq
from desk import DRAMATIQ_URL, ask
from dramatiq.brokers.redis import RedisBroker

from waxell_workers.dramatiq import WaxellMiddleware

broker = RedisBroker(url=DRAMATIQ_URL)
broker.add_middleware(WaxellMiddleware())
dramatiq.set_broker(broker)


@dramatiq.actor(queue_name="letters")
def write(text: str) -> str:
    """Begin the pipeline."""
    return ask(f"Write a letter about {text}.")


@dramatiq.actor(queue_name="letters")
def post(letter: str) -> None:
    """End it."""
    ask(f"Which address has {letter}?")
