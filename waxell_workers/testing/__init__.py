"""For users' own tests: assert on the runs that tasks record. `conformance` has the kit for adapters."""

from .recording import RecordedRun, RecordedRuns, record_runs

__all__ = ["RecordedRun", "RecordedRuns", "record_runs"]
