"""What the tasks of a storm share: the work, which is nothing but recording, and notes for the test."""

import os
import sys
import threading
import time

import waxell_workers
from waxell_workers import WaxellContext, get_context, record_llm_call

OURS = os.path.dirname(waxell_workers.__file__) + os.sep
APPS = os.path.dirname(__file__) + os.sep


def note(word, task_id):
    """Leave a line: what has happened, to which task; one write, so that processes may note at once."""
    descriptor = os.open(os.environ["NOTES"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    try:
        os.write(descriptor, f"{word} {task_id}\n".encode())
    finally:
        os.close(descriptor)


def place(error):
    """Return `inside` if an exception surfaced in our code, or in what that called; else `outside`."""
    files = []
    trace = error.__traceback__
    while trace is not None:
        files.append(trace.tb_frame.f_code.co_filename)
        trace = trace.tb_next
    files = [file for file in files if not file.endswith("timeouts.py")]  # RQ's signal handler
    in_task = [number for number, file in enumerate(files) if file.startswith(APPS)]
    if not in_task:  # it has not come so far, or is back
        return "inside" if files[-1].startswith(OURS) else "outside"
    beyond = files[in_task[0] :]
    return "inside" if any(file.startswith(OURS) for file in beyond) else "outside"


def redact(text):
    """Redact nothing, but let the next greenlet have its turn, where there are any."""
    time.sleep(0)
    return text


def when_waiting(thread, strike):
    """Do something to a thread while it waits in a flush, as soon as the test says so, from another one."""

    def watch():
        while not os.path.exists(os.environ["STRIKE"]) or "request_flush" not in _functions(thread):
            time.sleep(0.01)
        strike()

    threading.Thread(target=watch, daemon=True).start()


def _functions(thread):
    frame = sys._current_frames().get(thread)
    while frame is not None:
        if frame.f_code.co_filename.startswith(OURS):
            yield frame.f_code.co_name
        frame = frame.f_back


def record(task_id, seconds, expected, between=lambda: None):
    """Record without a pause; note how that ended, and make sure that the handler is in the task's run.

    Args:
        task_id: whose calls these are.
        seconds: the longest that it may take.
        expected: the interrupt.
        between: done after each call.
    """
    run, until, calls = get_context(), time.monotonic() + seconds, 0
    try:
        while time.monotonic() < until:
            with WaxellContext("block", inputs={"question": "Is it raining?"}) as block:
                record_llm_call(model=task_id)
                calls += 1
                block.set_result({"answer": "no"})
            between()
    except expected as error:
        note(f"task-{place(error)}", task_id)
        note(f"calls-{calls}", task_id)
        if get_context() is not run:
            note("lost", task_id)
        raise
    note(f"calls-{calls}", task_id)
    note("ended", task_id)
