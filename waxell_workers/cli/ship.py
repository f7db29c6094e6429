"""`waxell-workers ship`: the shipper in the foreground: a sidecar, a unit, or by hand after an accident."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from ..core.config import Settings
    from ..core.flush import FlushResult


@click.command()
@click.option("--drain", is_flag=True, help="Export what is there, then exit; status 1 if something remains.")
@click.option(
    "--timeout",
    default=60.0,
    show_default=True,
    type=click.FloatRange(0, min_open=True),
    help="With --drain or --adopt: the seconds after which to give up.",
)
@click.option(
    "--adopt",
    metavar="HASH",
    help="Export what was recorded for another destination that nobody uses any more, to the one of these "
    "settings, then exit; its name, or the beginning of it, as `spool status` shows it.",
)
@click.option("--url", metavar="URL", help="Where to; WAXELL_API_URL unless given.")
@click.option("--spool-dir", metavar="DIR", help="The workers' spool; WAXELL_SPOOL_DIR unless given.")
def ship(drain: bool, timeout: float, adopt: str | None, url: str | None, spool_dir: str | None) -> None:
    """Export what workers on this machine have recorded.

    Workers start a shipper by themselves. Run this one where they must not (WAXELL_SHIPPER=external),
    or with --drain when a machine is about to go. URL, key and spool must be those of the workers; the key
    is read from WAXELL_API_KEY.

    With --adopt after a key or an address was changed: what waits for the old one goes to the new one. That
    is never done unasked, since another key may be another account.
    """
    from ..core import user_path
    from ..core.config import resolve
    from ..core.foreground import run
    from .complaints import complaints

    settings = resolve({"api_url": url, "spool_dir": spool_dir})
    user_path.remember([os.getcwd()])  # as for `python -m`: a function of the user's may be there
    if not settings.configured:
        raise click.UsageError("nowhere to ship to: set WAXELL_API_KEY, or a loopback WAXELL_API_URL")
    try:
        with complaints(_say):
            if adopt is not None:
                result = _adopt(settings, adopt, timeout)
            elif drain:
                result = _drain(settings, timeout)
            else:
                result = run(settings, drain=False, progress=_Progress())
    except OSError as error:
        raise click.ClickException(str(error)) from error
    click.echo(f"delivered {result.delivered}, pending {result.pending}, rejected {result.dropped}")
    if (drain or adopt is not None) and not result:
        raise SystemExit(1)


def _drain(settings: Settings, timeout: float) -> FlushResult:
    """Deliver what is there; with a bar where somebody watches, else with lines."""
    from ..core.foreground import run

    if not sys.stderr.isatty():
        return run(settings, drain=True, progress=_Progress(), timeout=timeout)
    from .ship_bar import ShipBar

    with ShipBar(settings) as bar:
        return run(settings, drain=True, progress=bar, timeout=timeout)


def _adopt(settings: Settings, wanted: str, timeout: float) -> FlushResult:
    from ..core.adoption import adopt

    directory = _other(settings, wanted)
    _say(f"adopting {os.path.basename(directory)}: what waits there goes to {settings.api_url}")
    return adopt(settings, directory, timeout=timeout, progress=_Progress())


def _other(settings: Settings, wanted: str) -> str:
    """Return the directory of the destination that is to be adopted.

    Raises:
        UsageError: none, or more than one, has such a name; it says which there are.
    """
    from ..core.adoption import adoptable
    from .spool_places import found

    directories = found(settings)
    matches = [path for path in directories if wanted and os.path.basename(path).startswith(wanted)]
    if len(matches) == 1:
        return matches[0]
    roots = {os.path.dirname(path) for path in directories}
    names = sorted(name for root in roots for name in adoptable(settings, root))
    there = f"there are {', '.join(names)}" if names else "there is none that could be adopted"
    many = "more than one destination" if matches else "no destination"
    raise click.UsageError(f"{many} begins with {wanted!r}; {there}")


class _Progress:
    """Says on stderr how far it is, when that has changed."""

    def __init__(self) -> None:
        self._said = (0, 0)

    def __call__(self, delivered: int, pending: int) -> None:
        if (delivered, pending) == self._said:
            return
        self._said = (delivered, pending)
        _say(f"delivered {delivered}, pending {pending}")


def _say(message: str) -> None:
    click.echo(message, err=True)
