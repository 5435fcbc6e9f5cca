"""Convert a set-up to a memfit Plan, and list the settings that no plan can express.

A setting that the files do not give has the library's own default (DeepSpeed 0.19 runtime/zero/config.py and
config.py; Accelerate 1.15 utils/dataclasses.py; transformers 5.24 training_args.py; Megatron-LM at d98e8a6
training/arguments.py; torchtitan v0.2.2 config/job_config.py; OpenFold in openfold.py; read 2026-11).
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final

from memfit.lint.clipping import NORMS
from memfit.lint.draft import Conversion, Draft
from memfit.lint.option_reasons import account_for
from memfit.lint.parse import KINDS, Options, Setup
from memfit.lint.to_plan_fine_tuning import from_axolotl, from_llamafactory
from memfit.lint.to_plan_hugging_face import from_deepspeed, from_hugging_face
from memfit.lint.to_plan_lightning import from_lightning
from memfit.lint.to_plan_mace import from_mace
from memfit.lint.to_plan_openfold import from_openfold
from memfit.lint.to_plan_scripts import from_megatron, from_torchtitan
from memfit.types.errors import UserError

_MOST_RANKS: Final = 2**20


def convert(setup: Setup, *, of_objects: bool = False) -> Conversion:
    """Convert ``setup`` to a plan. If several libraries are configured, only one decides how the model is
    distributed, the first of OpenFold, Axolotl, LLaMA-Factory, Lightning, MACE, Megatron-LM, torchtitan,
    DeepSpeed, and Accelerate with the Trainer. An unknown number of processes counts as 1; with Megatron-LM
    and torchtitan, as the smallest number that their degrees of parallelism allow; with parallel sizes of
    Axolotl, as their product with dp_shard_size, if that is given. ``left_out`` of the result lists the
    settings that no plan can express, settings that the plan depends on but that are known only when a script
    runs, sizes that are no whole numbers of at least 1, and the files in ``setup.missing``. ``of_objects``:
    the settings are those of objects, such as a Trainer, which have a value for every option. Options of
    DeepSpeed, Accelerate and the Trainer that memfit does not carry over are then not listed; those of files
    are (`account_for`).

    Raises UserError for a crop, batch or blocks_per_ckpt of OpenFold that is not a whole number above 0;
    blocks_per_ckpt may also be null. Raises UserError, too, for a number of processes that is not from 1 to
    2**20."""
    engine, apply = _engine_and_conversion(setup)
    _check_ranks(setup.ranks or 1)
    draft = Draft(ranks=setup.ranks or 1)
    tracked_options: dict[str, Any] = {
        kind: _TrackedOptions(
            read_paths=set(),
            size_paths=set(),
            **{f.name: getattr(options, f.name) for f in dataclasses.fields(Options)},
        )
        for kind in KINDS
        if (options := getattr(setup, kind)) is not None
    }
    apply(dataclasses.replace(setup, **tracked_options), draft)
    if apply in (from_deepspeed, from_hugging_face) and not of_objects:
        for kind in ("deepspeed", "accelerate", "trainer"):
            if (options := getattr(setup, kind)) is not None:
                account_for(options, kind, draft)
    for option in _undetermined(tracked_options):
        draft.leave(option, "its value is known only when the script runs: predicted without it")
    unusable = dict(_unusable(tracked_options))
    for name, value in unusable.items():
        draft.leave(f"{name} {value}", "it is no whole number of at least 1: predicted without it")
    norms = dict(_unusable_norms(tracked_options))
    for name, value in norms.items():
        draft.leave(f"{name} {value}", "it is no number: predicted without it")
    for name in setup.missing:
        draft.leave(f"the file {name}", "it does not exist or is no JSON file")
    _check_ranks(draft.ranks)
    plan = dataclasses.replace(draft.plan, ranks=draft.ranks)
    return Conversion(
        plan=plan,
        engine=engine,
        micro_batch=draft.micro_batch,
        batch=draft.batch,
        left_out=tuple(dict.fromkeys(draft.left_out)),
        size=draft.size,
        length=draft.length,
        model=draft.model,
        carried=tuple(name for name in draft.carried if name not in {**unusable, **norms}),
        ema=draft.ema,
    )


def _check_ranks(ranks: int) -> None:
    if not 1 <= ranks <= _MOST_RANKS:
        raise UserError(f"the set-up has {ranks} processes", allowed=f"1 to {_MOST_RANKS:,}")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _TrackedOptions(Options):
    """Options that add each path whose value is read to ``read_paths``, and those of sizes, which are whole
    numbers of at least 1, to ``size_paths``."""

    read_paths: set[str]
    size_paths: set[str]

    def raw(self, path: str) -> Any:
        self.read_paths.add(path)
        return Options.raw(self, path)

    def size(self, path: str) -> int | None:
        self.size_paths.add(path)
        return Options.size(self, path)


def _undetermined(tracked_options: Mapping[str, _TrackedOptions]) -> Iterator[str]:
    """Yield, as "name value" or, for a flag without a value, as "name", each setting whose value is known
    only when a script runs, if it was read or is the gradient norm for clipping. Names are dotted paths;
    those of Megatron-LM are written with hyphens. ``tracked_options``: kind, as in Setup -> its settings."""
    for kind, options in tracked_options.items():
        for path in sorted(options.read_paths | {NORMS.get(kind, "")}):
            if options.undetermined(path):
                name = path.replace("_", "-") if kind == "megatron" else path
                yield name if options.raw(path) is True else f"{name} {options.raw(path)}"


# Also read before the draft is made.
_SIZES: Final = ("micro_batch_size", "gradient_accumulation_steps", "trainer.devices", "trainer.num_nodes")
_NO_NUMBER: Final = re.compile(r"(?i)(?:auto|none|null|max|[\d, ]+|)")  # texts that are no mistake; "0,1"


def _unusable(tracked_options: Mapping[str, _TrackedOptions]) -> Iterator[tuple[str, Any]]:
    """Yield (path, value) of each size that was read and is a number or a text, but no whole number of at
    least 1. The number -1 and the texts of `_NO_NUMBER`, which stand for defaults in many files, are not
    counted."""
    for options in tracked_options.values():
        for path in sorted({*options.size_paths, *_SIZES}):
            value = options.get(path)
            is_given = isinstance(value, float) or options.number(path) not in (None, -1) or _is_word(value)
            if is_given and Options.size(options, path) is None:
                yield path, value


def _unusable_norms(tracked_options: Mapping[str, _TrackedOptions]) -> Iterator[tuple[str, Any]]:
    """Yield (path, value) of each gradient norm for clipping that is a text, but no number."""
    for kind, options in tracked_options.items():
        path = NORMS.get(kind, "")
        if _is_word(options.get(path)) and options.number(path) is None:
            yield path, options.get(path)


def _is_word(value: Any) -> bool:
    return isinstance(value, str) and _NO_NUMBER.fullmatch(value.strip()) is None


def _engine_and_conversion(setup: Setup) -> tuple[str, Callable[[Setup, Draft], None]]:
    if setup.openfold is not None or setup.openfold_config is not None:
        return "native" if setup.deepspeed is None else "deepspeed", from_openfold
    for kind, engine, apply in _FRONT_ENDS:
        if getattr(setup, kind) is not None:
            return engine, apply
    if setup.megatron is not None:
        return "megatron", from_megatron
    if setup.torchtitan is not None:
        return "native", from_torchtitan
    if setup.deepspeed is not None:
        return "accelerate" if setup.accelerate or setup.trainer else "deepspeed", from_deepspeed
    return "accelerate", from_hugging_face


# Front ends: (kind, engine that would run the plan, function that adds the file's options to the draft).
_FRONT_ENDS: tuple[tuple[str, str, Callable[[Setup, Draft], None]], ...] = (
    ("axolotl", "accelerate", from_axolotl),
    ("llamafactory", "accelerate", from_llamafactory),
    ("lightning", "native", from_lightning),
    ("mace", "native", from_mace),
)
