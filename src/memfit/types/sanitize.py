"""Text that somebody else wrote, made safe to show."""

from __future__ import annotations

from typing import Final

# Controls of a terminal (C0, DEL, C1), line ends that editors disagree on, marks that turn the reading
# direction of what follows, and halves of characters.
_CONTROLS: Final = (*range(0x20), *range(0x7F, 0xA0), 0x2028, 0x2029)
_TURNING: Final = (0x061C, 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A))
TURNING: Final = dict.fromkeys(_TURNING, "\ufffd")  # for str.translate
_UNSEEN: Final = (*_CONTROLS, *_TURNING, *range(0xD800, 0xE000))
_SHOWN: Final = dict.fromkeys((c for c in _UNSEEN if chr(c) not in "\n\t"), "\ufffd")
_ESCAPED: Final = {c: f"\\u{c:04x}" for c in _UNSEEN if c >= 0x20}


def shown(text: str) -> str:
    """`text` with every character that a terminal would obey in the place of showing it as U+FFFD."""
    return text.translate(_SHOWN)


def one_line(text: str) -> str:
    """As `shown`, and nothing in it can look like a line of ours."""
    return " ".join(shown(text).split())


def escaped(json: str) -> str:
    """JSON text that is the same value, and that a terminal shows in the place of obeying."""
    return json.translate(_ESCAPED)
