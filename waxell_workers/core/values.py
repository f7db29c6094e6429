"""How the value of each setting is read, from an argument or from text, or refused with a `ConfigError`.

Relies on nothing but the value itself. A key, or a URL that may hold one, never appears in a message.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable
from typing import Any
from urllib.parse import urlsplit

from .errors import ConfigError

FLUSH_POLICIES = ("periodic", "task")
PROPAGATION = ("parent", "link", "none")
"""How a task is connected with what has enqueued it; each connects less than the one before."""
SHIPPERS = ("auto", "process", "thread", "external")
EXPORTERS = {"waxell": "waxell_workers.export.waxell:WaxellExporter"}
"""Name of an exporter to `module:class`, imported by the shipper alone."""
DRAINABLE = ("openai-agents", "opentelemetry")
"""Other tracers that can be flushed with us; `waxell_workers.drain` knows how."""
_UNITS_S = {"s": 1, "m": 60, "h": 3600, "d": 86_400}
_LONGEST_S = 10 * 365 * 86_400
_FUNCTION = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*(\.[^\W\d]\w*)*")
"""`module:function`, as in entry points."""
FALSE = ("0", "false", "no", "off")

Redactor = Callable[[dict[str, Any]], dict[str, Any]]
"""From a record, as plain data, to what may be written of it."""


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
    if parts.query or parts.fragment:  # some put tokens there
        raise ConfigError(
            name, f"{text.partition('?')[0].partition('#')[0]}…", "expected a URL without a query"
        )
    if text and (parts.scheme not in ("http", "https") or not parts.hostname):
        raise ConfigError(name, "…" if "@" in text else value, allowed)
    return text


def _boolean(name: str, value: object) -> bool:
    if isinstance(value, bool):
        return value
    text = str(value).strip().lower()
    if text in ("1", "true", "yes", "on"):
        return True
    if text in FALSE:
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


def _age(name: str, value: object) -> float:
    allowed = "expected seconds, or a number with s, m, h or d, up to ten years; 0 for ever"
    text = str(value).strip()
    factor = _UNITS_S.get(text[-1:], 0)
    try:
        number = float(text[:-1]) * factor if factor else float(text)
    except ValueError:
        raise ConfigError(name, value, allowed) from None
    if isinstance(value, bool) or not 0 <= number <= _LONGEST_S:
        raise ConfigError(name, value, allowed)
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


def _names_of(*allowed: str) -> Callable[[str, object], tuple[str, ...]]:
    def parse(name: str, value: object) -> tuple[str, ...]:
        names = _names(name, value)
        for item in names:
            if item not in allowed:
                raise ConfigError(name, item, f"expected names among {', '.join(allowed)}")
        return tuple(dict.fromkeys(names))

    return parse


def _one_of(*allowed: str) -> Callable[[str, object], str]:
    def parse(name: str, value: object) -> str:
        if value not in allowed:
            raise ConfigError(name, value, f"expected one of {', '.join(allowed)}")
        return str(value)

    return parse


def _callable(name: str, value: object) -> Any:
    if not callable(value):
        raise ConfigError(name, value, "expected a function from a record (dict) to one; see redact_texts")
    return value


def _prices(name: str, value: object) -> str:
    allowed = "expected the path of a .json file, or module:function"
    if not isinstance(value, (str, os.PathLike)):
        raise ConfigError(name, value, allowed)
    text = os.fspath(value)
    if isinstance(text, bytes):
        raise ConfigError(name, value, allowed)
    text = text.strip()
    if not text or _FUNCTION.fullmatch(text):
        return text
    if not text.endswith(".json"):
        raise ConfigError(name, value, allowed)
    return _path(name, text)


PARSERS: dict[str, Callable[[str, object], Any]] = {
    "api_key": _key,
    "api_url": _url,
    "observe": _boolean,
    "agent_name": _text,
    "flush": _one_of(*FLUSH_POLICIES),
    "flush_interval": _interval,
    "flush_max_records": _count,
    "flush_timeout": _seconds,
    "shutdown_timeout": _seconds,
    "drain": _names_of(*DRAINABLE),
    "capture": _names,
    "exclude": _names,
    "propagate": _one_of(*PROPAGATION),
    "capture_content": _boolean,
    "content_limit": _count,
    "redact": _callable,
    "prices": _prices,
    "spool_dir": _path,
    "spool_limit": _size,
    "spool_max_age": _age,
    "fsync_interval": _seconds,
    "shipper": _one_of(*SHIPPERS),
    "exporter": _one_of(*EXPORTERS),
}
