"""A long outage and what comes after it: nothing lost, nothing twice, each run in order, and a flat memory.

The shipper is a real process, so that its memory is the kernel's own figure. It is judged beside a shipper
that had a small backlog, which fills the same bounded things: what a backlog's length adds is what is left.
"""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.outage import AT_ONCE, MIB, RUN_RECORDS, Counting, Spool, told
from tests.harness import await_
from tests.torture import effort, found

A_SECOND = 10
"""Records a second while the server is away."""
OUTAGE_S = effort(2_400, 86_400)
"""How long it is away, by the shipper's clock."""
PACE = effort(240, 600)
"""How much faster that clock goes than ours."""
RECORDS = A_SECOND * OUTAGE_S
SMALL = effort(12_000, 60_000)
"""A backlog that fills whatever is bounded by a count: more than the window, at length more than the ids
that are remembered, 50,000."""
MORE_BYTES = effort(16, 32) * MIB
"""What a long backlog may add to a small one's peak: those ids, and what malloc makes of large texts."""
LONGEST_WAIT_S = 15.0


@pytest.fixture
def server() -> Iterator[Counting]:
    with Counting() as server:
        yield server
        assert server.disorder == []


def small_peak(server: Counting, root: Path, size: int = 0, records: int = SMALL) -> int:
    """Return the most memory that a shipper takes for a small backlog."""
    spool = Spool(server.url, root / "small")
    spool.write(records, size)
    said = spool.drain()
    assert said["delivered"] == records
    return said["peak"]


@pytest.mark.timeout(1200)
def test_a_day_s_outage_is_made_up_for(server: Counting, tmp_path: Path) -> None:
    """Given a server that is away for a day (40 minutes in the short mode) while ten records a second are
    made, all of them arrive when it is back, once, each run's in order, out of a memory in which the
    backlog's length does not show; meanwhile it is asked all the time, at intervals that stop growing."""
    small = small_peak(server, tmp_path)
    server.mode("503")
    spool = Spool(server.url, tmp_path / "spool")
    began = time.monotonic()
    with spool.start("write", str(RECORDS), "0", str(A_SECOND * PACE)) as writer:
        assert line_of(writer) == b"begun\n"
        with spool.start("ship", str(PACE)) as shipper:
            assert json.loads(line_of(writer)) == {"written": RECORDS}
            outage_s = (time.monotonic() - began) * PACE
            attempts = server.fired["503"]
            backlog = spool.bytes
            recovery = time.monotonic()
            server.mode("healthy")
            await_(lambda: server.records >= SMALL + RECORDS, "delivery of all", 900)
            took_s = time.monotonic() - recovery
            writer.communicate()
            said = told(shipper)
    found(
        "an outage",
        **{
            "records": RECORDS,
            "backlog, MiB": backlog // MIB,
            "hours by the fake clock": f"{outage_s / 3600:.1f}",
            "attempts meanwhile": attempts,
            "repeats": server.repeats,
            "peak of a small backlog, MiB": small // MIB,
            "peak, MiB": said["peak"] // MIB,
            "records a second afterwards": int(RECORDS / took_s),
        },
    )
    assert outage_s >= OUTAGE_S * 0.99
    assert server.records == RECORDS + SMALL
    assert server.repeats == 0
    assert server.whole_runs == (RECORDS + SMALL) // RUN_RECORDS
    assert said["peak"] <= small + MORE_BYTES
    # Full jitter between 0 and 15 s: one attempt in 7.5 s on average, however long it lasts. What a slow
    # machine adds to each is multiplied by the clock's pace.
    assert outage_s / LONGEST_WAIT_S / 4 <= attempts <= outage_s / LONGEST_WAIT_S * 4
    assert spool.is_empty


def line_of(process: subprocess.Popen[bytes]) -> bytes:
    assert process.stdout is not None
    return process.stdout.readline()


@pytest.mark.timeout(1200)
def test_a_large_backlog_is_delivered_without_loading_it(server: Counting, tmp_path: Path) -> None:
    """Given a gigabyte (32 MiB in the short mode) that nobody has shipped, in one segment, a shipper delivers
    it out of the memory that 16 MiB cost."""
    size = 8_000
    spool = Spool(server.url, tmp_path / "spool")
    small = small_peak(server, tmp_path, size, 2_000)
    records = effort(4_400, 140_000)
    spool.write(records, size)
    backlog = spool.bytes
    assert backlog >= effort(32, 1_024) * MIB
    assert len(list(Path(spool.directory).glob("0*.ndjson"))) == 1
    before = server.records
    said = spool.drain()
    found(
        "a backlog",
        **{
            "MiB": backlog // MIB,
            "peak of 16 MiB, MiB": small // MIB,
            "peak, MiB": said["peak"] // MIB,
            "MiB a second": round(backlog / MIB / said["took_s"], 1),
            "MiB a second of processor time": round(backlog / MIB / said["cpu_s"], 1),
        },
    )
    assert server.records - before == records
    assert server.repeats == 0
    assert said["peak"] <= small + MORE_BYTES
    assert spool.is_empty


@pytest.mark.timeout(600)
def test_the_largest_records_cost_no_more_memory_than_others(server: Counting, tmp_path: Path) -> None:
    """Given records of a quarter of a megabyte, the shipper reads by their size, not by their number."""
    small = small_peak(server, tmp_path, 8_000, 4_000)
    spool = Spool(server.url, tmp_path / "spool")
    records = effort(300, 3_000)
    spool.write(records, 240_000)
    backlog = spool.bytes
    said = spool.drain()
    found(
        "large records",
        **{
            "MiB": backlog // MIB,
            "peak of small ones, MiB": small // MIB,
            "peak, MiB": said["peak"] // MIB,
        },
    )
    assert said["delivered"] == records
    assert said["peak"] <= small + effort(32, 48) * MIB


@pytest.mark.timeout(600)
def test_other_destinations_do_not_notice(server: Counting, tmp_path: Path) -> None:
    """Given a destination whose server is down, whose backlog has filled its share of the spool, and whose
    shipper goes on trying, another destination in the same spool records and delivers all that it makes."""
    limit = 16 * MIB
    with Counting() as dead:
        dead.mode("503")
        full, other = Spool(dead.url, tmp_path, limit), Spool(server.url, tmp_path, limit)
        assert full.write(1_000_000, 2_000)["spool_limit"] == 1
        assert limit * 3 // 4 < full.bytes <= limit * 7 // 8, "its share is filled"
        with full.start("ship", "1") as trying:
            await_(lambda: dead.fired["503"] > 1, "attempts at the dead server", 30)
            records = effort(10, 60) * AT_ONCE * RUN_RECORDS
            with other.start("write", str(records), "0", "5000") as writer:
                assert line_of(writer) == b"begun\n"
                with other.start("ship", "1") as shipper:
                    assert json.loads(line_of(writer)) == {"written": records}, "nothing was refused"
                    writer.communicate()
                    told(shipper)
            assert trying.poll() is None
            trying.terminate()
            told(trying)
        found("a full neighbour", **{"its MiB": full.bytes // MIB, "records that flowed past it": records})
        assert server.records == records
        assert server.repeats == 0
        dead.mode("healthy")
        full.drain()
        assert dead.whole_runs
        assert dead.killed, "its writer was stopped in the middle"
        assert dead.disorder == []
        assert full.is_empty
