"""Greenlets of a monkey-patched process, which switch in the middle of their runs.

python greenlets.py NOTES GREENLETS
"""

from __future__ import annotations

from gevent import monkey

monkey.patch_all()

import faulthandler  # noqa: E402  after the patching
import json  # noqa: E402
import random  # noqa: E402
import sys  # noqa: E402
from collections import Counter  # noqa: E402

import gevent  # noqa: E402
import promises  # noqa: E402

import waxell_workers  # noqa: E402
from waxell_workers.core.runs import get_context  # noqa: E402

found: Counter[str] = Counter()


def call(marker: str) -> None:
    waxell_workers.record_llm_call(model=marker)
    promises.call(marker)


def switch(run: waxell_workers.WaxellContext) -> None:
    gevent.sleep(random.uniform(0, 0.01))
    found["switches"] += 1
    found["mixed"] += get_context() is not run


def record(number: int) -> None:
    """Record inside two nested runs; the marker names the run in which its call belongs."""
    with waxell_workers.WaxellContext("outer") as outer:
        promises.run(outer.run_id, "success")
        for step in range(5):
            call(f"{number}-{step}-{outer.run_id}")
            switch(outer)
        with waxell_workers.WaxellContext("inner") as inner:
            promises.run(inner.run_id, "success")
            switch(inner)
            call(f"{number}-inner-{inner.run_id}")
        switch(outer)
        if number % 10 == 0:
            flushed = bool(waxell_workers.force_flush(30))  # switches: not in the line that counts
            found["flushed"] += flushed
        switch(outer)
    found["mixed"] += get_context() is not None


def interrupted(number: int) -> None:
    """Be ended by a gevent timeout in the middle of a run."""
    try:
        with gevent.Timeout(0.005), waxell_workers.WaxellContext("timed out") as run:
            promises.run(run.run_id, "interrupted")
            call(f"{number}-timeout-{run.run_id}")
            gevent.sleep(60)
    except gevent.Timeout:
        found["timeouts"] += 1
    found["mixed"] += get_context() is not None


def main(notes: str, greenlets: int) -> None:
    faulthandler.enable()
    promises.note_to(notes)
    waxell_workers.init(capture=())
    alive = [gevent.spawn(record, number) for number in range(greenlets)]
    alive += [gevent.spawn(interrupted, number) for number in range(greenlets // 10)]
    gevent.joinall(alive, raise_error=True)
    flushed = bool(waxell_workers.force_flush(60))
    print(
        json.dumps({**found, "all flushed": flushed, "dropped": waxell_workers.stats().dropped}), flush=True
    )


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
