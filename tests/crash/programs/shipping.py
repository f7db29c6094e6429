"""A shipper in the foreground that rotates early and believes in deaths soon.

    python shipping.py [drain]

With `drain` it delivers what is there and leaves; otherwise it ships until SIGTERM.
"""

from __future__ import annotations

import json
import sys

from waxell_workers.core import foreground, shipper, tracking
from waxell_workers.core.config import resolve

shipper.SEGMENT_BYTES = 64 << 10
tracking._REASON_GRACE_S = 0.5  # as long as that, a shipper waits for a reason before it ends a dead run

if __name__ == "__main__":
    result = foreground.run(resolve({}), drain="drain" in sys.argv, timeout=100)
    print(json.dumps({"pending": result.pending, "rejected": result.dropped}))
