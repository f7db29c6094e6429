"""Runs in every Python of Dramatiq's test suite, its workers too: gives each broker one more middleware.

`UPSTREAM_MIDDLEWARE` says which: `placebo` has no hooks, and shows what the mere addition breaks; `ours` is
the real one. `UPSTREAM_PLACE` says where: `first` or `last` in the list.
"""

import os

KIND = os.environ.get("UPSTREAM_MIDDLEWARE", "none")
FIRST = os.environ.get("UPSTREAM_PLACE") == "first"


def add_to_every_broker() -> None:
    """Have brokers add the middleware when they are made, after their own."""
    import functools

    from dramatiq import Broker, Middleware

    if KIND == "ours":
        from waxell_workers.dramatiq import WaxellMiddleware as Added
    else:
        Added = type("Placebo", (Middleware,), {})
    plain = Broker.__init__

    @functools.wraps(plain)
    def with_middleware(self, *args, **kwargs):
        plain(self, *args, **kwargs)
        self.add_middleware(Added())
        if FIRST:
            self.middleware.insert(0, self.middleware.pop())

    Broker.__init__ = with_middleware


if KIND != "none":
    add_to_every_broker()
