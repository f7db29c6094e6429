"""Every setting with where it comes from, and whether there is anywhere to send to."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterator
from dataclasses import fields
from typing import Any
from urllib.parse import urlsplit

from ...core.config import DEFAULT_API_URL, Settings, is_loopback
from .findings import Finding, Findings
from .situation import Situation

AREA = "settings"
PROXIES = ("HTTPS_PROXY", "https_proxy", "HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy")
EMPTY = {
    "agent_name": "each task's own",
    "capture": "every supported SDK",
    "exclude": "nothing",
    "spool_dir": "chosen, see below",
    "spool_limit": "chosen, see below",
}
"""What an empty value stands for."""
_CREDENTIALS = re.compile(r"^(?P<scheme>[a-z0-9+.-]+://)?.*@", re.IGNORECASE | re.DOTALL)


def check(situation: Situation) -> Findings:
    """Name the settings, and what is missing."""
    if situation.problem:
        yield Finding(AREA, "fail", situation.problem, "correct it: nothing is recorded until then")
        return
    yield from _configured(situation.settings)
    for name, value in shown(situation.settings):
        yield Finding(AREA, "info", f"{name} = {value} ({situation.origins[name]})")
    yield from _proxies()
    yield from _misspelt()


def _configured(settings: Settings) -> Findings:
    if not settings.observe:
        yield Finding(
            AREA,
            "warn",
            "everything is switched off (observe = false): nothing is recorded",
            "set WAXELL_OBSERVE=true, or remove it",
        )
    elif not settings.api_url:
        yield Finding(
            AREA,
            "fail",
            "not configured: there is neither a key nor a server on this machine; records are dropped",
            "set WAXELL_API_KEY to your account's key, or WAXELL_API_URL to a local server, such as "
            "http://127.0.0.1:4319 (waxell-workers serve); if your code calls init(…), that is not seen here",
        )
    elif not settings.configured:
        yield Finding(
            AREA,
            "fail",
            f"no key for {shown_url(settings.api_url)}: records are dropped",
            "set WAXELL_API_KEY to your account's key",
        )
    elif settings.api_key and settings.api_url.startswith("http://") and not is_loopback(settings.api_url):
        yield Finding(
            AREA,
            "warn",
            f"the key goes to {shown_url(settings.api_url)} in plain text",
            "set WAXELL_API_URL to an https:// address",
        )
    else:
        yield Finding(AREA, "ok", f"records go to {shown_url(settings.api_url)}")


def shown(settings: Settings) -> Iterator[tuple[str, str]]:
    """Yield each setting with its value as it may be shown."""
    for setting in fields(Settings):
        yield setting.name, _shown(setting.name, getattr(settings, setting.name))


def _shown(name: str, value: Any) -> str:
    if name == "api_key":
        return "set" if value else "not set"
    if name == "api_url":
        return shown_url(value) if value else f"not set; {DEFAULT_API_URL} with a key"
    if name == "redact":
        return "only init(redact=…) can set it"
    if value in ("", None, ()) or (name == "spool_limit" and not value):
        return "none" if value == () and name == "capture" else EMPTY.get(name, "not set")
    if isinstance(value, bool):
        return str(value).lower()
    return ", ".join(value) if isinstance(value, tuple) else str(value)


def shown_url(url: str) -> str:
    """Return a URL without what may be a secret: its query. Credentials are refused by the settings."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc}{parts.path}" + ("?…" if parts.query or parts.fragment else "")


def without_credentials(proxy: str) -> str:
    """Return a proxy's address without user and password."""
    return _CREDENTIALS.sub(lambda found: f"{found['scheme'] or ''}…@", proxy)


def _proxies() -> Findings:
    for name in PROXIES:
        if os.environ.get(name):
            text = f"requests go through {name}={without_credentials(os.environ[name])}"
            yield Finding(AREA, "info", f"{text}; a proxy is part of what makes a destination")
    bypassed = os.environ.get("NO_PROXY") or os.environ.get("no_proxy")
    if bypassed and any(os.environ.get(name) for name in PROXIES):
        yield Finding(AREA, "info", f"… but for NO_PROXY={bypassed}")


def _misspelt() -> Findings:
    known = [f"WAXELL_{setting.name.upper()}" for setting in fields(Settings)]
    for variable in sorted(os.environ):
        if not variable.startswith("WAXELL") or variable in known:
            continue
        for meant in difflib.get_close_matches(variable, known, n=1, cutoff=0.9):
            if not os.environ.get(meant):
                text = f"{variable} is set, and is no setting"
                yield Finding(AREA, "warn", text, f"did you mean {meant}?")
