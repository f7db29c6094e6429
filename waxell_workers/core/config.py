"""Settings: arguments over environment over the platform's profile over defaults, checked once, frozen.

Nothing here touches the network or another module's state, and the disk only for the profile. A wrong value
is a `ConfigError` that names the setting; a key never appears in a message or a `repr`.
"""

from __future__ import annotations

import hashlib
import ipaddress
import os
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import Any
from urllib.parse import urlsplit

from . import profiles
from .errors import ConfigError
from .values import FALSE, PARSERS, Redactor

DEFAULT_API_URL = "https://api.waxell.dev"
_PROXIES = ("HTTPS_PROXY", "https_proxy", "HTTP_PROXY", "http_proxy")

_PLATFORM_VARIABLES = {"api_key": ("WAX_API_KEY",), "api_url": ("WAX_API_URL",)}
"""The platform's other names for its two variables."""
_NOT_IN_ENVIRONMENT = frozenset({"redact"})


@dataclass(frozen=True, slots=True)
class Settings:
    """Every setting of this library. Times are in seconds, sizes in bytes."""

    api_key: str = field(default="", repr=False)
    api_url: str = ""
    observe: bool = True
    agent_name: str = ""
    flush: str = "periodic"
    flush_interval: float = 5.0
    flush_max_records: int = 512
    flush_timeout: float = 2.0
    shutdown_timeout: float = 3.0
    drain: tuple[str, ...] = ()
    """Other tracers that are flushed where we flush, and where a worker's child process ends."""
    capture: tuple[str, ...] | None = None
    """SDKs to listen to; None stands for every one that is supported, () for none."""
    exclude: tuple[str, ...] = ()
    """Patterns (`fnmatch`) of task and agent names that are not recorded."""
    propagate: str = "parent"
    """How a task is connected with what has enqueued it."""
    capture_content: bool = False
    content_limit: int = 10_000
    """How many characters of a captured call's prompt, of its response, and of all its messages are kept."""
    redact: Redactor | None = None
    prices: str = ""
    """The absolute path of a JSON file with prices, or `module:function`; for the shipper alone."""
    spool_dir: str = ""
    spool_limit: int = 0
    """0 stands for the smaller of 512 MiB and a tenth of the free space."""
    spool_max_age: float = 604_800.0
    """How long the backlog of a destination that nobody uses any more is kept; 0 for ever."""
    fsync_interval: float = 0.0
    """How often the journal is written through to the disk, against power loss; 0 for never."""
    shipper: str = "auto"
    exporter: str = "waxell"

    @property
    def configured(self) -> bool:
        """True if there is somewhere to send to: a key, or a loopback URL."""
        return self.observe and (bool(self.api_key) or is_loopback(self.api_url))

    @property
    def destination(self) -> str:
        """A short hash of exporter, URL, key and proxy: one account's data never goes to another."""
        proxies = [os.environ.get(name, "") for name in _PROXIES]
        identity = "\0".join([self.exporter, self.api_url, self.api_key, *proxies])
        return hashlib.sha256(identity.encode("utf-8", "surrogateescape")).hexdigest()[:16]


def resolve(arguments: Mapping[str, Any], environ: Mapping[str, str] | None = None) -> Settings:
    """Make settings from arguments (None means: not given), the environment, a profile, and the defaults.

    Raises:
        ConfigError: a value that cannot be used, or a platform that is not supported.
    """
    return _resolve(arguments, environ)[0]


def origins(
    arguments: Mapping[str, Any], environ: Mapping[str, str] | None = None
) -> tuple[Settings, dict[str, str]]:
    """Resolve, and tell where the value of each setting comes from.

    That is `argument`, the variable's name, `profile` with its name, or `default`.

    Raises:
        ConfigError: as `resolve`.
    """
    settings, given = _resolve(arguments, environ)
    return settings, {f.name: given.get(f.name, "default") for f in fields(Settings)}


def _resolve(
    arguments: Mapping[str, Any], environ: Mapping[str, str] | None
) -> tuple[Settings, dict[str, str]]:
    if sys.platform not in ("linux", "darwin"):
        raise ConfigError("platform", sys.platform, "waxell-workers runs on Linux and macOS")
    env = os.environ if environ is None else environ
    known = {f.name for f in fields(Settings)}
    for name, value in arguments.items():
        if name not in known:
            raise ConfigError(name, value, f"no such setting; there are {', '.join(sorted(known))}")
    profile = profiles.read(env)
    values: dict[str, Any] = {}
    origin: dict[str, str] = {}
    for name in known:
        for label, source, value in _places(name, arguments, env, profile):
            if value is not None:
                values[name] = PARSERS[name](label, value)
                origin[name] = source
                break
    if not values.get("api_url") and values.get("api_key"):
        values["api_url"] = DEFAULT_API_URL
    return Settings(**values), origin


def _places(
    name: str, arguments: Mapping[str, Any], env: Mapping[str, str], profile: profiles.Profile
) -> Iterator[tuple[str, str, Any]]:
    """Yield where a setting may be, the strongest first: its name there, the place, the value or None."""
    yield name, "argument", arguments.get(name)
    if name not in _NOT_IN_ENVIRONMENT:
        for variable in (f"WAXELL_{name.upper()}", *_PLATFORM_VARIABLES.get(name, ())):
            yield variable, variable, env.get(variable) or None
    yield f"{name} of profile {profile.name}", f"profile {profile.name}", profile.values.get(name)


def observes(environ: Mapping[str, str]) -> bool:
    """False if the environment says `WAXELL_OBSERVE=false`, in any of its spellings."""
    return environ.get("WAXELL_OBSERVE", "").strip().lower() not in FALSE


def is_loopback(url: str) -> bool:
    """True if the URL's host is this machine's loopback."""
    host = urlsplit(url).hostname or ""
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
