"""A Dramatiq app whose actors are traced: `dramatiq with_dramatiq`."""

import os

import dramatiq
import tracers
from dramatiq.brokers.redis import RedisBroker

from waxell_workers.dramatiq import WaxellMiddleware

broker = RedisBroker(url=os.environ["BROKER_URL"])
broker.add_middleware(WaxellMiddleware())
dramatiq.set_broker(broker)

ask = dramatiq.actor(tracers.ask, actor_name="ask", queue_name=os.environ["QUEUE"], max_retries=0)
