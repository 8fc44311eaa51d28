r"""The answer a completion commits to: the content of its last `\boxed{...}`."""

from __future__ import annotations

import re

_OPENING = re.compile(r"\\(?:boxed|fbox)\s*\{")
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)  # a backslash takes the next character with it: `\{` is no brace


def last_box(text: str) -> str | None:
    r"""Content, trimmed, of the box that opens last in `text`; None when there is no box, or it is empty or unclosed.

    `\boxed` and `\fbox` count alike. Braces nest; escaped ones (`\{`, `\}`) are content. Of boxes within boxes the
    innermost one opens last. An unclosed last box is not replaced by an earlier one: the text ended in the middle
    of its answer.
    """
    start = max((opening.end() for opening in _OPENING.finditer(text)), default=None)
    if start is None:
        return None
    depth = 1
    for brace in _BRACE.finditer(text, start):
        depth += {"{": 1, "}": -1}.get(brace.group(), 0)
        if depth == 0:
            return text[start : brace.start()].strip() or None
    return None
