"""`python -m waxell_workers.server`: the server, its address as the one line on stdout."""

from __future__ import annotations

import argparse
import os
import sys

from ..core.errors import ConfigError
from .run import DEFAULT_PORT, serve


def main(arguments: list[str] | None = None) -> int:
    """Serve until SIGTERM or SIGINT; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m waxell_workers.server", description=__doc__)
    parser.add_argument("--host", default="127.0.0.1", help="any address but loopback needs a key")
    parser.add_argument("--port", type=int, default=DEFAULT_PORT, help="0 takes a free one")
    parser.add_argument("--db", help="the database file; a temporary one if not given")
    parser.add_argument("--no-ingest", action="store_true", help="offer only the platform's REST protocol")
    parser.epilog = "A key that clients must send comes from the environment: WAXELL_SERVER_API_KEY."
    options = parser.parse_args(arguments)
    try:
        serve(
            host=options.host,
            port=options.port,
            db=options.db,
            # not an argument: everybody on the machine can read those
            api_key=os.environ.get("WAXELL_SERVER_API_KEY", ""),
            ingest=not options.no_ingest,
            on_ready=_say,
        )
    except ConfigError as error:
        print(error, file=sys.stderr)  # noqa: T201  a command's message
        return 2
    return 0


def _say(address: str) -> None:
    print(address, flush=True)  # noqa: T201  what this command is for


if __name__ == "__main__":
    sys.exit(main())
