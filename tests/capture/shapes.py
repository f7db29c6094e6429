"""The table of shapes, read: each row for each client, and how it is made.

Run as a program, it makes calls that nobody hears: what their callers see is what callers must see.

    python -m tests.capture.shapes <origin>

reads a line of `<row's id> <call>` at a time, and prints what the caller saw as a line of JSON.
"""

from __future__ import annotations

import importlib
import json
import socket
import sys
from dataclasses import dataclass
from functools import cache
from importlib import metadata, util
from pathlib import Path
from types import ModuleType
from typing import Any

from .calling import Caller, outcome

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pytest needs it there

TABLE = Path(__file__).with_name("shapes.toml")
TIMEOUT_S = 0.5
"""Of a client, for a server that does not answer; any other waits long."""
LONG_S = 60
PACKAGES = {"openai": ("openai", "openai"), "anthropic": ("anthropic", "anthropic")}
PACKAGES["gemini"] = ("google.genai", "google-genai")
"""The SDK's module and its distribution, by our name for it."""
TOKENS = {
    "in": "tokens_in",
    "out": "tokens_out",
    "cached": "tokens_cached",
    "written": "tokens_cache_written",
    "reasoning": "tokens_reasoning",
}


@dataclass(frozen=True)
class Row:
    """A row of the table, for one client."""

    api: dict[str, Any]
    says: dict[str, Any]
    is_async: bool

    @property
    def id(self) -> str:
        """The name of the row, in the names of tests too."""
        cancelled = ["cancelled"] if self.is_cancelled else []
        client = "async" if self.is_async else "sync"
        return "-".join([self.api["sdk"], self.says["how"], self.model, *cancelled, client])

    @property
    def model(self) -> str:
        """The name of the model that is asked."""
        return str(self.says.get("model", "plain"))

    @property
    def is_cancelled(self) -> bool:
        """Whether the caller cancels the call."""
        return bool(self.says.get("cancelled"))

    @property
    def requests(self) -> int:
        """How many requests reach the server."""
        return int(self.says.get("requests", 1))

    @property
    def missing(self) -> str:
        """Why the row cannot be made here; empty if it can."""
        module, distribution = PACKAGES[self.api["sdk"]]
        try:
            found = util.find_spec(module)
        except ModuleNotFoundError:
            found = None
        if found is None:
            return f"{distribution} is not installed"
        since = self.says.get("since", self.api.get("since", "0"))
        has = metadata.version(distribution)
        return f"{distribution} {has} has no such call" if _numbers(has) < _numbers(since) else ""

    @property
    def is_whole_text(self) -> bool:
        """Whether an answer that is heard whole says what it always says, or asks for the tool."""
        special = {"calls", "each", "error", "seen"} & self.says.keys()
        is_text = self.api["operation"] != "embeddings" and self.model not in ("refusal", "blocked")
        return is_text and not special and not self.says["how"].startswith("automatic")

    def expected(self) -> list[dict[str, Any]]:
        """Return what must be heard: of each call the fields that the table settles."""
        if "calls" in self.says:
            assert self.says["calls"] == 0
            return []
        return [self._expected({**self.says, **differs}) for differs in self.says.get("each", [{}])]

    def _expected(self, says: dict[str, Any]) -> dict[str, Any]:
        error = says.get("error", "")
        seen = says.get("seen", "nothing" if error else "whole")
        streamed = says.get("streamed", False)
        tokens = says.get("tokens", self.api["all"] if seen == "whole" else {})
        answered = seen != "nothing"
        identified = seen == "whole" if "response_id_comes" in self.api else answered
        left = streamed and seen != "whole" and not error
        return {
            "model": self.model,
            "response_model": f"{self.model}-2026-01-01" if answered and self._names_its_model else "",
            "response_id": self.api["response_id"] if identified else "",
            "provider": says.get("provider", self.api["provider"]),
            "operation": self.api["operation"],
            **{field: tokens.get(kind) for kind, field in TOKENS.items()},
            "status": "error" if error else "ok",
            "error_type": error,
            "finish_reason": says.get("finish", self.api["finish"]) if seen == "whole" else "",
            "streamed": streamed,
            "ttft is known": says.get("ttft", streamed and answered),
            "tools": says.get("tools", []),
            "metadata": {"stream": "left early"} if left else {},
        }

    @property
    def _names_its_model(self) -> bool:
        return bool(self.api.get("response_model", True))


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:3] if part.isdigit())


@cache
def rows() -> dict[str, Row]:
    """Return the table by the rows' ids."""
    table = tomllib.loads(TABLE.read_text("utf-8"))
    found = [
        Row(api, says, client == "async")
        for api in table.values()
        for says in api["rows"]
        for client in ("sync", "async")
        if says.get("clients", client) == client
    ]
    by_id = {row.id: row for row in found}
    assert len(by_id) == len(found), "two rows of the table have one name"
    return by_id


def module_of(row: Row) -> ModuleType:
    """Return the module with the row's shape; this imports the SDK."""
    return importlib.import_module(f"tests.capture.{row.api['sdk']}_shapes")


def make(row: Row, origin: str, call: str) -> Any:
    """Make a row's call, and return what its caller saw.

    Arguments:
        origin: where the providers' stand-in listens.
        call: names the call to the server.
    """
    module = module_of(row)
    waits_in_vain = row.model in ("hang", "stall") and not row.is_cancelled
    with socket.socket() as refusing:
        refusing.bind(("127.0.0.1", 0))  # and does not listen
        if row.model == "refused":
            origin = f"http://127.0.0.1:{refusing.getsockname()[1]}"
        client = module.make_client(
            origin,
            call,
            row.model,
            is_async=row.is_async,
            timeout_s=TIMEOUT_S if waits_in_vain else LONG_S,
            retries=1 if row.model.startswith("once") else 0,
        )
        caller = Caller(client, row.model, row.is_async, module.closables(client))
        saw = outcome(getattr(module, row.says["how"]), caller, is_cancelled=row.is_cancelled)
    return json.loads(json.dumps(saw))


def main() -> None:
    """Make the calls that stdin names."""
    (origin,) = sys.argv[1:]
    for line in sys.stdin:
        row, call = line.split()
        print(json.dumps(make(rows()[row], origin, call)), flush=True)


if __name__ == "__main__":
    main()
