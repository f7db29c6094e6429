"""The benchmark measures what it says: everything recorded, nothing dropped, the same bytes."""

from __future__ import annotations

import pytest

from tests.benchmarks import recording
from waxell_workers.core.segments import FIRST_LINE

RUNS = 20


def test_bare_writes_repeat_exactly_the_journal(tmp_path):
    """Three records a run reach the journal, and `bare writes` writes the same bytes, in the same pieces."""
    for name in (recording.WAXELL, recording.BARE):
        recording.measure_apart(name, RUNS, tmp_path)
    (segment,) = tmp_path.glob("*/*.ndjson")
    lines = recording.journal_lines(tmp_path)
    assert len(lines) == 3 * (RUNS + recording.WARM_UP_RUNS)
    assert FIRST_LINE + (tmp_path / "bare").read_bytes() == segment.read_bytes()


def test_what_was_exported_meanwhile_has_arrived(tmp_path):
    """With a shipper, the measurement ends only when the server has every record."""
    with recording.local_server(tmp_path) as server:
        sample = recording.play_round([recording.SHIPPING], RUNS, tmp_path, server)[recording.SHIPPING]
    assert sample.typical_us > 0


@pytest.mark.parametrize(
    ("name", "package"), [(recording.AGENTS, "agents"), (recording.OTEL, "opentelemetry.sdk")]
)
def test_the_others_drop_nothing(name, package, tmp_path):
    """A queue that overflows would be cheap: every item of every run reaches the exporter."""
    pytest.importorskip(package)
    assert recording.measure_apart(name, RUNS, tmp_path).cpu_us > 0


def test_losing_a_record_fails_the_contender():
    """A contender that has recorded less than it was told to is no measurement."""
    with pytest.raises(SystemExit, match="spans at the exporter: 1, not 2"):
        recording._expect(1, 2, "spans at the exporter")


def test_ratios_are_taken_within_a_round():
    """A round in which the machine was ten times slower changes no ratio."""
    ours = [recording.Sample(10, 10, 10), recording.Sample(100, 100, 100)]
    theirs = [recording.Sample(20, 20, 40), recording.Sample(200, 200, 400)]
    rows = recording.summarise({recording.WAXELL: ours, recording.AGENTS: theirs})
    assert rows[recording.AGENTS].typical_ratio == recording.Spread(0.5, 0.5, 0.5)
    assert rows[recording.AGENTS].cpu_ratio == recording.Spread(0.25, 0.25, 0.25)


def test_an_aim_that_is_missed_is_said_to_be():
    """Nothing is rounded in our favour, and nothing fails for it."""
    samples = {
        recording.WAXELL: [recording.Sample(10, 10, 10)],
        recording.AGENTS: [recording.Sample(19.9, 19.9, 19.9)],
        recording.OTEL: [recording.Sample(100, 100, 100)],
    }
    found = recording.verdicts(recording.summarise(samples))
    assert {verdict.than: verdict.met for verdict in found} == {recording.AGENTS: False, recording.OTEL: True}
