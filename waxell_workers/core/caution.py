"""Which record kills shippers: found by what a shipper had in hand when it died, and set aside.

Before a batch goes out its ids are noted in the ledger, in one row that the commit after it deletes. A
shipper that finds a note knows what its predecessor died with, and takes that in smaller groups, in the end
one by one. A record that was *alone* in hand at two deaths is given up, into quarantine. A shipper may also
be killed for reasons that have nothing to do with a record: so one death proves nothing, and a record that
was alone in hand once is tried again only after a while of calm, when everything else has gone.
"""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Iterable

from .ledger import Ledger
from .reader import Entry

logger = logging.getLogger("waxell_workers.shipper")

Taken = dict[str, list[Entry]]

DEATHS = 2
"""At so many deaths with it alone in hand, a record is given up."""
REASON = f"{DEATHS} shippers died at it"
_FEW = 32
"""So many go together after a first death with more than that; after one with no more, each goes alone."""
_CALM_S = 5.0


class Caution:
    """What one shipper knows of the deaths before it. Used by one thread."""

    def __init__(self, ledger: Ledger) -> None:
        """Read what the last shipper had in hand when it died, if it did.

        Raises:
            sqlite3.Error: the ledger cannot be read.
        """
        self._ledger = ledger
        self._opened_at = time.monotonic()
        found = ledger.found_in_hand()
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
        return {run_id: head for run_id, head in heads.items() if self._deaths.get(head[0].id, 0) >= DEATHS}

    def choose(self, taken: Taken, *, hurry: bool) -> Taken:
        """Return what may go out together, out of what could be sent next; each run's in order.

        Args:
            taken: the next records of each run.
            hurry: True if the time until the shipper leaves is limited.
        """
        if not self._suspects and not self._deaths:
            return taken
        clean = {run_id: list(itertools.takewhile(self._is_clean, taken[run_id])) for run_id in taken}
        if any(clean.values()):
            return {run_id: entries for run_id, entries in clean.items() if entries}
        few = self._few(taken)
        if few:
            return few
        if hurry or time.monotonic() - self._opened_at >= _CALM_S:
            return {run_id: entries[:1] for run_id, entries in itertools.islice(taken.items(), 1)}
        return {}

    def _few(self, taken: Taken) -> Taken:
        few: Taken = {}
        room = self._together
        for run_id, entries in taken.items():
            suspects = itertools.takewhile(lambda entry: entry.id in self._suspects, entries)
            if heads := list(itertools.islice(suspects, room)):
                few[run_id] = heads
                room -= len(heads)
        return few

    def _is_clean(self, entry: Entry) -> bool:
        return entry.id not in self._suspects and entry.id not in self._deaths

    def take_in_hand(self, taken: Taken) -> None:
        """Note what goes out now, so that it is known if we die of it."""
        self._ledger.take_in_hand([entry.id for entries in taken.values() for entry in entries])

    def put_down(self) -> None:
        """Note that nothing is in hand: what ends this shipper is no record's fault."""
        self._ledger.put_down()

    def survived(self, ids: Iterable[str]) -> None:
        """Forget what was held against records that have gone."""
        if not self._suspects and not self._deaths:
            return
        self._suspects.difference_update(ids)
        if gone := self._deaths.keys() & set(ids):
            self._ledger.forget_deaths(gone)
            for record_id in gone:
                del self._deaths[record_id]
