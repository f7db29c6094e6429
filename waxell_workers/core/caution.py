"""Which record kills shippers: found by what a shipper had in hand when it died, and set aside.

Before a batch goes out its ids are noted in a file, which is emptied when the batch is done, and also when
the shipper has lived on for a moment with it: who waits for a server is not dying of a record. A shipper that
finds a note takes what its predecessor died with in smaller groups, in the end one by one. A record that was
*alone* in hand at `DEATHS` deaths is given up, into quarantine. A shipper may be killed for reasons that have
nothing to do with a record: so a record that was alone in hand at one death is tried again only after a while
of calm, and after everything else.
"""

from __future__ import annotations

import itertools
import logging
import os
import threading
import time
from collections.abc import Iterable

from .ledger import Ledger
from .reader import Entry

logger = logging.getLogger("waxell_workers.shipper")

Taken = dict[str, list[Entry]]

DEATHS = 3
"""At so many deaths with it alone in hand, a record is given up."""
REASON = f"{DEATHS} shippers died at it"
_FEW = 32
"""So many go together after a death with more than that; after one with no more, each goes alone."""
_CALM_S = 5.0
_MOMENT_S = 0.5
"""How long a note stands at least; twice that at most."""


class Caution:
    """What one shipper knows of the deaths before it, and leaves for the next one. Used by one thread."""

    def __init__(self, directory: str, ledger: Ledger) -> None:
        """Read what the last shipper had in hand when it died, if it did.

        Raises:
            OSError: the note cannot be opened.
            sqlite3.Error: the ledger cannot be read.
        """
        self._ledger = ledger
        self._note = _Note(f"{directory}/in_hand")
        found = self._note.read()
        if len(found) == 1:
            ledger.count_death(found[0])
        self._note.erase()
        self._deaths = ledger.deaths()
        self._suspects = set(found).difference(self._deaths)
        self._together = _FEW if len(found) > _FEW else 1
        if found:
            logger.info("the last shipper died with %d records in hand", len(found))

    def given_up(self, taken: Taken) -> Taken:
        """Return those that are to go to quarantine, out of what could be sent next."""
        if not self._deaths:
            return {}
        heads = {run_id: entries[:1] for run_id, entries in taken.items() if entries}
        return {run_id: [head] for run_id, [head] in heads.items() if self._times(head) >= DEATHS}

    def choose(self, taken: Taken) -> Taken:
        """Return what may go out together, out of what could be sent next; each run's in order."""
        if not self._suspects and not self._deaths:
            return taken
        clean = {run_id: list(itertools.takewhile(self._is_clean, taken[run_id])) for run_id in taken}
        return {run_id: entries for run_id, entries in clean.items() if entries} or (
            self._few(taken) or self._one(taken)
        )

    def _few(self, taken: Taken) -> Taken:
        few: Taken = {}
        room = self._together
        for run_id, entries in taken.items():
            suspects = itertools.takewhile(lambda entry: entry.id in self._suspects, entries)
            if heads := list(itertools.islice(suspects, room)):
                few[run_id] = heads
                room -= len(heads)
        return few

    def _one(self, taken: Taken) -> Taken:
        calm_since = time.time() - _CALM_S
        for run_id, entries in taken.items():
            if self._deaths[entries[0].id][1] <= calm_since:
                return {run_id: entries[:1]}
        return {}

    def _is_clean(self, entry: Entry) -> bool:
        return entry.id not in self._suspects and entry.id not in self._deaths

    def _times(self, entry: Entry) -> int:
        return self._deaths.get(entry.id, (0, 0.0))[0]

    def take_in_hand(self, taken: Taken) -> None:
        """Note what goes out now, so that it is known if we die of it."""
        self._note.write([entry.id for entries in taken.values() for entry in entries])

    def put_down(self) -> None:
        """Note that nothing is in hand: it is done, or what ends this shipper is no record's fault."""
        self._note.erase()

    def survived(self, ids: Iterable[str]) -> None:
        """Forget what was held against records that have gone."""
        if not self._suspects and not self._deaths:
            return
        self._suspects.difference_update(ids)
        if gone := self._deaths.keys() & set(ids):
            self._ledger.forget_deaths(gone)
            for record_id in gone:
                del self._deaths[record_id]

    def close(self) -> None:
        """Close the note, and leave it as it is."""
        self._note.close()


class _Note:
    """The file with the ids of what is in hand, a line each; empty again after `_MOMENT_S`, by a thread."""

    def __init__(self, path: str) -> None:
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        self._lock = threading.Lock()
        self._written_at: float | None = None
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="waxell-caution", daemon=True)
        try:
            self._thread.start()
            self._watched = True
        except RuntimeError:  # at the interpreter's end no thread starts
            self._watched = False

    def read(self) -> list[str]:
        size = os.fstat(self._descriptor).st_size
        return os.pread(self._descriptor, size, 0).decode("utf-8", "replace").split("\n")[:-1]

    def write(self, ids: list[str]) -> None:
        if not self._watched:  # it would stand for as long as a server hangs
            return
        with self._lock:
            self._written_at = time.monotonic()
            try:
                os.pwrite(self._descriptor, "".join(f"{each}\n" for each in ids).encode(), 0)
            except OSError:  # the disk is full, and has other troubles
                os.ftruncate(self._descriptor, 0)

    def erase(self) -> None:
        with self._lock:
            self._written_at = None
            if self._descriptor >= 0:
                os.ftruncate(self._descriptor, 0)

    def close(self) -> None:
        self._closed.set()
        with self._lock:
            os.close(self._descriptor)
            self._descriptor = -1

    def _watch(self) -> None:
        while not self._closed.wait(_MOMENT_S):
            if self._written_at is not None and time.monotonic() - self._written_at >= _MOMENT_S:
                self.erase()
