"""The benchmark of capture measures what it says: each call heard, content only where it is wanted."""

from __future__ import annotations

import pytest

from tests.benchmarks import capture
from tests.benchmarks.recording import Spread

CALLS = 3
SMALL = [case for case, (_, size) in capture.CASES.items() if size == 2]


@pytest.mark.parametrize("name", capture.CONTENDERS)
def test_every_call_is_heard_or_none(name):
    """Each contender makes every kind of call, and checks by what it has received that it heard them all."""
    samples = capture.measure_apart(name, SMALL, CALLS)
    assert list(samples) == SMALL
    assert all(sample.typical_us > 0 and sample.cpu_us > 0 for sample in samples.values())


def test_a_contender_that_does_less_than_it_says_is_no_measurement(monkeypatch):
    """Content that is asked for in vain would be cheap: the benchmark ends."""
    monkeypatch.setitem(capture.ENVIRON, capture.OTEL_CONTENT, {})
    with pytest.raises(SystemExit, match="OpenTelemetry, content failed"):
        capture.measure_apart(capture.OTEL_CONTENT, SMALL[:1], CALLS)


def test_what_is_added_is_taken_within_a_round():
    """A round in which the machine was slow changes what is added by as much as it was slow, and no more."""
    bare = [capture.Sample(100, 50), capture.Sample(1000, 500)]
    ours = [capture.Sample(120, 60), capture.Sample(1030, 520)]
    rows = capture.summarise({"case": {capture.BARE: bare, capture.OURS: ours}})["case"]
    assert rows[capture.OURS].added_typical_us == Spread(25, 20, 30)
    assert rows[capture.OURS].added_cpu_us == Spread(15, 10, 20)
    assert rows[capture.BARE].added_cpu_us == Spread(0, 0, 0)


def test_the_tables_have_every_case_and_contender(capsys):
    """A line for each case in both measures, and a column for each contender."""
    sample = [capture.Sample(100, 50)]
    rows = capture.summarise({case: dict.fromkeys(capture.CONTENDERS, sample) for case in capture.CASES})
    capture.print_table(capture.setting(1, 1), rows)
    printed = capsys.readouterr().out
    for case in capture.CASES:
        assert printed.count(f"\n{case} ") == 2
    for name in capture.CONTENDERS:
        assert printed.count(name) >= 2
