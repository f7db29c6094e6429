"""A user's own prices: the setting `prices`, a JSON file or a function, asked before genai-prices' list.

Used where records are delivered, never in a task. A file that is broken and a function that fails are said
once, and cost the price and nothing else: a call whose price was lost is one whose price is not known, never
one at list price. The function runs on a thread of its own, so that one that hangs does not hold up delivery.
"""

from __future__ import annotations

import importlib
import logging
import math
import os
import threading
import time
import traceback
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import lru_cache
from queue import Empty, SimpleQueue
from typing import Annotated, Any

import msgspec

from ..core import user_path
from ..core.records import LLMCall
from .counts import Counts, counts

log = logging.getLogger("waxell_workers.export")

ANSWER_S = 2.0
"""How long a function may take for one call; one that takes longer is not asked any more."""
IMPORT_S = 10.0
"""How long the import of its module may take."""
LOOK_AGAIN_S = 10.0
"""How often a file is looked at for changes, at most."""
_REMEMBERED = 10_000
"""Answers that are kept: what is sent again is not asked again."""


@dataclass(frozen=True, slots=True)
class Said:
    """An answer that stands: no list is asked after it."""

    usd: float | None
    """None if the price is not known."""


NOT_KNOWN = Said(None)
OwnPrices = Callable[[LLMCall], "Said | None"]
"""Prices a call; None leaves it to the list."""


@lru_cache(maxsize=8)
def own_prices(setting: str) -> OwnPrices:
    """Return what the setting `prices` names; the same object for the same setting, in a process.

    Args:
        setting: as `core.values` has left it: an absolute path that ends in `.json`, or `module:function`.
    """
    return PriceFile(setting) if setting.endswith(".json") else PriceFunction(setting)


_Usd = Annotated[float, msgspec.Meta(ge=0, le=1_000_000)]


class Entry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One line of a price file: US dollars for a million tokens."""

    model: str
    """A pattern (`fnmatch`) for the model that answered, or the one that was asked for."""
    input: _Usd
    provider: str = "*"
    """A pattern for the provider."""
    output: _Usd | None = None
    """None where there is no output to pay for (embeddings)."""
    cached: _Usd | None = None
    """Read from the provider's cache; as `input` unless given."""
    cache_written: _Usd | None = None
    """Written to it; as `input` unless given."""

    def is_for(self, call: LLMCall) -> bool:
        """True if this is the price of the call."""
        models = (call.response_model, call.model)
        return fnmatchcase(call.provider, self.provider) and any(
            fnmatchcase(model, self.model) for model in models if model
        )

    def usd(self, counted: Counts) -> float | None:
        """Return the price of that many tokens; None if a price that is needed is missing."""
        if counted.output and self.output is None:
            return None
        cached = self.input if self.cached is None else self.cached
        written = self.input if self.cache_written is None else self.cache_written
        whole = counted.input - counted.cached - counted.cache_written
        parts = (
            whole * self.input,
            counted.cached * cached,
            counted.cache_written * written,
            counted.output * (self.output or 0.0),
        )
        return math.fsum(parts) / 1_000_000


class PriceFile:
    """A JSON file with a list of entries, of which the first that fits counts. Read again when it changes.

    Args:
        path: absolute.
    """

    def __init__(self, path: str) -> None:
        self._path = path
        self._entries: list[Entry] | None = None
        self._seen: object = None
        self._look_at = 0.0

    def __call__(self, call: LLMCall) -> Said | None:
        """Price a call."""
        if time.monotonic() >= self._look_at:
            self._look_at = time.monotonic() + LOOK_AGAIN_S
            self._look()
        if self._entries is None:
            return NOT_KNOWN
        entry = next((entry for entry in self._entries if entry.is_for(call)), None)
        if entry is None:
            return None
        counted = counts(call)
        return NOT_KNOWN if counted is None else Said(entry.usd(counted))

    def _look(self) -> None:
        seen: object = None
        try:
            status = os.stat(self._path)
            seen = (status.st_ino, status.st_mtime_ns, status.st_size)
            if seen == self._seen:
                return
            with open(self._path, "rb") as file:
                self._entries = msgspec.json.decode(file.read(), type=list[Entry])
        except (OSError, msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            seen = seen or type(error)
            if seen != self._seen:
                left = "calls have no price" if self._entries is None else "the prices from before stay"
                log.warning("prices: %s cannot be used (%s): %s", self._path, error, left)
        self._seen = seen


_Question = tuple[LLMCall | None, "SimpleQueue[_Answer]"]


@dataclass(frozen=True, slots=True)
class _Answer:
    value: Any = None
    error: str = ""
    """Type and place of what was raised: its message might quote content."""
    imported: bool = True


class PriceFunction:
    """A user's function from an `LLMCall` to US dollars, or to None for what is left to the list.

    Args:
        target: `module:function`.
    """

    def __init__(self, target: str) -> None:
        self._target = target
        self._answers: OrderedDict[str, Said | None] = OrderedDict()
        self._said: set[str] = set()
        self._begin()

    def _begin(self) -> None:
        self._pid = os.getpid()
        self._turn = threading.Lock()
        self._questions: SimpleQueue[_Question] = SimpleQueue()
        self._thread: threading.Thread | None = None
        self._given_up = False
        self._imported = False

    def __call__(self, call: LLMCall) -> Said | None:
        """Price a call; asked once for each."""
        self._leave_parent_behind()
        with self._turn:
            if call.id in self._answers:
                return self._answers[call.id]
            said = self._judge(self._ask(call))
            self._answers[call.id] = said
            if len(self._answers) > _REMEMBERED:
                self._answers.popitem(last=False)
            return said

    def load(self) -> None:
        """Import the function now, rather than with the first call."""
        self._leave_parent_behind()
        with self._turn:
            self._ask(None)

    def _leave_parent_behind(self) -> None:
        if self._pid != os.getpid():  # neither the parent's thread nor whoever held its lock is here
            self._begin()

    def _ask(self, call: LLMCall | None) -> _Answer | None:
        """Return the answer; None if there is none, and the reason was said."""
        if self._given_up or not self._is_listening():
            return None
        answers: SimpleQueue[_Answer] = SimpleQueue()
        self._questions.put((call, answers))
        limit_s = ANSWER_S if self._imported else IMPORT_S + ANSWER_S
        try:
            answer = answers.get(timeout=limit_s)
        except Empty:
            self._give_up(f"has not answered within {limit_s:.0f} s")
            return None
        if not answer.imported:
            self._give_up(f"cannot be imported ({answer.error})")
            return None
        self._imported = True
        return answer

    def _judge(self, answer: _Answer | None) -> Said | None:
        if answer is None:
            return NOT_KNOWN
        if answer.error:
            self._say(f"raised {answer.error}: such calls have no price")
            return NOT_KNOWN
        if answer.value is None:
            return None
        usd = _dollars(answer.value)
        if usd is None:
            kind = type(answer.value).__name__
            self._say(f"returned no amount of US dollars, but {kind}: such calls have no price")
        return Said(usd)

    def _is_listening(self) -> bool:
        if self._thread is not None:
            return True
        thread = threading.Thread(
            target=_answer, args=(self._target, self._questions), name="waxell-workers-prices", daemon=True
        )
        try:
            thread.start()
        except RuntimeError:  # an ending interpreter starts no thread
            self._say("cannot be asked any more: calls have no price")
            return False
        self._thread = thread
        return True

    def _give_up(self, why: str) -> None:
        self._given_up = True
        self._say(f"{why}: it is not asked any more, and calls have no price")

    def _say(self, what: str) -> None:
        if what not in self._said and len(self._said) < 20:
            self._said.add(what)
            log.warning("prices: %s %s", self._target, what)


def _answer(target: str, questions: SimpleQueue[_Question]) -> None:
    """Answer questions, on a thread of its own: whatever the user's code raises is an answer, too."""
    try:
        function = _import(target)
    except BaseException as error:  # noqa: BLE001  SystemExit of a module that is a script
        complaint = _Answer(error=_place(error), imported=False)
        while True:
            questions.get()[1].put(complaint)
    while True:
        call, answers = questions.get()
        try:
            answers.put(_Answer(None if call is None else function(call)))
        except BaseException as error:  # noqa: BLE001  nobody else is on this thread
            answers.put(_Answer(error=_place(error)))
        del call, answers  # or the last call would stay in memory while this thread waits


def _import(target: str) -> Callable[[LLMCall], Any]:
    module, _, names = target.partition(":")
    with user_path.importable():
        found: Any = importlib.import_module(module)
    for name in names.split("."):
        found = getattr(found, name)
    if not callable(found):
        raise TypeError(f"{target} is no function")
    function: Callable[[LLMCall], Any] = found
    return function


def _dollars(value: Any) -> float | None:
    if isinstance(value, (bool, str, bytes)):
        return None
    try:
        usd = float(value)  # a Decimal, too
    except (TypeError, ValueError, OverflowError):
        return None
    return usd if math.isfinite(usd) and usd >= 0 else None


def _place(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    where = f" at {frames[-1].filename}:{frames[-1].lineno}" if frames else ""
    return f"{type(error).__name__}{where}"
