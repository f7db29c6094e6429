"""Every scenario of the kit, over every framework in `integrations/` and every mode that its driver names."""

from waxell_workers.testing.conformance.suite import *  # noqa: F403
