"""`waxell-workers doctor`: is everything as it must be for records to arrive, and if not, what to do.

Looks at this machine as the user who runs it: settings, spool, shipper, server, SDKs; in the end it sends one
synthetic run on its way. Each check is a function that yields findings; a key is never part of one.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from collections.abc import Iterator

    from .findings import Finding
    from .situation import Situation


@click.command(short_help="Say whether records will arrive, and if not, what to do.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object a line, one for each finding.")
@click.option("--no-send", is_flag=True, help="Do not send a synthetic run.")
@click.option(
    "--timeout",
    default=10.0,
    show_default=True,
    type=click.FloatRange(0, 600, min_open=True),
    help="The seconds that each step over the network may take.",
)
@click.option("--url", metavar="URL", help="The server; WAXELL_API_URL unless given.")
@click.option("--spool-dir", metavar="DIR", help="The workers' spool; WAXELL_SPOOL_DIR unless given.")
def doctor(as_json: bool, no_send: bool, timeout: float, url: str | None, spool_dir: str | None) -> None:
    """Check everything that records need to arrive, and say what to do where something is wrong.

    Run it as the user and with the environment of the workers. Looks at versions, settings, the spool, what
    waits in it, the shipper, the server and the key, and the LLM SDKs that are installed. Then a synthetic
    run, waxell-workers.doctor, goes the whole way; where no shipper runs, whatever waits goes before it.
    Status 1 if a check failed; warnings are status 0.
    """
    from .situation import look_around

    situation = look_around({"api_url": url, "spool_dir": spool_dir}, timeout_s=timeout, send=not no_send)
    if as_json:
        import json

        for finding in examine(situation):
            click.echo(json.dumps(asdict(finding)))
    else:
        from .show import show

        show(examine(situation))
    if situation.failed:
        raise SystemExit(1)


def examine(situation: Situation) -> Iterator[Finding]:
    """Yield what every check finds, as soon as it is found."""
    from . import capture, drain, server, settings, shipping, spool, trial, versions

    checks = (
        versions.check,
        settings.check,
        spool.check,
        shipping.check_backlog,
        shipping.check_shipper,
        server.check,
        capture.check_sdks,
        capture.check_tracers,
        drain.check,
        trial.check,
    )
    for check in checks:
        for finding in check(situation):
            situation.note(finding)
            yield situation.without_key(finding)
