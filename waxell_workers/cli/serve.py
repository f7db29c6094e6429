"""`waxell-workers serve`: the local server, with its page, in the foreground."""

from __future__ import annotations

import os
from pathlib import Path

import click

from .extras import require


@click.command()
@click.option(
    "--host",
    default="127.0.0.1",
    show_default=True,
    help="Address; any but loopback needs WAXELL_SERVER_API_KEY.",
)
@click.option(
    "--port", default=4319, show_default=True, type=click.IntRange(0, 65535), help="Port; 0 for a free one."
)
@click.option(
    "--db", type=click.Path(dir_okay=False, path_type=Path), help="Database file; without it, gone at exit."
)
@click.option("--no-ingest", is_flag=True, help="Offer the platform's REST protocol only.")
def serve(host: str, port: int, db: Path | None, no_ingest: bool) -> None:
    """Receive runs, keep them in SQLite, and show them on a page. Prints its address on stdout."""
    require("server")
    from ..server import serve as run_server

    api_key = os.environ.get(
        "WAXELL_SERVER_API_KEY", ""
    )  # not an option: everybody on the machine can read those

    def announce(url: str) -> None:
        click.echo(url)
        click.echo(f"In the worker's shell:  export WAXELL_API_URL={url}", err=True)
        if api_key:
            click.echo("                        export WAXELL_API_KEY=…  (the server's key)", err=True)
        click.echo("Ctrl-C ends the server.", err=True)

    run_server(
        host=host,
        port=port,
        db=db,
        api_key=api_key,
        ingest=not no_ingest,
        on_ready=announce,
    )
