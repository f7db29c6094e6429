"""The conformance kit: one suite of scenarios for the adapter of any task framework.

An adapter brings a folder with a real application (`scenarios.py`) and a `driver.py` whose `DRIVER` says how
to start that framework's worker and hand it tasks. `suite.py` then runs every scenario over every mode that
the driver names, with real processes, a real broker, the real server and real kills. docs/conformance.md has
the contract.
"""

from .driver import Driver, Expected, Mode, Site, Worker

__all__ = ["Driver", "Expected", "Mode", "Site", "Worker"]
