"""What all checks look at: the settings as workers of this user would have them, and the spool."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping

from ...core import config, inspection
from ...core.errors import ConfigError
from ..spool_places import Place, chosen, places
from .findings import Finding

_LONG_ENOUGH = 6
"""A shorter key is part of any word."""


class Situation:
    """Where the doctor was called, and what it has found so far."""

    def __init__(
        self,
        settings: config.Settings,
        origins: Mapping[str, str],
        *,
        problem: str = "",
        timeout_s: float = 10.0,
        send: bool = True,
    ) -> None:
        self.settings = settings
        self.origins = origins
        """Setting to where its value comes from: `argument`, a variable's name, `profile …`, `default`."""
        self.problem = problem
        """Why the settings cannot be used; the other attributes then have defaults."""
        self.timeout_s = timeout_s
        self.send = send
        self.failed: set[str] = set()
        """Areas in which a check failed."""

    @functools.cached_property
    def places(self) -> list[Place]:
        """The candidates for the spool, best first."""
        return places(self.settings)

    @property
    def root(self) -> str:
        """The spool, or an empty string if no candidate can be used."""
        place = chosen(self.places)
        return place.root if place is not None else ""

    @property
    def directory(self) -> str:
        """The directory of these settings' destination, which may not exist yet."""
        return f"{self.root}/{self.settings.destination}"

    @functools.cached_property
    def survey(self) -> inspection.Survey | None:
        """What waits for these settings' destination; None if nothing was recorded, or it cannot be read."""
        try:
            return inspection.survey(self.directory) if self.root else None
        except OSError:
            return None

    def note(self, finding: Finding) -> None:
        """Remember what a later check must know."""
        if finding.status == "fail":
            self.failed.add(finding.area)

    def without_key(self, finding: Finding) -> Finding:
        """Return a finding as it may be shown: whatever a check quotes, the key is not in it."""
        key = self.settings.api_key
        if len(key) < _LONG_ENOUGH or key not in finding.text + finding.advice:
            return finding
        return dataclasses.replace(
            finding, text=finding.text.replace(key, "…"), advice=finding.advice.replace(key, "…")
        )


def look_around(arguments: Mapping[str, str | None], *, timeout_s: float, send: bool) -> Situation:
    """Read the settings; wrong ones are a finding and no error."""
    try:
        settings, origins = config.origins(arguments)
    except ConfigError as error:
        off = config.Settings(observe=False)
        return Situation(off, {}, problem=str(error), timeout_s=timeout_s, send=False)
    return Situation(settings, origins, timeout_s=timeout_s, send=send)
