"""Profiles of the Waxell platform's own command line: `~/.waxell/config`, read and never written.

A person who has logged in with it has an account's key and URL there, in a section per profile. They count
below arguments and environment. Relies on nothing; a file that cannot be read is as good as none, and nothing
that it holds is ever quoted.

Source of the format and of the choice: `config.py` and `_config_io.py` of waxell-observe 0.1.10.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, field

logger = logging.getLogger("waxell_workers")

SETTINGS = ("api_key", "api_url", "capture_content")
"""What is taken from a profile; its other lines are the platform's business."""
_TOOL = "wax"
"""The section that holds the command line's own settings, among them the active profile."""


@dataclass(frozen=True, slots=True)
class Profile:
    """One account's settings, as text."""

    name: str = ""
    """Empty if there is none."""
    values: Mapping[str, str] = field(default_factory=dict, repr=False)


def read(environ: Mapping[str, str]) -> Profile:
    """Return the profile that `WAX_PROFILE` names, else the active one, else `default`, else the first.

    A name in `WAX_PROFILE` that the file does not have gives none, with a warning: records must not go to
    another account than the one that was asked for.
    """
    path = os.path.join(environ.get("HOME") or os.path.expanduser("~"), ".waxell", "config")
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read()
    except (OSError, ValueError):  # none, not ours to read, or no text
        return Profile()
    # Only whoever has such a file pays for the import.
    import configparser

    parser = configparser.ConfigParser()
    try:
        parser.read_string(text)
        name = _choose(parser, environ)
        values = (
            {setting: parser.get(name, setting, fallback="").strip() for setting in SETTINGS} if name else {}
        )
    except configparser.Error as error:
        # Its message quotes lines of the file.
        logger.warning("%s is ignored, it cannot be read: %s", path, type(error).__name__)
        return Profile()
    return Profile(name, {setting: value for setting, value in values.items() if value})


def _choose(parser: Mapping[str, Mapping[str, str]], environ: Mapping[str, str]) -> str:
    names = [name for name in parser if name not in (_TOOL, "DEFAULT")]
    wanted = environ.get("WAX_PROFILE", "").strip()
    if wanted and wanted not in names:
        logger.warning(
            "WAX_PROFILE=%s: no such profile in ~/.waxell/config (there are: %s); none is used",
            wanted,
            ", ".join(names) or "none",
        )
        return ""
    active = parser[_TOOL].get("profile", "").strip() if _TOOL in parser else ""
    return next((name for name in (wanted, active, "default", *names) if name in names), "")
