"""What OpenFold's own settings mean: presets, changed keys, defaults of training.

Of openfold/config.py and train_openfold.py at ce0029e (2025-09; read 2026-11). `model_config(name, True)`
takes a preset and sets blocks_per_ckpt to 1 and chunk_size to None; after that the flat JSON of
--experiment_config_json changes what it names.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping
from typing import Any, Final

from memfit.lint.parse import Options, Setup
from memfit.types.errors import UserError


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Preset:
    """What is cropped of a training sample: residues, clustered rows of the MSA, extra ones."""

    residues: int = 256
    rows: int = 128
    extra_rows: int = 1024
    templates: bool = True


_INITIAL, _FINE = Preset(), Preset(residues=384, rows=512, extra_rows=5120)
_UNTEMPLATED = dataclasses.replace(_FINE, templates=False)
_MODELS = {
    "model_1": Preset(extra_rows=5120), "model_2": Preset(),
    "model_3": Preset(extra_rows=5120, templates=False), "model_4": Preset(extra_rows=5120, templates=False),
    "model_5": Preset(templates=False),
}  # fmt: skip
PRESETS: Final[Mapping[str, Preset]] = {
    "initial_training": _INITIAL, "finetuning": _FINE, "finetuning_ptm": _FINE,
    "finetuning_no_templ": _UNTEMPLATED, "finetuning_no_templ_ptm": _UNTEMPLATED, **_MODELS,
    **{f"{name}_ptm": preset for name, preset in _MODELS.items()},
}  # fmt: skip
DEFAULT_PRESET: Final = "initial_training"
# Sizes of the job alphafold2 that are OpenFold's network.
JOB, SIZES = (
    "alphafold2",
    {"initial": "initial_training", "paper": "initial_training", "finetune": "finetuning"},
)
EVOFORMER_BLOCKS, TEMPLATE_BLOCKS = 48, 2
KERNELS: Final = ("use_deepspeed_evo_attention", "use_lma", "use_flash")
# All of globals; a key that is none of them is taken without a word.
GLOBALS: Final = frozenset(
    {
        "blocks_per_ckpt", "chunk_size", *KERNELS, "offload_inference", "c_z", "c_m", "c_t", "c_e", "c_s",
        "eps", "is_multimer", "seqemb_mode_enabled",
    }
)  # fmt: skip
# One reference in the configuration: whichever is set, all are.
CKPT: Final = (
    "globals.blocks_per_ckpt", "model.evoformer_stack.blocks_per_ckpt",
    "model.template.template_pair_stack.blocks_per_ckpt",
)  # fmt: skip
EXTRA_CKPT: Final = "model.extra_msa.extra_msa_stack.ckpt"
TUNED: Final = (
    "model.evoformer_stack.tune_chunk_size", "model.extra_msa.extra_msa_stack.tune_chunk_size",
    "model.template.template_pair_stack.tune_chunk_size",
)  # fmt: skip


def changed(s: Setup, paths: Iterable[str], default: Any = None) -> Any:
    """What the JSON says of the last of ``paths`` that it names, null included; else ``default``."""
    found, settings = default, s.openfold_config
    for path in paths:
        node: Any = settings.data if settings is not None else {}
        for part in path.split("."):
            if not isinstance(node, Mapping) or part not in node:
                break
            node = node[part]
        else:
            found = node
    return found


def arguments(s: Setup) -> Options:
    """Those of train_openfold.py; none where only the JSON was given."""
    return s.openfold or Options(file="", data={})


def preset(s: Setup) -> str | None:
    """Its name; None where only a run would tell."""
    given = arguments(s)
    if given.raw("config_preset") is None and "config_preset" not in given.unsure:
        return DEFAULT_PRESET
    name = given.get("config_preset")
    return None if name is None else str(name)


def crop(s: Setup) -> Preset | None:
    """With what the JSON changes of it; None for a preset that is not the monomer's. Raises UserError for
    sizes that OpenFold's configuration does not take."""
    found = PRESETS.get(preset(s) or "")
    if found is None:
        return None
    keys = {"residues": "crop_size", "rows": "max_msa_clusters", "extra_rows": "max_extra_msa"}
    sizes = {
        field: _count(f"data.train.{key}", changed(s, [f"data.train.{key}"], getattr(found, field)))
        for field, key in keys.items()
    }
    templates = changed(s, ["model.template.enabled"], found.templates) is True
    return dataclasses.replace(found, templates=templates, **sizes)


def blocks_per_ckpt(s: Setup) -> int | None:
    """Blocks that are recomputed together; None: none is. Raises UserError as `crop` does."""
    value = changed(s, CKPT, 1)
    return None if value is None else _count(CKPT[0], value)


def batch_size(s: Setup) -> int:
    """Of one process. Raises UserError as `crop` does."""
    name = "data.data_module.data_loaders.batch_size"
    return _count(name, changed(s, [name], 1))


def _count(name: str, value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise UserError(f"{name} is {json.dumps(value)}", allowed="a whole number above 0")
    return value


def precision(s: Setup) -> str:
    """As Lightning spells it in full, such as bf16-mixed."""
    value = str(arguments(s).get("precision") or "bf16")
    return {"64": "64-true", "32": "32-true", "16": "16-mixed", "bf16": "bf16-mixed"}.get(value, value)
