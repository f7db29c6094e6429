"""Dramatiq with its own time limit, looked at each millisecond, and a notice of shutdown at any time."""

import os
import sys
import threading
import time

import dramatiq
import noting
from dramatiq.brokers.redis import RedisBroker
from dramatiq.middleware import (
    CurrentMessage,
    Middleware,
    Shutdown,
    TimeLimit,
    TimeLimitExceeded,
    default_middleware,
)
from dramatiq.middleware.threading import raise_thread_exception

from waxell_workers import force_flush
from waxell_workers.dramatiq import WaxellMiddleware

QUEUE = os.environ["QUEUE"]
INTERRUPTS = (TimeLimitExceeded, Shutdown)


class Notices(Middleware):
    """Raises `Shutdown` as Dramatiq does in a worker that is told to stop, but after `notice_ms`."""

    def __init__(self):
        self._due = {}

    def after_process_boot(self, broker):
        threading.Thread(target=self._watch, daemon=True).start()

    def before_process_message(self, broker, message):
        milliseconds = message.options.get("notice_ms")
        if milliseconds:
            self._due[threading.get_ident()] = time.monotonic() + milliseconds / 1000

    def after_process_message(self, broker, message, *, result=None, exception=None):
        self._due.pop(threading.get_ident(), None)

    def _watch(self):
        while True:
            now = time.monotonic()
            for thread, due in list(self._due.items()):
                if now >= due and self._due.pop(thread, None):
                    raise_thread_exception(thread, Shutdown)
            time.sleep(0.001)


class Account(Middleware):
    """Says what Dramatiq makes of each message."""

    def after_process_message(self, broker, message, *, result=None, exception=None):
        if exception is not None:
            noting.note(f"framework-{noting.place(exception)}", message.message_id)
        message.options["end"] = type(exception).__name__ if exception else "succeeded"

    def after_ack(self, broker, message):
        sys.stderr.write(f"acknowledged {message.message_id} {message.options['end']}\n")

    def after_nack(self, broker, message):
        sys.stderr.write(f"rejected {message.message_id} {message.options['end']}\n")


own = [TimeLimit(interval=1), Notices(), CurrentMessage()]
usual = [kind() for kind in default_middleware if kind is not TimeLimit]
broker = RedisBroker(url=os.environ["BROKER_URL"], middleware=[Account(), *own, *usual])
broker.add_middleware(WaxellMiddleware())
dramatiq.set_broker(broker)


def message_id():
    return CurrentMessage.get_current_message().message_id


@dramatiq.actor(queue_name=QUEUE, max_retries=0)
def storm(seconds):
    noting.record(message_id(), seconds, INTERRUPTS)


@dramatiq.actor(queue_name=QUEUE, max_retries=0)
def flush(seconds):
    noting.record(message_id(), 0.01, INTERRUPTS)
    noting.note("waits", message_id())
    try:
        force_flush(seconds)
    except INTERRUPTS as error:
        noting.note(f"task-{noting.place(error)}", message_id())
        raise
    noting.note("outlasted", message_id())


@dramatiq.actor(queue_name=QUEUE, max_retries=0)
def flush_again():
    noting.note(f"flushed-{bool(force_flush(30))}", message_id())
