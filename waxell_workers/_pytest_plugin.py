"""pytest's fixtures for users' own tests; pytest finds them by the package's entry point.

Loaded at the start of every pytest run in an environment that has this package: imports nothing before a test
asks for it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from .testing import RecordedRuns


@pytest.fixture
def waxell_runs() -> Iterator[RecordedRuns]:
    """What waxell-workers records while the test runs; see `waxell_workers.testing.record_runs`."""
    from .testing import record_runs

    with record_runs() as runs:
        yield runs
