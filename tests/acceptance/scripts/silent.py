"""A script that has everything in place and never calls a model."""

import asking  # noqa: F401

import waxell_workers

waxell_workers.init()
waxell_workers.force_flush()
waxell_workers.shutdown()
