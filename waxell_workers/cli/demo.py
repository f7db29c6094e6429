"""`waxell-workers demo`: real workers whose tasks die, and a count of what was lost (nothing).

What happened is counted twice, by two roads that share no code: the tasks write it into Valkey themselves
(`demo_tally`), and waxell-workers tells it to the server. `demo_verdict` compares the two.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .extras import require

if TYPE_CHECKING:
    from .demo_show import Board
    from .demo_stage import Model, Stage
    from .demo_tally import Tally
    from .demo_verdict import Verdict
    from .processes import Children
    from .sources import ServerSource

PATIENCE_S = 60.0
"""How long the first 100 tasks may take; Celery needs 10 s to believe that a pool process is gone."""
STOP_S = 20.0
"""How long the worker and its shipper may take to finish; HASTE_S where something went wrong."""
HASTE_S = 5.0
LOOK_EVERY_S = 0.25


@click.command(short_help="Watch tasks die in real workers; count what is lost.")
@click.option("--once", is_flag=True, help="Exit when the work is done; status 1 if anything was lost.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as one JSON object.")
@click.option(
    "--tasks", default=100, show_default=True, type=click.IntRange(24, 5000), help="How many tasks."
)
@click.option("--port", default=0, type=click.IntRange(0, 65535), help="Port of the page; 0 for a free one.")
@click.option("--base-url", metavar="URL", help="A real OpenAI-compatible server; needs OPENAI_API_KEY.")
@click.option("--model", default="gpt-4o-mini", show_default=True, help="The chat model to ask.")
@click.option(
    "--embedding-model",
    default="text-embedding-3-small",
    show_default=True,
    help="The embedding model to ask.",
)
def demo(
    once: bool, as_json: bool, tasks: int, port: int, base_url: str | None, model: str, embedding_model: str
) -> None:
    """Run a Celery, an RQ and a Dramatiq worker whose tasks fail, hang and die; count what was lost.

    Starts an embedded Valkey, the local server with its page, a model's stand-in and the three workers; some
    of the tasks are ended by time limits, some by SIGKILL. Needs nothing but this package.
    """
    require("demo")
    from .demo_stage import Model

    if base_url and not os.environ.get("OPENAI_API_KEY"):
        raise click.UsageError("--base-url needs OPENAI_API_KEY in the environment")
    for number in (signal.SIGTERM, signal.SIGHUP):  # end as by Ctrl-C: everything that was started is ended
        if signal.getsignal(number) is not signal.SIG_IGN:  # nohup
            signal.signal(number, signal.default_int_handler)
    if not _perform(Model(base_url or "", model, embedding_model), tasks, port, once, as_json):
        raise SystemExit(1)


def _perform(model: Model, tasks: int, port: int, once: bool, as_json: bool) -> bool:
    from .demo_ends import ends
    from .demo_server import seen_runs
    from .demo_stage import set_up
    from .demo_tally import connect
    from .demo_verdict import judge_each
    from .processes import ChildError, Children
    from .sources import server

    began = time.monotonic()
    try:
        with _directory() as directory, Children(directory) as children:
            _say(f"model: {model.label}")
            stage = set_up(children, directory, model, tasks, port)
            _say(f"page:  {stage.server_url}")
            try:
                with connect(stage.valkey_socket) as tally, server(stage.server_url, api_key="") as source:
                    _watch(children, stage, tally, source, tasks)
                    ended = ends(tally)
                    verdicts = judge_each(ended, tally.attempts(), tally.calls(), seen_runs(source))
            finally:
                stage.stop_workers(HASTE_S)
            _show(verdicts, stage, time.monotonic() - began, as_json)
            if not once:
                _stay(stage)
    except ChildError as error:
        raise click.ClickException(str(error)) from error
    return all(verdict.clean for verdict in verdicts.values())


@contextmanager
def _directory() -> Iterator[Path]:
    """Make the demo's own directory, and remove it in the end."""
    root = tempfile.gettempdir()
    # the path of a Unix socket is limited to 104 bytes on macOS
    directory = Path(tempfile.mkdtemp(prefix="waxell-demo-", dir=root if len(root) < 64 else "/tmp"))
    try:
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def _watch(children: Children, stage: Stage, tally: Tally, source: ServerSource, tasks: int) -> None:
    """Show what happens, until the frameworks have seen the end of every task and the workers are gone."""
    from .demo_show import Board
    from .processes import ChildError

    deadline = time.monotonic() + PATIENCE_S * max(1.0, tasks / 100)
    with Board(tasks) as board:
        while (ended := _update(board, tally, source)) < tasks:
            children.check()
            if time.monotonic() > deadline:
                logs = "\n".join(worker.tail() for worker in stage.workers)
                raise ChildError(f"only {ended} of {tasks} tasks ended in time\n{logs}")
            time.sleep(LOOK_EVERY_S)
        stage.stop_workers(STOP_S)
        _update(board, tally, source)


def _update(board: Board, tally: Tally, source: ServerSource) -> int:
    """Show the figures of this moment; return how many tasks have ended."""
    from .demo_ends import ends

    ended = sum(ends(tally).values())
    board.update(ended=ended, attempts=len(tally.attempts()), stats=source.stats())
    return ended


def _show(verdicts: Mapping[str, Verdict], stage: Stage, seconds: float, as_json: bool) -> None:
    from .demo_show import table

    figures = {framework: figures_of(verdict) for framework, verdict in verdicts.items()}
    if not as_json:
        table(figures)
        return
    total = figures.pop("all")
    shown = total | {"frameworks": figures, "seconds": round(seconds, 1), "url": stage.server_url}
    click.echo(json.dumps(shown))


def figures_of(verdict: Verdict) -> dict[str, Any]:
    """Return the table of a verdict, in its order."""
    from dataclasses import asdict

    return asdict(verdict) | {"lost": verdict.lost, "duplicated": verdict.duplicated}


def _stay(stage: Stage) -> None:
    """Keep the page up until Ctrl-C."""
    try:  # from before it is said: who reads it may be quick
        _say(f"The page stays at {stage.server_url} until you press Ctrl-C.")
        threading.Event().wait()
    except KeyboardInterrupt:
        _say("")


def _say(message: str) -> None:
    click.echo(message, err=True)
