"""The errors that this library raises, all under one root.

    WaxellWorkersError
    └── ConfigError

They are raised where a person configures the library (`init()`, the command line). Inside a worker nothing
is raised: what goes wrong there is counted (`stats()`) and logged once.
"""

from __future__ import annotations


class WaxellWorkersError(Exception):
    """The root of every error that waxell-workers raises."""


class ConfigError(WaxellWorkersError, ValueError):
    """A setting has a value that cannot be used.

    The message names the setting, the value and what is allowed; a key is never part of it.
    """

    def __init__(self, setting: str, value: object, allowed: str) -> None:
        super().__init__(f"{setting}={value!r}: {allowed}")
        self.setting = setting
        self.value = value
        self.allowed = allowed
