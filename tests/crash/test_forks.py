"""Torture: a parent forks thousands of times while its threads record, ship and flush, or closes everything.

What a program was told is safe is at the server once, however its process came to its end; no id comes twice,
no child closes its parent's runs, none hangs, and nobody else's descriptor is ever written to.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.crash.stage import Stage, await_a_look_at_who_lives, finish, read_report
from tests.faulty import FaultyServer
from tests.torture import effort, found

FORKS = effort(500, 10_000)


@pytest.fixture
def stage(tmp_path: Path) -> Iterator[Stage]:
    with FaultyServer(ingest=True) as server:
        yield Stage(server, tmp_path, {})


@pytest.mark.timeout(effort(400, 3600))
@pytest.mark.parametrize("shipper", ["thread", "process"])
def test_a_parent_that_forks_loses_doubles_and_hangs_nothing(stage: Stage, shipper: str) -> None:
    """Given forks at any instant of recording, shipping and flushing, when the children leave by `os._exit`,
    normally or by SIGKILL, then every record arrives once, and each run ends as its own process ended it."""
    stage.settings["WAXELL_SHIPPER"] = shipper
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    told = stage.run("forker", FORKS, seed, deadline_s=effort(200, 3000))
    noted = stage.promises()
    found(f"forks, shipper {shipper}", forks=FORKS, calls=len(noted.calls), runs=len(noted.runs))
    assert (told["failed"], told["hung"], told["dropped"], told["flushed"]) == ([], 0, {}, True)
    assert sum(told["kinds"].values()) == FORKS
    assert len(told["kinds"]) == 7
    before, after = told["descriptors"]
    assert after <= before + 2, "descriptors leak"
    stage.assert_promises_kept(calls=2 * FORKS)


@pytest.mark.parametrize("where", ["parent", "child"])
@pytest.mark.parametrize("reused", [True, False], ids=["reused", "closed"])
def test_closed_descriptors_cost_no_record_and_no_stranger(stage: Stage, where: str, reused: bool) -> None:
    """Given a process that closes all descriptors in mid-run, when sockets and files take their numbers, then
    none of these is touched, everything is recorded, and the open run is not taken for a dead one's."""
    stage.settings["WAXELL_SHIPPER"] = "external"
    with stage.start("shipping"), stage.start("closer", stage.notes, where, int(reused)) as closer:
        told = read_report(closer)
        found(
            f"descriptors {'reused' if reused else 'closed'} in the {where}",
            strangers=told["strangers"],
            touched=len(told["touched"]),
        )
        assert told["touched"] == []
        assert told["strangers"] >= 3 or not reused
        assert (told["flushed"], told["dropped"]) == (True, {})
        await_a_look_at_who_lives(stage)
        assert sum(record.get("state") == "killed" for record in stage.ends()) == 1, (
            "the witness alone is dead"
        )
        finish(closer)
    stage.assert_promises_kept(calls=23)
