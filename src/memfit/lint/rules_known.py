"""Settings and values that a library does not have. What it has: option_schema.py."""

from __future__ import annotations

from memfit.lint.option_schema import known, shown, unknown, wrong
from memfit.lint.parse import Found, Options, Setup


def _read_as_written(o: Options, s: Setup) -> bool:
    """Not what Accelerate makes of its own settings, which are compared where they stand."""
    return o is s.accelerate or s.accelerate is None or o.file != s.accelerate.file


def _unknown(o: Options, s: Setup, library: str, *, refused: bool) -> Found:
    """Misspelt settings, where the library stops for them or where it does not."""
    table = known(library)
    for section, key, near in unknown(o, library) if _read_as_written(o, s) else ():
        if near is not None and (section in table.refuses) == refused:
            yield {"key": f"{section}.{key}".lstrip("."), "near": near}


def _newer(o: Options, s: Setup, library: str) -> Found:
    """Where the library stops for them, those that look like no other."""
    table = known(library)
    for section, key, near in unknown(o, library) if _read_as_written(o, s) else ():
        if near is None and section in table.refuses:
            yield {"key": f"{section}.{key}".lstrip("."), "release": table.release}


def _value(o: Options, s: Setup, library: str) -> Found:
    """DeepSpeed's autotuner takes lists of what it is to try."""
    for path, value, spec in wrong(o, library) if _read_as_written(o, s) else ():
        if (
            library == "deepspeed"
            and isinstance(value, list)
            and all(spec.takes(v, spelled=False) for v in value)
        ):
            continue
        yield {"key": path, "value": value, "allowed": shown(spec, value)}


def _is_number(text: str) -> bool:
    try:
        return bool(float(text) + 1)
    except ValueError:
        return False


def deepspeed_unknown_key(d: Options, s: Setup) -> Found:
    yield from _unknown(d, s, "deepspeed", refused=False)


# From the fp16 section, of which deepspeed_bf16_loss_scale tells.
_COPIED = (
    "bf16.loss_scale", "bf16.loss_scale_window", "bf16.initial_scale_power", "bf16.hysteresis",
    "bf16.min_loss_scale",
)  # fmt: skip


def deepspeed_section_key(d: Options, s: Setup) -> Found:
    yield from (f for f in _unknown(d, s, "deepspeed", refused=True) if f["key"] not in _COPIED)


def deepspeed_newer_key(d: Options, s: Setup) -> Found:
    yield from (f for f in _newer(d, s, "deepspeed") if f["key"] not in _COPIED)


def deepspeed_text_for_number(d: Options, s: Setup) -> Found:
    yield from (
        f for f in _value(d, s, "deepspeed") if isinstance(f["value"], str) and _is_number(f["value"])
    )


def deepspeed_value(d: Options, s: Setup) -> Found:
    text = [f["key"] for f in deepspeed_text_for_number(d, s)]
    yield from (f for f in _value(d, s, "deepspeed") if f["key"] not in text)


def accelerate_unknown_key(a: Options, s: Setup) -> Found:
    yield from _unknown(a, s, "accelerate", refused=True)


def accelerate_newer_key(a: Options, s: Setup) -> Found:
    yield from _newer(a, s, "accelerate")


def accelerate_section_key(a: Options, s: Setup) -> Found:
    yield from _unknown(a, s, "accelerate", refused=False)


def accelerate_value(a: Options, s: Setup) -> Found:
    yield from _value(a, s, "accelerate")


def trainer_unknown_key(t: Options, s: Setup) -> Found:
    yield from _unknown(t, s, "trainer", refused=True)


def trainer_section_key(t: Options, s: Setup) -> Found:
    yield from _unknown(t, s, "trainer", refused=False)


def trainer_value(t: Options, s: Setup) -> Found:
    yield from _value(t, s, "trainer")


def trainer_gone(t: Options, s: Setup) -> Found:
    """In a file of nothing but the Trainer's own arguments: other front ends have some of them still."""
    table = known("trainer")
    gone = [key for key in t.data if key in table.older[""]]
    if gone and all(key in table.names("") for key in t.data):
        yield {"keys": ", ".join(gone), "release": table.release}


def _option(found: dict[str, str]) -> dict[str, str]:
    return found | {k: f"--{found[k].replace('_', '-')}" for k in ("key", "near") if k in found}


def megatron_unknown_option(m: Options, s: Setup) -> Found:
    """An option may be cut short, as long as it means one alone."""
    names = known("megatron").names("")
    for found in _unknown(m, s, "megatron", refused=True) if m.defaults else ():
        if not any(name.startswith(found["key"]) for name in names):
            yield _option(found)


def megatron_value(m: Options, s: Setup) -> Found:
    yield from map(_option, _value(m, s, "megatron") if m.defaults else ())


def torchtitan_unknown_key(t: Options, s: Setup) -> Found:
    """Misspelt, or of another table. A module of one's own may add others, which look like neither."""
    yield from _unknown(t, s, "torchtitan", refused=False)


def torchtitan_value(t: Options, s: Setup) -> Found:
    yield from _value(t, s, "torchtitan")


CHECKS = {
    ("deepspeed",): (
        deepspeed_unknown_key, deepspeed_section_key, deepspeed_newer_key, deepspeed_text_for_number,
        deepspeed_value,
    ),
    ("accelerate",): (
        accelerate_unknown_key, accelerate_newer_key, accelerate_section_key, accelerate_value,
    ),
    ("trainer",): (trainer_unknown_key, trainer_section_key, trainer_value, trainer_gone),
    ("megatron",): (megatron_unknown_option, megatron_value),
    ("torchtitan",): (torchtitan_unknown_key, torchtitan_value),
}  # fmt: skip
