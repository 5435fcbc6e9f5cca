"""Make text written by others safe to display."""

from __future__ import annotations

from typing import Final

# Terminal control characters (C0, DEL, C1), line ends that editors interpret differently, marks that change
# the reading direction, and surrogate halves.
_CONTROLS: Final = (*range(0x20), *range(0x7F, 0xA0), 0x2028, 0x2029)
_TURNING: Final = (0x061C, 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A))
TURNING: Final = dict.fromkeys(_TURNING, "\ufffd")  # for str.translate
_UNSEEN: Final = (*_CONTROLS, *_TURNING, *range(0xD800, 0xE000))
_SHOWN: Final = dict.fromkeys((c for c in _UNSEEN if chr(c) not in "\n\t"), "\ufffd")
_ESCAPED: Final = {c: f"\\u{c:04x}" for c in _UNSEEN if c >= 0x20}


def replace_controls(text: str) -> str:
    """Return `text` with U+FFFD in place of every control character that a terminal would interpret, except
    newlines and tabs, which stay. Marks of the reading direction, Unicode line separators and surrogate
    halves are replaced too.
    """
    return text.translate(_SHOWN)


def one_line(text: str) -> str:
    """Return `text` after `replace_controls` on one line: each run of whitespace becomes one space, and there
    is none at the ends. It thus cannot imitate a line of memfit's output.
    """
    return " ".join(replace_controls(text).split())


def escape_controls(json: str) -> str:
    """Return JSON text with the same value, in which the characters that `replace_controls` would replace are
    written as escapes (``\\u202e``). Characters below U+0020 stay: valid JSON has them only as whitespace.
    """
    return json.translate(_ESCAPED)
