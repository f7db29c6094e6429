"""Many threads, all of whose first records come at the same moment.

    python crowd.py NOTES THREADS ROUNDS FLUSH_S

Reports after the first round, each thread's run being open, then waits for a line on stdin; reports again at
the end. What was recorded and what was refused must add up to what was tried.
"""

from __future__ import annotations

import faulthandler
import json
import sys
import threading

import promises

import waxell_workers


class Crowd:
    """The threads, which begin together, and go on together after the report."""

    def __init__(self, threads: int, rounds: int) -> None:
        self.rounds = rounds
        self.begun = threading.Barrier(threads)
        self.waiting = threading.Barrier(threads + 1)
        self.going_on = threading.Barrier(threads + 1)
        self.threads = [threading.Thread(target=self.record, args=(number,)) for number in range(threads)]

    def record(self, thread: int) -> None:
        self.begun.wait()
        with waxell_workers.WaxellContext("thread") as run:
            promises.run(run.run_id, "success")
            self.waiting.wait()
            self.going_on.wait()
            for number in range(self.rounds):
                waxell_workers.record_llm_call(model=f"{thread}-{number}", response_preview="y" * 400)
                promises.call(f"{thread}-{number}")


def main(notes: str, threads: int, rounds: int, flush_s: float) -> None:
    faulthandler.enable()
    promises.note_to(notes)
    waxell_workers.init(capture=())
    sys.setswitchinterval(1e-6)
    crowd = Crowd(threads, rounds)
    for thread in crowd.threads:
        thread.start()
    crowd.waiting.wait()
    print(json.dumps({"flushed": bool(waxell_workers.force_flush(flush_s))}), flush=True)
    sys.stdin.readline()
    crowd.going_on.wait()
    for thread in crowd.threads:
        thread.join()
    flushed = bool(waxell_workers.force_flush(flush_s))
    stats = waxell_workers.stats()
    report = {"flushed": flushed, "recorded": stats.recorded, "dropped": stats.dropped}
    print(json.dumps(report), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4]))
