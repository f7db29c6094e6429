"""Orders of events that the machine has found, or that are too rare to wait for: each replayed by its rules.

The machine's own checks are what is asserted, at the latest when it is torn down.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.property.model import Text
from tests.property.test_journal_machine import JournalMachine
from waxell_workers.core.shipper import Shipper

SHORT = Text(0)


@pytest.fixture
def machine() -> Iterator[JournalMachine]:
    machine = JournalMachine()
    try:
        yield machine
        machine.settle_and_check()
    finally:
        machine.clean()


def test_a_repeat_is_known_by_the_next_shipper(machine: JournalMachine) -> None:
    """Given a record that met the seal, and was delivered and deleted with its segment by a shipper that has
    left since, when its writer writes it again, then it is not sent again."""
    machine.write_while_the_shipper_works("after", ["rotate", "ship", "ship", "leave"], SHORT)
    machine.ship_all(3)
    assert machine.model.twice
    assert machine.server.repeats == {}


def test_a_repeat_of_what_arrived_above_the_cursor_is_known(machine: JournalMachine) -> None:
    """Given a record that arrived above the cursor under a shipper that died since, when the cursor passes it
    and its writer writes it again, then it is not sent again."""
    run = machine.start_run()
    machine.write_in_run(run, "call", SHORT)

    def work() -> None:
        machine.rotate()
        machine.ship("part of each run", 1, 1)
        machine.kill_the_shipper()
        machine.time_passes(1.1)
        machine.ship_all(3)

    machine.during_write = ("after", work)
    machine.start_run()
    machine.ship_all(3)
    assert len(machine.model.twice) == 1
    assert machine.server.repeats == {}


def test_a_journal_that_was_wiped_is_not_deleted_again(machine: JournalMachine) -> None:
    """Given a shipper far behind the first segment when all of them are deleted, the new ones, whose numbers
    are low, stay until they are delivered."""
    machine.write_outside_any_run("mini", SHORT, 1)
    for _ in range(3):
        machine.rotate()
    machine.write_outside_any_run("mini", SHORT, 1)
    machine.ship_all(3)
    assert list(machine.segments()) == [4]
    while machine.segments():
        machine.delete_a_segment(0)
    machine.the_highest_segment_stays()
    machine.time_passes(1.1)
    machine.write_outside_any_run("mini", SHORT, 1)
    machine.ship("refuses everybody", 1, 2)
    machine.the_highest_segment_stays()
    machine.nothing_promised_is_nowhere()
    assert list(machine.segments()) == [1]


def test_a_drain_reads_past_segments_without_records(machine: JournalMachine) -> None:
    """Given segments that hold nothing, and records behind them, a drain that is done has sent those."""
    machine.write_outside_any_run("mini", SHORT, 1)
    machine.ship_all(2)
    for _ in range(4):
        machine.rotate()
    machine.fork_a_writer(count=1, text=SHORT, end=True, cut=None, supervised=False)
    machine.kill_the_shipper()
    shipper = Shipper(machine.collector.settings, machine.directory, stay=False)
    shipper._wake = machine.clock  # type: ignore[assignment]
    shipper.stop(machine.clock.now + 10.0)
    assert shipper.run(0.0)
    assert shipper.pending == 0
    assert machine.model.promised <= machine.server.records.keys()


@pytest.mark.parametrize("recreated", [False, True], ids=["by itself", "by another"])
def test_a_run_after_the_wipe_is_not_taken_for_dead(machine: JournalMachine, recreated: bool) -> None:
    """Given a directory that was deleted under a writer, and made again by it or by another process, a run
    that it begins seconds later is alive for a new shipper."""
    machine.write_outside_any_run("mini", SHORT, 1)
    machine.rotate()
    machine.kill_the_shipper()
    machine.delete_the_directory()
    if recreated:
        machine.fork_a_writer(count=1, text=SHORT, end=True, cut=None, supervised=False)
        machine.write_outside_any_run("mini", SHORT, 1)  # meets the seal of a file that is gone
    machine.time_passes(61.0)
    run = machine.start_run()
    for _ in range(3):
        machine.ship_all(1)
        machine.time_passes(9.0)
    machine.end_run(run, "success")
    machine.ship_all(2)
    assert [end.state for end in machine.server.ends()[run]] == ["success"]
