"""Text from elsewhere, made harmless for a terminal.

A name or an error may hold what a terminal obeys: escape sequences that move the cursor, set the window's
title or hide lines, and characters that turn the direction of what follows. Each is shown as Python would
write it.
"""

from __future__ import annotations

import re

_CONTROLS = re.compile(
    # all but tab and newline; those above 7f are escape sequences of one character
    "[\x00-\x08\x0b-\x1f\x7f-\x9f"
    # invisible, or directions
    "\xad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb"
    # halves of characters, which cannot be written, and invisible ASCII
    "\ud800-\udfff\U000e0000-\U000e007f]"
)


def plain(text: object) -> str:
    """Return a text, several lines of it, with everything visible that a terminal would obey."""
    return _CONTROLS.sub(lambda found: ascii(found[0])[1:-1], str(text))


def plain_line(text: object) -> str:
    """Return a text on one line, with everything visible that a terminal would obey."""
    return plain(text).replace("\n", "\\n").replace("\t", "\\t")
