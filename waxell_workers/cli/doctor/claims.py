"""Which versions of an SDK an instrumentor takes, as its metadata says. Neither of them is imported.

An instrumentor asks the same of itself before it patches anything, and refuses otherwise (`dependencies` of
`opentelemetry-instrumentation`): requirements of the extra `instruments` must all be met, of those of
`instruments-any` one. Where fewer versions are claimed than are known to work, `Instrumentor.requires` has
those. Packages that are absent count as met: some metadata names more than the instrumentor asks for.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, requires
from typing import TYPE_CHECKING

from ...capture.sdks import Instrumentor
from .versions import installed

if TYPE_CHECKING:
    from packaging.requirements import Requirement

_ALL = "instruments"
_ANY = "instruments-any"


def unmet(instrumentor: Instrumentor) -> tuple[str, ...]:
    """Return the requirements that are not met by what is installed, as pip takes them.

    Returns:
        Nothing if the instrumentor takes what is there, or if that cannot be told.
    """
    if instrumentor.requires:
        return tuple(one for one in instrumentor.requires if not _is_met(one))
    refused = tuple(one for one in _claimed(instrumentor, _ALL) if not _is_met(one))
    alternatives = _claimed(instrumentor, _ANY)
    is_any_met = not alternatives or any(map(_is_met, alternatives))
    return refused if refused or is_any_met else tuple(alternatives)


def _claimed(instrumentor: Instrumentor, extra: str) -> list[str]:
    if not instrumentor.distribution:
        return []
    try:
        claims = requires(instrumentor.distribution) or ()
    except PackageNotFoundError:
        return []
    found = []
    for claim in claims:
        parsed = _parse(claim)
        if parsed is None or parsed.marker is None or "extra" not in str(parsed.marker):
            continue
        if parsed.marker.evaluate({"extra": extra}):
            found.append(f"{parsed.name}{parsed.specifier}")
    return found


def _is_met(requirement: str) -> bool:
    parsed = _parse(requirement)
    number = "" if parsed is None else installed(parsed.name)
    return parsed is None or not number or parsed.specifier.contains(number)


def _parse(requirement: str) -> Requirement | None:
    """Return a requirement parsed, or None: without `packaging`, which every instrumentor brings, or if it is
    no requirement."""
    try:
        from packaging.requirements import InvalidRequirement, Requirement
    except ImportError:
        return None
    try:
        return Requirement(requirement)
    except InvalidRequirement:
        return None
