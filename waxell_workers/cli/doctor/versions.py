"""Which versions are installed here, and whether they are recent enough. Nothing of them is imported."""

from __future__ import annotations

import platform
import re
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, requires, version

from ..._version import __version__
from .findings import Finding, Findings
from .situation import Situation

AREA = "versions"
LOOKED_AT = (
    "celery",
    "rq",
    "dramatiq",
    "starlette",
    "fastapi",
    "openai",
    "anthropic",
    "httpx",
    "msgspec",
    "opentelemetry-api",
    "opentelemetry-sdk",
)

LARGE = ("all", "demo")
"""Extras that bring many things."""

_REQUIREMENT = re.compile(r"(?P<name>[A-Za-z0-9._-]+)(\[[^\]]*\])?\s*(?P<versions>[^;]*)(;(?P<marker>.*))?")
_LOWEST = re.compile(r">=\s*(?P<version>[0-9][0-9A-Za-z.]*)")
_EXTRA = re.compile(r"""extra\s*==\s*['"](?P<extra>[^'"]+)['"]""")


def installed(distribution: str) -> str:
    """Return a distribution's version, or an empty string."""
    try:
        return version(distribution)
    except PackageNotFoundError:
        return ""


def check(situation: Situation) -> Findings:
    """Name the versions, and what is too old."""
    python = f"Python {platform.python_version()} ({sys.executable})"
    yield Finding(AREA, "ok", f"waxell-workers {__version__}, {python}, {platform.platform(terse=True)}")
    found = {name: installed(name) for name in LOOKED_AT}
    yield Finding(AREA, "ok", ", ".join(f"{name} {number}" for name, number in found.items() if number))
    for name, lowest, extra in lowest_versions():
        number = installed(name)
        if number and _numbers(number) < _numbers(lowest):
            asked = f"waxell-workers[{extra}]" if extra else "waxell-workers"
            yield Finding(
                AREA,
                "warn",
                f"{name} {number} is older than what is supported ({lowest})",
                f'pip install --upgrade "{asked}"',
            )


def lowest_versions() -> Iterator[tuple[str, str, str]]:
    """Yield what this package requires, as its own metadata says: name, lowest version, extra."""
    lowest: dict[str, str] = {}
    extras: dict[str, list[str]] = {}
    for requirement in requires("waxell-workers") or ():
        parts = _REQUIREMENT.match(requirement)
        found = _LOWEST.search(parts["versions"]) if parts else None
        if parts is None or found is None:
            continue
        lowest.setdefault(parts["name"], found["version"])
        extra = _EXTRA.search(parts["marker"] or "")
        extras.setdefault(parts["name"], []).append(extra["extra"] if extra else "")
    for name, number in lowest.items():
        # An extra that is called like the package, or at least not one of the large ones.
        yield name, number, min(extras[name], key=lambda extra: (extra != name, extra in LARGE, extra))


def _numbers(text: str) -> tuple[int, ...]:
    """Return the release part of a version: enough to compare with the lowest that is supported."""
    release = re.match(r"[0-9]+(\.[0-9]+)*", text)
    numbers = [int(number) for number in release[0].split(".")] if release else []
    while numbers and numbers[-1] == 0:
        numbers.pop()
    return tuple(numbers)
