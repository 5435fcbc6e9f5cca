"""Rules for settings and values that a library does not accept; option_schema.py says which it accepts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from memfit.lint.option_schema import Spec, accepted_text, find_invalid, find_unknown, library_settings
from memfit.lint.parse import Found, Options, Setup


def _read_as_written(o: Options, s: Setup) -> bool:
    """Return whether ``o`` holds settings as their own file has them. Settings of DeepSpeed or Megatron-LM
    that memfit derived from Accelerate's file do not count: that file's settings are checked instead."""
    return o is s.accelerate or s.accelerate is None or o.file != s.accelerate.file


def _unknown(o: Options, s: Setup, library: str, *, refused: bool) -> Found:
    """Yield a finding for each setting that the library does not have, but for which it has a similar name,
    or the same name in exactly one other section, that the file does not set: the setting is probably
    misspelled or misplaced. ``refused``: True for those in sections in which the library stops at an unknown
    key, False for those in other sections. Yield nothing for a file that is not the library's own (see
    `find_unknown`) and for settings derived from Accelerate's file (see `_read_as_written`)."""
    table = library_settings(library)
    for section, key, intended_path in find_unknown(o, library) if _read_as_written(o, s) else ():
        if intended_path is not None and (section in table.refuses) == refused:
            yield {"key": f"{section}.{key}".lstrip("."), "near": intended_path}


def _newer(o: Options, s: Setup, library: str) -> Found:
    """Yield a finding for each setting that the library does not have, in a section in which it stops at an
    unknown key, if the setting is probably not misspelled or misplaced: `_unknown` finds no other name for
    it, or the file sets that one as well. It may be a setting of a newer release. The same files are skipped
    as by `_unknown`."""
    table = library_settings(library)
    for section, key, intended_path in find_unknown(o, library) if _read_as_written(o, s) else ():
        if intended_path is None and section in table.refuses:
            yield {"key": f"{section}.{key}".lstrip("."), "release": table.release}


def _wrong(o: Options, s: Setup, library: str) -> Iterator[tuple[str, Any, Spec]]:
    """Yield (dotted path, value, accepted values) for each value that the library does not accept. Lists are
    accepted from DeepSpeed's files if DeepSpeed accepts each of their values: its autotuner takes lists of
    values to try."""
    for path, value, spec in find_invalid(o, library) if _read_as_written(o, s) else ():
        if (
            library == "deepspeed"
            and isinstance(value, list)
            and all(spec.accepts(v, spelled=False) for v in value)
        ):
            continue
        yield path, value, spec


def _finding(path: str, value: Any, spec: Spec) -> dict[str, Any]:
    return {"key": path, "value": value, "allowed": accepted_text(spec, value)}


def _value(o: Options, s: Setup, library: str) -> Found:
    """Yield a finding for each value that the library does not accept (see `_wrong`)."""
    yield from (_finding(*found) for found in _wrong(o, s, library))


def _is_quoted_number(value: Any, spec: Spec) -> bool:
    """Return whether ``value`` is a number written as text that ``spec`` accepts without the quotation
    marks."""
    try:
        return isinstance(value, str) and spec.accepts(float(value), spelled=False)
    except ValueError:
        return False


def deepspeed_unknown_key(d: Options, s: Setup) -> Found:
    """Report settings that DeepSpeed does not have and silently ignores, if they are probably misspelled or
    misplaced: DeepSpeed has a similar name, or the same name in exactly one other section, which the file
    does not set."""
    yield from _unknown(d, s, "deepspeed", refused=False)


# Keys of the fp16 section within bf16: the rule deepspeed_bf16_loss_scale reports them.
_COPIED = (
    "bf16.loss_scale",
    "bf16.loss_scale_window",
    "bf16.initial_scale_power",
    "bf16.hysteresis",
    "bf16.min_loss_scale",
)


def deepspeed_section_key(d: Options, s: Setup) -> Found:
    """Report settings that DeepSpeed does not have and refuses, if they are probably misspelled or misplaced:
    DeepSpeed has a similar name, or the same name in exactly one other section, which the file does not set.
    Loss-scale settings in the bf16 section are left to deepspeed_bf16_loss_scale."""
    yield from (f for f in _unknown(d, s, "deepspeed", refused=True) if f["key"] not in _COPIED)


def deepspeed_newer_key(d: Options, s: Setup) -> Found:
    """Report settings that the checked release of DeepSpeed does not have and refuses, if they are probably
    neither misspelled nor misplaced: another release may have them. Loss-scale settings in the bf16 section
    are left to deepspeed_bf16_loss_scale."""
    yield from (f for f in _newer(d, s, "deepspeed") if f["key"] not in _COPIED)


def deepspeed_text_for_number(d: Options, s: Setup) -> Found:
    """Report values that DeepSpeed does not accept because they are numbers written as text, such as "1.0":
    it accepts the numbers themselves."""
    yield from (
        _finding(path, value, spec)
        for path, value, spec in _wrong(d, s, "deepspeed")
        if _is_quoted_number(value, spec)
    )


def deepspeed_value(d: Options, s: Setup) -> Found:
    """Report values that DeepSpeed does not accept, except those that deepspeed_text_for_number reports."""
    text_keys = [f["key"] for f in deepspeed_text_for_number(d, s)]
    yield from (f for f in _value(d, s, "deepspeed") if f["key"] not in text_keys)


def accelerate_unknown_key(a: Options, s: Setup) -> Found:
    """Report top-level settings that Accelerate does not have, if they are probably misspelled or misplaced:
    Accelerate has a similar name, or the same name in exactly one section, which the file does not set.
    Accelerate refuses the file."""
    yield from _unknown(a, s, "accelerate", refused=True)


def accelerate_newer_key(a: Options, s: Setup) -> Found:
    """Report top-level settings that the checked release of Accelerate does not have, if they are probably
    neither misspelled nor misplaced: another release may have them. The checked release refuses the file."""
    yield from _newer(a, s, "accelerate")


def accelerate_section_key(a: Options, s: Setup) -> Found:
    """Report settings in sections, such as fsdp_config, that Accelerate does not have and silently ignores,
    if they are probably misspelled or misplaced: Accelerate has a similar name in the section, or the same
    name in exactly one other place, which the file does not set."""
    yield from _unknown(a, s, "accelerate", refused=False)


def accelerate_value(a: Options, s: Setup) -> Found:
    """Report values that Accelerate does not accept."""
    yield from _value(a, s, "accelerate")


def trainer_unknown_key(t: Options, s: Setup) -> Found:
    """Report arguments that the Trainer does not have and refuses, if they are probably misspelled: an
    argument of the Trainer, which the file does not set, has a similar name."""
    yield from _unknown(t, s, "trainer", refused=True)


def trainer_section_key(t: Options, s: Setup) -> Found:
    """Report settings in sections, such as fsdp_config, that the Trainer does not have and silently ignores,
    if they are probably misspelled or misplaced: the Trainer has a similar name in the section, or the same
    name in exactly one other place, which the file does not set."""
    yield from _unknown(t, s, "trainer", refused=False)


def trainer_value(t: Options, s: Setup) -> Found:
    """Report values that the Trainer does not accept."""
    yield from _value(t, s, "trainer")


def trainer_gone(t: Options, s: Setup) -> Found:
    """Report arguments that the checked release of transformers does not have, but other releases have. Only
    a file with nothing but arguments of the Trainer, of any release, is checked: front ends with options of
    their own may still accept such arguments."""
    table = library_settings("trainer")
    removed_keys = [key for key in t.data if key in table.older[""]]
    if removed_keys and all(key in table.names("") for key in t.data):
        yield {"keys": ", ".join(removed_keys), "release": table.release}


def _option(finding: dict[str, str]) -> dict[str, str]:
    return finding | {k: f"--{finding[k].replace('_', '-')}" for k in ("key", "near") if k in finding}


def megatron_unknown_option(m: Options, s: Setup) -> Found:
    """Report options that Megatron-LM does not have and refuses, if they are probably misspelled: it has a
    similar one, which the file does not set. The beginning of an option's name is not reported, because
    Megatron-LM accepts abbreviations. Options of another front end (``m.defaults`` is False) are skipped."""
    names = library_settings("megatron").names("")
    for finding in _unknown(m, s, "megatron", refused=True) if m.defaults else ():
        if not any(name.startswith(finding["key"]) for name in names):
            yield _option(finding)


def megatron_value(m: Options, s: Setup) -> Found:
    """Report values that Megatron-LM does not accept. Options of another front end (``m.defaults`` is False)
    are skipped."""
    yield from map(_option, _value(m, s, "megatron") if m.defaults else ())


def torchtitan_unknown_key(t: Options, s: Setup) -> Found:
    """Report settings that torchtitan does not have, if they are probably misspelled or in the wrong table:
    torchtitan has a similar name in the table, or the same name in exactly one other, which the file does not
    set. Other unknown settings are not reported: a custom module may add them."""
    yield from _unknown(t, s, "torchtitan", refused=False)


def torchtitan_value(t: Options, s: Setup) -> Found:
    """Report values that torchtitan does not accept."""
    yield from _value(t, s, "torchtitan")


CHECKS = {
    ("deepspeed",): (
        deepspeed_unknown_key,
        deepspeed_section_key,
        deepspeed_newer_key,
        deepspeed_text_for_number,
        deepspeed_value,
    ),
    ("accelerate",): (
        accelerate_unknown_key,
        accelerate_newer_key,
        accelerate_section_key,
        accelerate_value,
    ),
    ("trainer",): (trainer_unknown_key, trainer_section_key, trainer_value, trainer_gone),
    ("megatron",): (megatron_unknown_option, megatron_value),
    ("torchtitan",): (torchtitan_unknown_key, torchtitan_value),
}
