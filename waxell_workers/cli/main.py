"""The entry point of `waxell-workers`; the commands are in `commands` and need the extra `cli`."""

from __future__ import annotations

import sys
from importlib.util import find_spec


def main() -> None:
    """Run the command line."""
    missing = [module for module in ("click", "rich") if find_spec(module) is None]
    if missing:
        sys.stderr.write(
            f'waxell-workers: {" and ".join(missing)} not found: pip install "waxell-workers[cli]"\n'
        )
        sys.exit(2)
    from .commands import cli

    cli(prog_name="waxell-workers")


if __name__ == "__main__":
    main()
