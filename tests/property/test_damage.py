"""A segment that is cut at any byte, or in which any byte is another: at most the record hit is lost.

The segment is written by the real journal, damaged, written on by others who know nothing of it, and read by
the real reader and shipper. A record that is lost is counted as torn. A flip that leaves valid JSON cannot
be told from what was meant: then that record differs, and no other.
"""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec
import pytest

from tests.property.modelserver import ModelServer, is_made_by_shipper
from tests.property.shipping import (
    call,
    close_as_the_kernel_would,
    ended,
    forget_directory,
    forget_server,
    lost,
    model_exporter,
    new_server,
    settings_for,
    started,
    step,
    updated,
)
from tests.torture import effort, found
from waxell_workers.core.encoding import encode
from waxell_workers.core.ids import new_id
from waxell_workers.core.journal import Journal
from waxell_workers.core.reader import NewerJournal, Reader
from waxell_workers.core.records import LLMCall, Record, RunStarted
from waxell_workers.core.segments import FIRST_LINE, segment_numbers, segment_path
from waxell_workers.core.shipper import Shipper

FLIPS = (0x01, 0x80)
NEWLINE = 0x0A
VERSION_AT = FIRST_LINE.index(b"1,")
_every_flip = tuple(range(1, 256))


@dataclass
class Written:
    """A journal as its writers left it, and a copy to come back to."""

    journal: Journal
    server: ModelServer
    records: list[Record]
    image: bytes
    places: list[tuple[int, int]]
    """Where each record's JSON begins and ends; a newline stands before and after it."""

    @property
    def directory(self) -> str:
        return self.journal.directory

    def lay(self, image: bytes) -> None:
        """Put a segment with these bytes in the journal's place, as if nothing had been read yet."""
        for path in Path(self.directory).glob("*.ndjson"):
            path.unlink()
        for path in Path(self.directory).glob("shipper.db*"):
            path.unlink()
        Path(segment_path(self.directory, 1)).write_bytes(image)

    def hit_by(self, place: int) -> int | None:
        """The number of the record whose bytes, its two newlines included, hold this place."""
        for number, (begin, end) in enumerate(self.places):
            if begin - 1 <= place <= end:
                return number
        return None


def one_of_each_kind(token: int) -> list[Record]:
    run, at = new_id(), 1763000000.25
    made: list[Record] = [
        started(run, at, task_id="task"),
        call(run, new_id(), at + 1, tokens_in=12, cost_usd=0.5),
        step(run, new_id(), at + 2),
        call("", new_id(), at + 3),
        updated(run, new_id(), at + 4),
        lost("another task", new_id(), at + 5),
        ended(run, at + 6, duration_ms=6000.0),
    ]
    return [msgspec.structs.replace(record, proc=token) for record in made]


@pytest.fixture
def written(tmp_path: Path) -> Iterator[Written]:
    server = new_server()
    with model_exporter():
        journal = Journal(settings_for(server, str(tmp_path)))
        records = one_of_each_kind(journal.token())
        assert all(journal.append(encode(record)) for record in records)
        image = Path(segment_path(journal.directory, 1)).read_bytes()
        assert image.endswith(b"\n")
        bodies = [encode(record)[1:-1] for record in records]
        places = [(image.index(body), image.index(body) + len(body)) for body in bodies]
        yield Written(journal, server, records, image, places)
    forget_directory(journal.directory)
    forget_server(server)


def read(directory: str) -> tuple[dict[str, Record], int]:
    """What a reader finds: the records by id, and how many lines it counted as torn."""
    reader = Reader(directory, None, 0)
    try:
        return drain(reader), reader.torn
    finally:
        reader.close()


def drain(reader: Reader) -> dict[str, Record]:
    records: dict[str, Record] = {}
    rounds = 0
    while entries := reader.read():
        for entry in entries:
            assert entry.record is not None
            assert records.setdefault(entry.id, entry.record) == entry.record, "a repeat that differs"
        rounds += 1
        assert rounds < 100
    return records


def ship(written: Written) -> tuple[ModelServer, int]:
    """Deliver everything that is there to a server that knows nothing yet; also how many lines were torn."""
    fresh = ModelServer(url=written.server.url)
    ModelServer.here[fresh.url] = fresh
    shipper = Shipper(written.journal._settings, written.directory, stay=False)
    shipper.stop(time.monotonic() + 60.0)
    try:
        assert shipper.run(0.0)
        assert shipper.pending == 0
        assert not shipper.unreadable
        return fresh, shipper._reader.torn
    finally:
        close_as_the_kernel_would(shipper)


def sent(server: ModelServer) -> dict[str, Record]:
    """What arrived of what writers had written: a call outside any run is taken out of its new one."""
    return {
        record.id: (
            msgspec.structs.replace(record, run_id="")
            if isinstance(record, LLMCall) and _is_automatic(server, record.run_id)
            else record
        )
        for record in server.records.values()
        if not is_made_by_shipper(record)
    }


def _is_automatic(server: ModelServer, run_id: str) -> bool:
    start = server.records.get(f"{run_id}-start")
    return isinstance(start, RunStarted) and "auto_collected" in start.metadata


# --- cut ------------------------------------------------------------------------------------------------


def others_go_on(written: Written, before: Journal) -> list[Record]:
    """Two other writers append: one who had the segment open before it was cut, and one who comes now."""
    now = Journal(written.journal._settings)
    made: list[Record] = []
    for journal in (before, now, before):
        record = call("", new_id(), 1763000100.25, proc=journal.token())
        assert journal.append(encode(record)), "a record after the damage was refused"
        made.append(record)
    return made


def whole_before(written: Written, cut: int) -> list[Record]:
    """The records that lie before a cut; whatever follows brings the last one's newline along."""
    return [record for record, (_, end) in zip(written.records, written.places, strict=True) if end <= cut]


def torn_by(written: Written, cut: int) -> int:
    """1 if a cut here leaves a piece of a line."""
    lines = [(0, len(FIRST_LINE) - 1), *written.places]
    return sum(begin < cut < end for begin, end in lines)


def test_a_segment_cut_at_any_byte_loses_the_record_that_was_cut_and_no_other(written: Written) -> None:
    """Given a segment that ends at any byte, and writers who go on, what lies before the cut and what comes
    after it is read; the record that was cut is counted as torn."""
    torn = 0
    for cut in range(len(written.image) + 1):
        written.lay(written.image)
        before = Journal(written.journal._settings)
        before.token()
        os.truncate(segment_path(written.directory, 1), cut)
        after = others_go_on(written, before)
        records, counted = read(written.directory)
        assert records == {r.id: r for r in [*whole_before(written, cut), *after]}, f"cut at {cut}"
        assert counted == torn_by(written, cut), f"cut at {cut}"
        torn += counted
    assert torn > len(written.image) * 0.9
    found("cut", places=len(written.image) + 1, torn=torn)


def test_what_was_cut_is_shipped_but_for_the_record_that_was_cut(written: Written) -> None:
    """The same to the server: each record that is there arrives once, whatever the seal's byte is now."""
    stride = effort(11, 1)
    cuts = [
        *range(0, len(FIRST_LINE) + 2, effort(3, 1)),
        *range(len(FIRST_LINE) + 2, len(written.image), stride),
    ]
    for cut in cuts:
        written.lay(written.image)
        before = Journal(written.journal._settings)
        before.token()
        os.truncate(segment_path(written.directory, 1), cut)
        after = others_go_on(written, before)
        server, counted = ship(written)
        arriving = [r for r in [*whole_before(written, cut), *after] if r.id != written.records[5].id]
        assert sent(server) == {r.id: r for r in arriving}, f"cut at {cut}"
        assert server.repeats == {}, f"cut at {cut}"
        assert counted == torn_by(written, cut), f"cut at {cut}"
    found("cut and shipped", places=len(cuts))


def test_a_segment_cut_under_its_reader_is_read_again(written: Written) -> None:
    """Given a reader that has read everything when the segment is cut, all that is appended later is read."""
    for cut in range(0, len(written.image), effort(5, 1)):
        written.lay(written.image)
        before = Journal(written.journal._settings)
        before.token()
        reader = Reader(written.directory, None, 0)
        try:
            assert len(drain(reader)) == len(written.records)
            os.truncate(segment_path(written.directory, 1), cut)
            reader.follow()
            drain(reader)
            after = others_go_on(written, before)
            reader.follow()
            records = drain(reader)
        finally:
            reader.close()
        assert {r.id: r for r in after}.items() <= records.items(), f"cut at {cut}"


# --- flip -----------------------------------------------------------------------------------------------


def flips(written: Written, numbers: tuple[int, ...], masks: tuple[int, ...]) -> Iterator[tuple[int, bytes]]:
    """Each byte of some records, with the newlines around them: changed by each mask, and to a newline."""
    for number in numbers:
        begin, end = written.places[number]
        for place in range(begin - 1, end + 1):
            old = written.image[place]
            for new in dict.fromkeys([*(old ^ mask for mask in masks), NEWLINE]):
                if new != old:
                    yield place, written.image[:place] + bytes([new]) + written.image[place + 1 :]


def check_flip(written: Written, place: int, records: dict[str, Record], torn: int, unsent: str = "") -> str:
    """At most the record that was hit is missing, and then it was counted; all others are as they were."""
    hit = written.hit_by(place)
    for number, record in enumerate(written.records):
        if number != hit and record.id != unsent:
            assert records.pop(record.id, None) == record, f"record {number}, by a flip at {place}"
    assert len(records) <= 1, f"flip at {place}"
    if records or hit is None or (written.records[hit].id == unsent and not torn):
        assert torn == 0 or hit is None, f"flip at {place}: counted and read"
        return "as it was" if list(records.values()) == [hit and written.records[hit]] else "differs"
    assert 1 <= torn <= 2, f"flip at {place}: lost, and counted {torn} times"
    return "lost"


def test_a_flipped_byte_hits_one_record_and_a_lost_one_is_counted(written: Written) -> None:
    """Given any byte of three records changed, every other record is read as it was written; the one that
    was hit is read as it was, or differs, or is counted as torn."""
    outcomes = dict.fromkeys(("as it was", "differs", "lost"), 0)
    for place, image in flips(written, (0, 3, 4), effort_masks()):
        written.lay(image)
        records, torn = read(written.directory)
        outcomes[check_flip(written, place, records, torn)] += 1
    assert outcomes["lost"] > outcomes["differs"] > 0
    found("flip", places=sum(outcomes.values()), **{k.replace(" ", "_"): v for k, v in outcomes.items()})


def test_a_flipped_byte_holds_up_no_shipper(written: Written) -> None:
    """The same to the server: every other record arrives, once, and the shipper finishes its work."""
    task_lost = written.records[5].id  # never sent by itself
    stride = effort(13, 1)
    tried = 0
    for place, image in itertools.islice(flips(written, (0, 1, 6), FLIPS), 0, None, stride):
        written.lay(image)
        after = others_go_on(written, Journal(written.journal._settings))  # then a torn end counts
        server, torn = ship(written)
        records = sent(server)
        for record in after:
            assert records.pop(record.id) == record, f"flip at {place}"
        check_flip(written, place, records, torn, unsent=task_lost)
        assert server.repeats == {}
        tried += 1
    found("flip and shipped", places=tried)


def effort_masks() -> tuple[int, ...]:
    return FLIPS if effort(0, 1) == 0 else _every_flip


def test_a_flip_in_the_first_line_loses_no_record(written: Written) -> None:
    """Given any byte of the first line changed, the seal among them, every record is read and writers go on;
    a version that has become a higher one leaves everything in its place for a newer shipper."""
    newer = 0
    for place in range(len(FIRST_LINE)):
        for new in dict.fromkeys(
            [*(written.image[place] ^ mask for mask in effort_masks()), NEWLINE, ord("9")]
        ):
            if new == written.image[place]:
                continue
            written.lay(written.image[:place] + bytes([new]) + written.image[place + 1 :])
            before = Journal(written.journal._settings)
            before.token()
            after = others_go_on(written, before)
            wanted = {record.id: record for record in [*written.records, *after]}
            try:
                records, torn = read(written.directory)
            except NewerJournal:
                assert place == VERSION_AT
                assert chr(new) in "23456789"
                Path(segment_path(written.directory, 1)).write_bytes(
                    written.image
                    + Path(segment_path(written.directory, 1)).read_bytes()[len(written.image) :]
                )
                records, torn = read(written.directory)
                newer += 1
            assert records == wanted, f"{new:#x} at {place}"
            assert torn <= 2
            assert len(segment_numbers(written.directory)) <= 2
    assert newer > 0


def test_a_record_that_came_to_stand_in_the_seal_s_place_is_not_overwritten(written: Written) -> None:
    """Given a first line that was cut, what was written in the place of the seal's byte survives sealing."""
    for cut in range(len(FIRST_LINE)):
        written.lay(written.image)
        before = Journal(written.journal._settings)
        before.token()
        os.truncate(segment_path(written.directory, 1), cut)
        record = call("0" * 32, "0" * 32, 1763000100.25, text="0" * 100)
        assert before.append(encode(record))
        reader = Reader(written.directory, None, 0)
        reader.rotate()
        reader.close()
        assert read(written.directory)[0].get(record.id) == record, f"cut at {cut}"


@pytest.mark.parametrize("proc", [-7, 1 << 62, 1 << 80])
def test_a_damaged_token_is_a_dead_one(written: Written, proc: int) -> None:
    """Given a run whose start names a byte that no process can have locked, the run is shipped and ended."""
    run = new_id()
    begun = encode(started(run, 1763000000.25, proc=4242)).replace(b'"proc":4242', b'"proc":%d' % proc)
    written.lay(FIRST_LINE + begun + encode(call(run, new_id(), 1763000001.25)))
    server, torn = ship(written)
    assert torn == 0
    assert [record.run_id for record in server.records.values()] == [run] * len(server.records)
    assert len(server.records) >= 2
