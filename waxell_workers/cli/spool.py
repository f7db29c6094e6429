"""`waxell-workers spool`: look into the journal: how much waits, whether it is whole, and what it says.

Reads only: works beside running workers and a running shipper, and changes nothing for either.
"""

from __future__ import annotations

import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from ..core.config import Settings
    from ..core.inspection import SegmentReport, Survey
    from .spool_check import Checked

Command = TypeVar("Command", bound=Callable[..., Any])

_AGE = re.compile(r"(?P<count>\d+(\.\d+)?)(?P<unit>[smhd])")
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86_400}

_spool_dir = click.option(
    "--spool-dir", metavar="DIR", help="The workers' spool; WAXELL_SPOOL_DIR unless given."
)


@click.group(short_help="Look into the journal: what waits there, and whether it is whole.")
def spool() -> None:
    """Look into the journal, in which records wait for their delivery.

    Only reads, and may run at any time. Run it as the user as whom the workers run.
    """


@spool.command()
@_spool_dir
@click.option("--json", "as_json", is_flag=True, help="One JSON object a line.")
def status(spool_dir: str | None, as_json: bool) -> None:
    """Show how much waits, for each destination, and who works there.

    A destination is a server with an account: exporter, URL, key and proxy.
    """
    settings = _settings(spool_dir)
    found = [(root, list(_surveys(root))) for root in _roots(settings)]
    if as_json:
        for root, surveys in found:
            for survey in surveys:
                click.echo(json.dumps(_status(settings, root, survey)))
        return
    from .spool_show import status_table

    for root, surveys in found:
        status_table(settings, root, surveys)


@spool.command()
@_spool_dir
@click.option("--json", "as_json", is_flag=True, help="One JSON object a line.")
def verify(spool_dir: str | None, as_json: bool) -> None:
    """Read every segment and ledger; status 1 if anything is damaged.

    A line that is cut off counts: its writer died in the middle of it, or the disk was full.
    """
    from .spool_check import check

    settings = _settings(spool_dir)
    checked = [check(f"{root}/{name}") for root in _roots(settings) for name in _destinations(root)]
    if as_json:
        for destination in checked:
            for line in _verified(destination):
                click.echo(json.dumps(line))
    else:
        from .spool_show import verify_tables

        verify_tables(checked)
    if any(destination.damaged for destination in checked):
        raise SystemExit(1)


@spool.command()
@_spool_dir
@click.option(
    "--destination", metavar="HASH", help="Which, or its beginning; that of these settings unless given."
)
@click.option("--all", "everything", is_flag=True, help="Also what has arrived and is not deleted yet.")
@click.option(
    "--since", metavar="WHEN", help="Only records made since: 90s, 15m, 2h, 7d ago, or an ISO 8601 time."
)
def export(spool_dir: str | None, destination: str | None, everything: bool, since: str | None) -> None:
    """Write the records that wait, as NDJSON, one a line.

    They have the shape of the ingest endpoint, and may hold whatever your settings let in.
    """
    from ..core.inspection import Walk, read_ledger

    began = 0.0 if since is None else _moment(since)
    settings = _settings(spool_dir)
    directory = _directory(settings, destination)
    walk = Walk(directory, read_ledger(directory), everything=everything)
    out = sys.stdout.buffer
    try:
        for line in walk.lines():
            if line.record.at >= began:
                out.write(line.text + b"\n")
        out.flush()
    except BrokenPipeError:  # who reads has seen enough
        # What is still buffered would raise again at the interpreter's end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return
    torn = sum(segment.torn for segment in walk.segments)
    if torn:
        click.echo(f"{torn} torn or damaged lines were left out: waxell-workers spool verify", err=True)


# -- which spool -------------------------------------------------------------------------------


def _settings(spool_dir: str | None) -> Settings:
    from ..core.config import resolve

    return resolve({"spool_dir": spool_dir})


def _roots(settings: Settings) -> list[str]:
    """Return the spools that hold something: the configured one, or whichever of the usual places do.

    Raises:
        ClickException: there is none.
    """
    from ..core.spool import candidates

    looked_at = candidates(settings)
    found = [root for root in looked_at if _destinations(root)]
    if not found:
        raise click.ClickException(f"nothing was recorded here: no spool in {', '.join(looked_at)}")
    return found


def _destinations(root: str) -> list[str]:
    from ..core.inspection import destinations

    try:
        return destinations(root)
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise click.ClickException(f"{root}: {error.strerror}") from error


def _surveys(root: str) -> Iterator[Survey]:
    from ..core.inspection import survey

    for name in _destinations(root):
        try:
            yield survey(f"{root}/{name}")
        except OSError as error:
            raise click.ClickException(f"{root}/{name}: {error.strerror}") from error


def _directory(settings: Settings, wanted: str | None) -> str:
    """Return the one directory that is meant.

    Raises:
        UsageError: it is not clear which.
    """
    found = [f"{root}/{name}" for root in _roots(settings) for name in _destinations(root)]
    if wanted is not None:
        matches = [path for path in found if os.path.basename(path).startswith(wanted)]
    elif len(found) == 1:
        matches = found
    else:
        matches = [path for path in found if os.path.basename(path) == settings.destination]
    if len(matches) == 1:
        return matches[0]
    many = "more than one destination" if matches else "no destination"
    what = f"begins with {wanted}" if wanted is not None else "belongs to these settings"
    names = ", ".join(sorted(map(os.path.basename, found)))
    raise click.UsageError(f"{many} {what}; --destination takes one of {names}")


def _moment(text: str) -> float:
    """Return the Unix time that a person means.

    Raises:
        BadParameter: it is neither an age nor a time.
    """
    age = _AGE.fullmatch(text.strip())
    if age:
        return time.time() - float(age["count"]) * _SECONDS[age["unit"]]
    try:
        moment = datetime.fromisoformat(text.strip().replace("Z", "+00:00"))
    except ValueError:
        raise click.BadParameter(
            f"{text!r} is neither an age (90s, 15m, 2h, 7d) nor an ISO 8601 time", param_hint="--since"
        ) from None
    return (moment if moment.tzinfo else moment.replace(tzinfo=timezone.utc)).timestamp()


# -- what is said ------------------------------------------------------------------------------


def _status(settings: Settings, root: str, survey: Survey) -> dict[str, Any]:
    from ..core.abandoned import last_use
    from .spool_places import limit, used

    return {
        "spool": root,
        "destination": survey.destination,
        "current": is_current(settings, survey),
        "segments": len(survey.segments),
        "bytes": survey.size,
        "records": survey.records,
        "pending": survey.pending,
        "torn": survey.torn,
        "oldest_at": survey.oldest_at,
        "ledger": survey.ledger.problem or "ok",
        "shipper_alive": survey.shipper is not None,
        "shipper_pid": survey.shipper.pid if survey.shipper else None,
        "writers_alive": len(survey.writers),
        "writer_pids": [writer.pid for writer in survey.writers],
        "quarantined": survey.quarantined,
        "unused": is_unused(settings, survey),
        "used_at": last_use(survey.directory),
        "spool_bytes": used(root),
        "spool_limit": limit(settings, root),
    }


def is_current(settings: Settings, survey: Survey) -> bool:
    """True if these are the records of the settings of this moment."""
    return settings.configured and survey.destination == settings.destination


def is_unused(settings: Settings, survey: Survey) -> bool:
    """True if records wait there, of other settings, that nobody is going to deliver."""
    return bool(
        survey.pending and not is_current(settings, survey) and not survey.writers and not survey.shipper
    )


def _verified(checked: Checked) -> Iterator[dict[str, Any]]:
    destination = os.path.basename(checked.directory)
    for segment in checked.segments:
        yield {"kind": "segment", "destination": destination, **_segment(segment)}
    cursor = checked.ledger.cursor
    yield {
        "kind": "ledger",
        "destination": destination,
        "exists": checked.ledger.exists,
        "cursor": list(cursor) if cursor else None,
        "acknowledged_above": len(checked.ledger.acknowledged),
    }
    for problem in checked.problems:
        yield {
            "kind": "problem",
            "destination": destination,
            "where": problem.where,
            "offset": problem.offset,
            "damage": problem.damage,
            "text": problem.text,
        }


def _segment(segment: SegmentReport) -> dict[str, Any]:
    return {
        "segment": segment.number,
        "bytes": segment.size,
        "version": segment.version,
        "sealed": segment.sealed,
        "records": segment.records,
        "torn": segment.torn,
        "unfinished_bytes": segment.unfinished,
    }
