"""Whether the server can be reached, is the right one, and takes the key: as the shipper would ask it."""

from __future__ import annotations

import socket
import threading
import time
import urllib.request
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar
from urllib.parse import urlsplit

from .findings import Finding, Findings
from .settings import shown_url
from .situation import Situation

if TYPE_CHECKING:
    from ...export.answers import Answer

AREA = "server"
SLOW_MS = 1000.0
_T = TypeVar("_T")


def check(situation: Situation) -> Findings:
    """Resolve, connect, ask for `config/`; stop at what fails."""
    if not situation.settings.configured:
        return
    url = situation.settings.api_url
    if _proxied(url):
        yield Finding(AREA, "info", "asked through a proxy: name and port are not looked at from here")
    else:
        found = [*_resolve(url, situation.timeout_s)]
        yield from found
        if any(finding.status == "fail" for finding in found):
            return
    yield from _ask(situation)


def _proxied(url: str) -> bool:
    parts = urlsplit(url)
    proxies = urllib.request.getproxies()
    host = parts.hostname or ""
    return ("all" in proxies or parts.scheme in proxies) and not urllib.request.proxy_bypass(host)


def _resolve(url: str, timeout_s: float) -> Findings:
    parts = urlsplit(url)
    host, port = parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80)
    look_up = _in_time(lambda: socket.getaddrinfo(host, port, type=socket.SOCK_STREAM), timeout_s)
    if isinstance(look_up, TimeoutError):
        yield _failed(f"{host} was not resolved within {timeout_s:g} s", "see the name servers")
        return
    if isinstance(look_up, Exception):
        yield _failed(f"{host} is not known here ({look_up})", "correct WAXELL_API_URL, or the name servers")
        return
    addresses = list(dict.fromkeys(str(entry[4][0]) for entry in look_up))
    began = time.monotonic()
    try:
        socket.create_connection((host, port), timeout=timeout_s).close()
    except TimeoutError:
        text = f"{host}:{port} ({', '.join(addresses)}) does not answer within {timeout_s:g} s"
        yield _failed(text, "a firewall, or a wrong address; if the way out is a proxy, set HTTPS_PROXY")
    except OSError as error:
        text = f"nobody takes a connection at {host}:{port} ({error.strerror or error})"
        yield _failed(text, "start the server, or correct WAXELL_API_URL")
    else:
        took_ms = (time.monotonic() - began) * 1000
        yield Finding(AREA, "ok", f"{host}:{port} ({addresses[0]}) takes connections, in {took_ms:.0f} ms")


def _in_time(question: Callable[[], _T], timeout_s: float) -> _T | Exception:
    """Ask what cannot be interrupted; a `TimeoutError` is returned, as is what it raised."""
    answers: list[_T | Exception] = []

    def ask() -> None:
        try:
            answers.append(question())
        except Exception as error:  # noqa: BLE001  handed on
            answers.append(error)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(timeout_s)
    return answers[0] if answers else TimeoutError()


def _ask(situation: Situation) -> Findings:
    from ...export.transport import Transport
    from ...export.waxell import CONFIG

    settings, timeout_s = situation.settings, situation.timeout_s
    try:
        transport = Transport(settings.api_url, settings.api_key, 1)
    except Exception as error:  # noqa: BLE001  httpx raises many kinds for a proxy that it cannot use
        yield _failed(
            f"the proxy or certificate settings cannot be used ({type(error).__name__})",
            "correct HTTPS_PROXY, HTTP_PROXY, ALL_PROXY, SSL_CERT_FILE or SSL_CERT_DIR",
        )
        return
    began = time.monotonic()
    # The transport keeps to its deadline but where a name server or headers hang.
    answer = _in_time(lambda: transport.get("config", CONFIG, began + timeout_s), timeout_s + 1)
    took_ms = (time.monotonic() - began) * 1000
    if isinstance(answer, Exception):
        transport.abort()
        if not isinstance(answer, TimeoutError):
            yield _failed(f"the request failed ({type(answer).__name__})", "please report this")
            return
        yield _hangs(situation)
        return
    transport.close()
    yield from _told(situation, answer, took_ms)


def _told(situation: Situation, answer: Answer, took_ms: float) -> Findings:
    key = situation.settings.api_key
    answered = 200 <= answer.status < 300
    if answered and answer.body is not None:
        yield from _well(answer, took_ms)
    elif answer.status in (401, 403):
        yield _failed(
            f"the server refuses {'this key' if key else 'requests without a key'} ({answer.status})",
            "set WAXELL_API_KEY to a key of this server; everything recorded so far is kept",
        )
    elif answer.status == 402:
        yield _failed("the account is not paid for (402)", "see the account; everything recorded is kept")
    elif answer.status == 407:
        yield _failed(
            "the proxy wants a password (407)", "put it into HTTPS_PROXY: http://user:password@host"
        )
    elif 300 <= answer.status < 400:
        yield _failed(
            f"the server sends elsewhere (redirect, {answer.status}), where the key does not go",
            "set WAXELL_API_URL to the final address; often https:// instead of http://",
        )
    elif answer.status in (404, 405, 410):
        yield _failed(
            f"this is not a Waxell server: no /api/v1/observe/config/ below "
            f"{shown_url(situation.settings.api_url)} ({answer.status})",
            "correct WAXELL_API_URL: scheme, host and port, as a rule without a path",
        )
    elif answered and "," not in answer.reason:  # else the reply did not come to its end
        yield _failed(
            "the server answers with something that is no JSON",
            "a login page of the network, a proxy, or a wrong WAXELL_API_URL",
        )
    elif answer.status and not answered:
        yield _failed(f"the server is in trouble ({answer.status})", "try again; everything recorded is kept")
    elif "SSL" in answer.reason or "Certificate" in answer.reason:
        yield _failed(
            f"the server's certificate is not trusted, or it does not speak TLS ({answer.reason})",
            "correct WAXELL_API_URL (https:// or http://?), or name your CA in SSL_CERT_FILE",
        )
    elif "Connect" in answer.reason and _proxied(situation.settings.api_url):
        yield _failed(f"the proxy cannot be reached ({answer.reason})", "correct HTTPS_PROXY or HTTP_PROXY")
    elif "Timeout" in answer.reason or took_ms >= situation.timeout_s * 1000:
        yield _hangs(situation)
    else:
        yield _failed(
            f"the server broke off ({answer.reason})",
            "correct WAXELL_API_URL (https:// or http://?), or look at the proxies on the way",
        )


def _well(answer: Answer, took_ms: float) -> Findings:
    text = f"the server answers in {took_ms:.0f} ms"
    if took_ms > SLOW_MS:
        yield Finding(AREA, "warn", text, "slow: WAXELL_FLUSH=task would have tasks wait for it")
    else:
        yield Finding(AREA, "ok", text)
    if (answer.body or {}).get("ingest_endpoint"):
        yield Finding(AREA, "ok", "it takes whole batches (ingest): each record arrives exactly once")
    else:
        yield Finding(
            AREA, "info", "no ingest, so runs go by REST: a request of unknown outcome may be repeated"
        )


def _hangs(situation: Situation) -> Finding:
    return _failed(
        f"the server took the request and did not answer within {situation.timeout_s:g} s",
        "see whether the server works, or the proxies before it; everything recorded is kept",
    )


def _failed(text: str, advice: str) -> Finding:
    return Finding(AREA, "fail", text, advice)
