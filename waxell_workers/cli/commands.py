"""The command `waxell-workers`. What a command works with is imported when it runs, so `--help` is quick."""

from __future__ import annotations

from typing import Any

import click

from .._version import __version__
from ..core.errors import ConfigError
from .demo import demo
from .doctor import doctor
from .runs import runs
from .serve import serve
from .ship import ship
from .spool import spool


class Commands(click.Group):
    """A group whose commands say what is wrong with a setting, without a traceback."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except ConfigError as error:
            raise click.UsageError(str(error)) from error


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="waxell-workers")
def cli() -> None:
    """See every LLM call that your background workers make.

    Data goes to stdout, messages go to stderr. WAXELL_API_URL and WAXELL_API_KEY are read from the
    environment.
    """


for command in (demo, serve, ship, runs, spool, doctor):
    cli.add_command(command)
