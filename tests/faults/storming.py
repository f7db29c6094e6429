"""What storms of interrupts over workers share: how one is started, and what it must not leave behind."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

from tests.faulty import FaultyServer
from waxell_workers.testing.conformance.stage import RunningWorker

APPS = Path(__file__).parent / "storms"


class Storming:
    """A framework's driver, with other words on its command line."""

    def __init__(self, driver: Any, words: dict[str, str], more: tuple[str, ...] = ()) -> None:
        self._driver, self._words, self._more = driver, words, more

    def __getattr__(self, name: str) -> Any:
        return getattr(self._driver, name)

    def command(self, *args: Any, **kwargs: Any) -> list[str]:
        """Return the framework's command line."""
        return [self._words.get(word, word) for word in self._driver.command(*args, **kwargs)] + [*self._more]


def notes(worker: RunningWorker) -> dict[str, list[str]]:
    """Return what the tasks have noted: what has happened, and to which of them."""
    found = defaultdict(list)
    for line in Path(worker.site.settings["NOTES"]).read_text().splitlines():
        word, _, task_id = line.partition(" ")
        found[word].append(task_id)
    return found


def arrived(server: FaultyServer, sent: set[str], open_at_most: int) -> bool:
    """True once each task's run has come to its end at the server, and all but so many others."""
    runs = list(server.runs.values())
    if sum(not run.ends for run in runs) > open_at_most:
        return False
    ended = {run.start.get("task_id") for run in runs if run.ends}
    return sent <= ended


def nothing_open(server: FaultyServer, sent: set[str]) -> bool:
    """True once each task's run, and every block's, has come to its end at the server."""
    return arrived(server, sent, open_at_most=0)


def states(server: FaultyServer) -> dict[str, str]:
    """Return the state in which each task's run has ended."""
    runs = [run for run in server.runs.values() if run.start.get("task_id")]
    return {str(run.start["task_id"]): run.state for run in runs}


def wrong(records: list[dict[str, object]], sent: set[str]) -> list[str]:
    """Return what is not as it should be: runs, their ends, and whose the calls are."""
    starts = {record["run_id"]: record for record in records if record["kind"] == "run_started"}
    ends = {record["run_id"] for record in records if record["kind"] == "run_ended"}
    of_tasks = [start for start in starts.values() if start.get("task_id")]
    found = [f"no end of {run_id}" for run_id in starts.keys() - ends]
    found += [f"a parent of {start['task_id']}" for start in of_tasks if start.get("parent_run_id")]
    if sorted(str(start["task_id"]) for start in of_tasks) != sorted(sent):
        found.append("not one run a task")
    for call in records:
        if call["kind"] == "llm_call":
            block = starts.get(call["run_id"], {})
            task = starts.get(block.get("parent_run_id"), {})
            if call["model"] not in (task.get("task_id"), block.get("task_id")):
                found.append(f"a call of {call['model']} elsewhere")
    return found
