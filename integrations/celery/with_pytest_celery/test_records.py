"""What waxell-workers records of a worker that pytest-celery starts, kills and restarts."""

import time

import pytest
from pytest_celery import RESULT_TIMEOUT

from waxell_workers.testing.conformance import witness as notes
from waxell_workers.testing.conformance.stage import DELIVERY_S, await_


def send(setup, name, *arguments):
    """Enqueue a task whose result is kept; the app itself keeps none."""
    return setup.app.send_task(name, arguments, ignore_result=False)


def assert_recorded(server, expected):
    """Wait until each task has the expected runs at the server: each with its state and number of calls."""
    by_id = {result.id: result for result in expected}

    def seen():
        runs = {result: [] for result in expected}
        for run in server.runs():
            if run["task_id"] in by_id:
                runs[by_id[run["task_id"]]].append((run["status"], len(run["markers"])))
        return {result: sorted(found) for result, found in runs.items()}

    deadline = time.monotonic() + DELIVERY_S
    while seen() != expected and time.monotonic() < deadline:
        time.sleep(0.1)
    assert seen() == expected


def test_each_attempt_is_a_run_with_its_calls(celery_setup, server):
    """Given tasks that succeed, fail and are retried, when done, then the server has each attempt's calls."""
    assert celery_setup.ready(ping=True, control=True)
    triage = send(celery_setup, "tasks.triage", "I was charged twice.")
    translate = send(celery_setup, "tasks.translate", "I was charged twice.", "tlh")
    update = send(celery_setup, "tasks.update_crm", "I was charged twice.")

    assert triage.get(timeout=RESULT_TIMEOUT)["ticket"] == "I was charged twice."
    with pytest.raises(ValueError, match="no desk for tlh"):
        translate.get(timeout=RESULT_TIMEOUT)
    assert "CRM note" in update.get(timeout=RESULT_TIMEOUT)
    celery_setup.worker.assert_log_exists(f"tasks.update_crm[{update.id}] retry")
    celery_setup.worker.assert_log_exists(f"tasks.update_crm[{update.id}] succeeded")
    celery_setup.worker.assert_log_does_not_exist("WorkerLostError")

    retried = [("retry", 1), ("success", 1)]
    assert_recorded(server, {triage: [("success", 1)], translate: [("error", 1)], update: retried})


def test_a_killed_worker_loses_no_call(celery_setup, server, witness):
    """Given a worker in mid-task, when killed and restarted, then each call arrives, the dead task's too."""
    assert celery_setup.ready(ping=True, control=True)
    done = [send(celery_setup, "tasks.triage", f"ticket {number}") for number in range(10)]
    cut_off = send(celery_setup, "scenarios.ask_then_sleep", "cut-off", 600)
    for result in done:
        result.get(timeout=RESULT_TIMEOUT)
    await_(lambda: notes.notes(witness, "body"), "call in mid-task")

    celery_setup.worker.kill()
    assert celery_setup.worker.container.status == "exited"
    celery_setup.worker.restart()
    assert celery_setup.ready(ping=True, control=True)
    later = send(celery_setup, "tasks.triage", "one more")
    later.get(timeout=RESULT_TIMEOUT)

    whole = {result: [("success", 1)] for result in (*done, later)}
    assert_recorded(server, {**whole, cut_off: [("killed", 1)]})
