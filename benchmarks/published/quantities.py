"""Numbers as people write them in a column: ``4,096``, ``8k``, ``TP=4``, ``4M tokens``, ``~45.2 GB``."""

from __future__ import annotations

import re
from collections.abc import Mapping

from memfit.types.errors import UserError

GIB = 2**30
UNITS = {
    "gib": GIB,
    "mib": 2**20,
    "kib": 2**10,
    "tib": 2**40,
    "bytes": 1,
    "byte": 1,
    "b": 1,
    "gb(1e9)": 10**9,
    "mb(1e6)": 10**6,
    "gb(2^30)": GIB,
    "mb(2^20)": 2**20,
}
# Where a source only says "GB" or "MB": tools print powers of two under these names more often than not.
UNSURE = {"gb(base?)": GIB, "mb(base?)": 2**20, "gb": GIB, "mb": 2**20, "kb": 2**10, "g": GIB, "m": 2**20}

_WORDS = r"max\w*|up to|about|seq\w*|length|context|ctx|packed( to)?|batch( size)?|m?bs|gbs|[tpvced]p"
_BEFORE = rf"\s*(?:(?:{_WORDS})(?=[\W\d_])[\s:=_-]*|[≤~≈<>=]+\s*)*"


def whole(text: str) -> int:
    """The whole number that a text begins with, ``max 4,096`` or ``4k`` (times 1024); 0: there is none."""
    found = re.match(rf"{_BEFORE}(?P<whole>\d[\d,_]*)(?P<part>\.\d+)?\s*(?P<k>k\b)?", (text or "").lower())
    if not found:
        return 0
    digits = re.sub("[,_]", "", found["whole"]) + (found["part"] or "")
    value = float(digits) * (1024 if found["k"] else 1)
    return int(value) if value.is_integer() else 0


def amount(text: str) -> float:
    """A measured number: ``5,762``, ``~45.2 GB``, ``3.2k``, ``1e4``; 0 where there is none.
    Raises UserError for a comma that groups no thousands."""
    found = re.match(r"[~≈<>=\s]*(\d[\d,_]*(?:\.\d+)?(?:e[+-]?\d+)?)\s*(k\b)?", (text or "").lower())
    if found and "," in found[1] and not re.match(r"\d{1,3}(,\d{3})+(?![\d,])", found[1]):
        raise UserError(f"{text!r}: a comma groups thousands, a point begins the decimals")
    return float(re.sub("[,_]", "", found[1])) * (1000 if found[2] else 1) if found else 0.0


def unit(text: str, value: str) -> tuple[float, bool] | None:
    """(bytes of one, whether the base is stated) by the unit's column or what follows the value, or None."""
    for given in (text, re.sub(r"^[^a-zA-Z]*", "", value)):
        plain = re.sub(r"\s+", "", given.lower())
        for part in (
            plain,
            *re.findall(r"^[a-z]+\([^)]*\)", plain),
            *re.findall(r"^[a-z]+", given.strip().lower()),
        ):
            if part in UNITS or part in UNSURE:
                return (UNITS | UNSURE)[part], part in UNITS
    return None


def devices(text: str) -> int:
    """``8``, or nodes times devices: ``2x8``."""
    found = re.match(r"\s*(\d+)\s*(?:nodes?\s*)?[x×*]\s*(\d+)", text)
    return int(found[1]) * int(found[2]) if found else whole(text)


def degree(row: Mapping[str, str], name: str) -> int:
    """Of a kind of parallelism; where its column is blank, as the sharding's column says: ``dp2+tp2+pp4``."""
    if row[name]:
        return whole(row[name]) or 1
    found = re.search(rf"(?<![a-z]){name}\s*[:=_-]?\s*(\d+)", row["zero_fsdp"].lower())
    return int(found[1]) if found else 1


def batch(row: Mapping[str, str], length: int) -> int:
    """Samples of a step; ``4M tokens`` are so many of the row's length."""
    text = row["global_batch"].lower()
    tokens = re.match(r"\s*~?(\d[\d,_]*(?:\.\d+)?)\s*([mk]?)\w*\s*tok", text)
    if tokens is None:
        return whole(text)
    count = float(re.sub("[,_]", "", tokens[1])) * {"m": 1e6, "k": 1e3, "": 1}[tokens[2]]
    return max(1, round(count / length)) if length else 0
