"""A WSGI app for gunicorn: `/ask/MODEL` asks the model, inside a run of its own below `/run/MODEL`."""

from collections.abc import Callable, Iterable
from typing import Any

from asking import ask

import waxell_workers
from waxell_workers import WaxellContext

waxell_workers.init()


def application(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
    _, kind, model = environ["PATH_INFO"].split("/", 2)
    if kind == "run":
        with WaxellContext("request"):
            answer = ask(model)
    else:
        answer = ask(model)
    start_response("200 OK", [("Content-Type", "text/plain; charset=utf-8")])
    return [answer.encode()]
