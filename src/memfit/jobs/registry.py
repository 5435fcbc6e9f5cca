"""From a JobRef to a Job, and the list of built-in jobs. Neither loads torch; building a job's model does."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable
from typing import Any, Final

from memfit.jobs import huggingface
from memfit.jobs.opened_files import OPENED_WHILE_LOADING, note_opened_files
from memfit.jobs.user_job import load_user_job
from memfit.types.errors import UserError, suggest
from memfit.types.gc_pause import pause_gc
from memfit.types.job import Job, JobRef

SHORTEST: Final = 16
MOST_TOKENS: Final = 262_144


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class BuiltIn:
    """A built-in job. ``sizes``: the sizes that it accepts, the default one first. ``title`` and
    ``data_source``: texts for the user. ``make``: returns the Job; it takes the keywords size, data, weights,
    batch, length and dimensions, all optional, and raises UserError for those that the job does not
    accept."""

    name: str
    title: str
    sizes: tuple[str, ...]
    data_source: str
    make: Callable[..., Job]


# Each is a module of that name with underscores, loaded on demand. It has NAME, TITLE, DATA_SOURCE, make (see
# builtin/options.py) and SIZES: the first is the default, "paper" that of the publication. The Japanese of
# its texts is in report/words/ja_told.toml.
_BUILT_IN: Final = (
    "alphafold2",
    "protein-ss",
    "protein-lm",
    "char-lm",
    "molecules",
    "genome",
    "weather",
    "potential",
    "segmentation3d",
)


def names() -> tuple[str, ...]:
    """Return the names of the built-in jobs, in the order in which they are listed to the user."""
    return _BUILT_IN


def describe() -> tuple[BuiltIn, ...]:
    """Return the descriptions of all built-in jobs, in the order of `names`."""
    return tuple(map(_built_in, _BUILT_IN))


def _built_in(name: str) -> BuiltIn:
    module = importlib.import_module(f"memfit.jobs.builtin.{name.replace('-', '_')}")
    return BuiltIn(
        name=module.NAME,
        title=module.TITLE,
        sizes=module.SIZES,
        data_source=module.DATA_SOURCE,
        make=module.make,
    )


_OF_THIS_PROCESS: dict[str, Job] = {}


def add_job(spec: str, job: Job) -> None:
    """Let `load` return ``job`` for a reference with this ``spec`` in this process, in place of any other job
    of that name. Other processes cannot load it."""
    _OF_THIS_PROCESS[spec] = job


def of_this_process() -> tuple[str, ...]:
    """Return the specs given to `add_job`."""
    return tuple(_OF_THIS_PROCESS)


def load(ref: JobRef) -> Job:
    """Return the job that ``ref`` names: one of `add_job`, a built-in job, ``hf:NAME``, or the user's
    ``path.py:attribute``. What ``ref`` states of size, data, weights, batch, length, dimensions, steps, clip
    and ema applies; None keeps the job's own. For a job of `add_job`, only steps, clip and ema apply.

    A clip of 0 turns clipping off. Raises UserError for an unknown job or size; for steps, batch, length or
    a dimension below 1; for a length of a built-in job outside 16 to 262,144; for an option or a dimension
    that the job does not accept; for a clip or ema that `Job` refuses; and for faults in the files.
    """
    numbers = {"--steps": ref.steps, "--batch": ref.batch, "--length": ref.length}
    for name, value in (numbers | {f"--dim {name}": n for name, n in ref.dimensions.items()}).items():
        if value is not None and value < 1:
            raise UserError(f"{name} is {value}", allowed="a whole number of at least 1")
    with pause_gc(), note_opened_files(OPENED_WHILE_LOADING):
        job = _make(ref)
    job = job if ref.steps is None else dataclasses.replace(job, steps=ref.steps)
    job = job if ref.ema is None else dataclasses.replace(job, ema=ref.ema)
    return job if ref.clip is None else dataclasses.replace(job, clip=ref.clip or None)


def _make(ref: JobRef) -> Job:
    if ref.spec in _OF_THIS_PROCESS:
        return _OF_THIS_PROCESS[ref.spec]
    ref = _split_length(ref)
    names_of_options = ("size", "data", "weights", "batch", "length")
    options: dict[str, Any] = {
        name: value for name in names_of_options if (value := getattr(ref, name)) is not None
    }
    dimensions: dict[str, Any] = {"dimensions": ref.dimensions} if ref.dimensions else {}
    if ref.spec.startswith(huggingface.PREFIX):
        _check_size(ref, huggingface.SIZES)
        return huggingface.make(ref.spec.removeprefix(huggingface.PREFIX), **options, **dimensions)
    if ref.spec in _BUILT_IN:
        built_in = _built_in(ref.spec)
        _check_size(ref, built_in.sizes)
        if ref.length is not None and not SHORTEST <= ref.length <= MOST_TOKENS:
            built_in.make(**options | {"length": SHORTEST}, **dimensions)  # raises for jobs without lengths
            raise UserError(
                f"length {ref.length} of {ref.spec} is out of range",
                allowed=f"{SHORTEST} to {MOST_TOKENS} tokens (residues, bases or bytes) of a sample",
            )
        job = built_in.make(**options, **dimensions)
        is_smallest = ref.size is None or ref.size == built_in.sizes[0]
        return job if is_smallest else dataclasses.replace(job, reduced=built_in.make)
    if ":" in ref.spec:
        return load_user_job(ref.spec, options | dict(ref.dimensions))
    raise UserError(
        f"unknown job {ref.spec!r}",
        allowed=f"{', '.join(names())}, FILE.py:NAME or hf:PATH_OR_NAME",
        hint=suggest(ref.spec, names()),
    )


def _split_length(ref: JobRef) -> JobRef:
    """Return ``ref`` with a size such as ``650M@4096`` split into the size ``650M`` and the length 4096. A
    ``ref`` whose size has no @ is returned unchanged. For one with an @, raises UserError if there is no size
    before it or no whole number after it, if the job is in a file of the user (``path.py:attribute``), and if
    ``ref`` also states another length."""
    size, separator, length = (ref.size or "").partition("@")
    if not separator:
        return ref
    if not size or not length.isdigit() or ":" in ref.spec.removeprefix(huggingface.PREFIX):
        raise UserError(
            f"--size {ref.size} has an @, but is not SIZE@LENGTH with a whole number LENGTH, or the job "
            f"{ref.spec} is in a file of yours (FILE.py:NAME)",
            allowed="SIZE@LENGTH for a built-in or hf: job; for any job, --size SIZE --length LENGTH",
        )
    if ref.length not in (None, int(length)):
        raise UserError(
            f"--size {ref.size} and --length {ref.length} state different lengths",
            allowed="the length in only one of them",
        )
    return dataclasses.replace(ref, size=size, length=int(length))


def _check_size(ref: JobRef, sizes: tuple[str, ...]) -> None:
    if ref.size is not None and ref.size not in sizes:
        raise UserError(
            f"unknown size {ref.size!r} of {ref.spec}",
            allowed=", ".join(sizes),
            hint=suggest(ref.size, sizes),
        )
