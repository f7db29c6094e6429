"""A process that dies in mid-run. Once the server says so, its shipper has looked who lives.

python witness.py
"""

from __future__ import annotations

import os

import waxell_workers

if __name__ == "__main__":
    waxell_workers.init(capture=())
    with waxell_workers.WaxellContext("witness"):
        os._exit(0)
