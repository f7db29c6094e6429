"""The examples of `docs/capture.md` do what the page says."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

import waxell_workers
from waxell_workers import WaxellContext
from waxell_workers.core.redaction import CONTENT
from waxell_workers.testing import record_runs

PAGE = Path(__file__).parents[2] / "docs" / "capture.md"
EXAMPLE = re.compile(r"<!-- tested by tests/docs/test_capture_page.py -->\n```python\n(.*?)```", re.DOTALL)


@pytest.fixture
def page(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Run the page's examples, in their order; return their names, and what `init` was given."""
    names: dict[str, Any] = {}
    monkeypatch.setattr(waxell_workers, "init", lambda **settings: names.update(settings=settings))
    examples = EXAMPLE.findall(PAGE.read_text())
    assert len(examples) == 2
    for example in examples:
        exec(example, names)  # what a reader copies
    return names


def work() -> None:
    """Record what the page speaks of."""
    with WaxellContext("triage", inputs={"from": "ann@example.com"}, user_id="ann") as run:
        run.record_llm_call(model="m", prompt_preview="Mail of ann@example.com")
        run.record_llm_call(model="internal-1", prompt_preview="Mail of ann@example.com")


def test_a_function_for_texts_is_one_line(page: dict[str, Any]) -> None:
    """The first example masks addresses, wherever they stand."""
    with record_runs(**page["settings"]) as runs:
        work()
    run = runs.one()
    assert run.inputs == {"from": "[email]"}
    assert [call.prompt for call in run.calls] == 2 * ["Mail of [email]"]
    assert run.user_id == "ann"


def test_a_redactor_of_ones_own(page: dict[str, Any]) -> None:
    """The second one takes the user's id and one model's texts away too."""
    with record_runs(redact=page["redact"]) as runs:
        work()
    run = runs.one()
    assert (run.user_id, run.inputs) == ("", {"from": "[email]"})
    assert [call.prompt for call in run.calls] == ["Mail of [email]", ""]
    assert set(CONTENT) >= {"run_started", "llm_call"}
