"""Settings: arguments over environment over defaults, checked once, frozen.

Nothing here touches the disk, the network or another module's state. A wrong value is a `ConfigError`
that names the setting; a key never appears in a message or a `repr`.
"""

from __future__ import annotations

import hashlib
import ipaddress
import os
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any
from urllib.parse import urlsplit

from .errors import ConfigError

DEFAULT_API_URL = "https://api.waxell.dev"
FLUSH_POLICIES = ("periodic", "task")
SHIPPERS = ("auto", "process", "thread", "external")
EXPORTERS = {"waxell": "waxell_workers.export.waxell:WaxellExporter"}
"""Name of an exporter to `module:class`, imported by the shipper alone."""

_PROXIES = ("HTTPS_PROXY", "https_proxy", "HTTP_PROXY", "http_proxy")

Redactor = Callable[[str], str]


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
    capture: tuple[str, ...] | None = None
    """SDKs to listen to; None stands for every one that is supported, () for none."""
    exclude: tuple[str, ...] = ()
    """Patterns (`fnmatch`) of task and agent names that are not recorded."""
    capture_content: bool = False
    redact: Redactor | None = None
    spool_dir: str = ""
    spool_limit: int = 0
    """0 stands for the smaller of 512 MiB and a tenth of the free space."""
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
    """Make settings from arguments (None means: not given), the environment, and the defaults.

    Raises:
        ConfigError: a value that cannot be used, or a platform that is not supported.
    """
    if sys.platform not in ("linux", "darwin"):
        raise ConfigError("platform", sys.platform, "waxell-workers runs on Linux and macOS")
    env = os.environ if environ is None else environ
    known = {f.name: f for f in fields(Settings)}
    values: dict[str, Any] = {}
    for name, value in arguments.items():
        if name not in known:
            raise ConfigError(name, value, f"no such setting; there are {', '.join(sorted(known))}")
        if value is not None:
            values[name] = _PARSERS[name](name, value)
    for name in known:
        variable = f"WAXELL_{name.upper()}"
        if name not in values and variable in env and name not in _NOT_IN_ENVIRONMENT and env[variable] != "":
            values[name] = _PARSERS[name](variable, env[variable])
    if not values.get("api_url") and values.get("api_key"):
        values["api_url"] = DEFAULT_API_URL
    return Settings(**values)


def observes(environ: Mapping[str, str]) -> bool:
    """False if the environment says `WAXELL_OBSERVE=false`, in any of its spellings."""
    return environ.get("WAXELL_OBSERVE", "").strip().lower() not in _FALSE


def is_loopback(url: str) -> bool:
    """True if the URL's host is this machine's loopback."""
    host = urlsplit(url).hostname or ""
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _text(name: str, value: object) -> str:
    if not isinstance(value, str):
        raise ConfigError(name, value, "expected a string")
    return value.strip()


def _path(name: str, value: object) -> str:
    text = _text(name, value)
    return os.path.abspath(os.path.expanduser(text)) if text else ""


def _key(name: str, value: object) -> str:
    if not isinstance(value, str) or not value.strip().isascii() or not value.strip().isprintable():
        raise ConfigError(name, "…", "expected a printable ASCII string")
    return value.strip()


def _url(name: str, value: object) -> str:
    allowed = "expected an http:// or https:// URL with a host"
    text = _text(name, value).rstrip("/")
    try:
        parts = urlsplit(text)
        parts.port  # noqa: B018  a property that raises on a bad port
    except ValueError:
        raise ConfigError(name, "…" if "@" in text else value, allowed) from None
    if parts.username or parts.password or "@" in parts.netloc:
        raise ConfigError(name, f"{parts.scheme}://…@{parts.hostname}", "expected a URL without credentials")
    if text and (parts.scheme not in ("http", "https") or not parts.hostname):
        raise ConfigError(name, value, allowed)
    return text


def _boolean(name: str, value: object) -> bool:
    if isinstance(value, bool):
        return value
    text = str(value).strip().lower()
    if text in ("1", "true", "yes", "on"):
        return True
    if text in _FALSE:
        return False
    raise ConfigError(name, value, "expected true or false")


def _seconds(name: str, value: object) -> float:
    allowed = "expected a number of seconds from 0 to 3600"
    if isinstance(value, bool):
        raise ConfigError(name, value, allowed)
    try:
        number = float(value)  # type: ignore[arg-type]  # anything that float() refuses is refused here
    except (TypeError, ValueError):
        raise ConfigError(name, value, allowed) from None
    if not 0 <= number <= 3600:
        raise ConfigError(name, value, allowed)
    return number


def _interval(name: str, value: object) -> float:
    number = _seconds(name, value)
    if number <= 0:
        raise ConfigError(name, value, "expected a number of seconds above 0, at most 3600")
    return number


def _count(name: str, value: object) -> int:
    allowed = "expected a whole number from 1 to 100000"
    try:
        number = int(value)  # type: ignore[call-overload]  # anything that int() refuses is refused here
    except (TypeError, ValueError):
        raise ConfigError(name, value, allowed) from None
    if isinstance(value, (bool, float)) or not 1 <= number <= 100_000:
        raise ConfigError(name, value, allowed)
    return int(number)


def _size(name: str, value: object) -> int:
    allowed = "expected a size: bytes, or a number with KiB, MiB or GiB; at least 1 MiB"
    text = str(value).strip()
    factor = 1
    for suffix, power in (("KiB", 10), ("MiB", 20), ("GiB", 30)):
        if text.endswith(suffix):
            text, factor = text[: -len(suffix)].strip(), 1 << power
    if isinstance(value, bool) or not text.isdecimal() or int(text) * factor < 1 << 20:
        raise ConfigError(name, value, allowed)
    return int(text) * factor


def _names(name: str, value: object) -> tuple[str, ...]:
    items: Iterable[object] = value.split(",") if isinstance(value, str) else value  # type: ignore[assignment]
    try:
        names = [_text(name, item) for item in items]
    except TypeError:
        raise ConfigError(name, value, "expected names, as a list or separated by commas") from None
    return tuple(item for item in names if item)


def _one_of(*allowed: str) -> Callable[[str, object], str]:
    def parse(name: str, value: object) -> str:
        if value not in allowed:
            raise ConfigError(name, value, f"expected one of {', '.join(allowed)}")
        return str(value)

    return parse


def _callable(name: str, value: object) -> Any:
    if not callable(value):
        raise ConfigError(name, value, "expected a function from str to str")
    return value


_FALSE = ("0", "false", "no", "off")
_NOT_IN_ENVIRONMENT = frozenset({"redact"})
_PARSERS: dict[str, Callable[[str, object], Any]] = {
    "api_key": _key,
    "api_url": _url,
    "observe": _boolean,
    "agent_name": _text,
    "flush": _one_of(*FLUSH_POLICIES),
    "flush_interval": _interval,
    "flush_max_records": _count,
    "flush_timeout": _seconds,
    "shutdown_timeout": _seconds,
    "capture": _names,
    "exclude": _names,
    "capture_content": _boolean,
    "redact": _callable,
    "spool_dir": _path,
    "spool_limit": _size,
    "shipper": _one_of(*SHIPPERS),
    "exporter": _one_of(*EXPORTERS),
}
