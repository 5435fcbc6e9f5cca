"""What goes wrong in OpenFold's settings. Checked against OpenFold at ce0029e (train_openfold.py,
openfold/config.py, openfold/model/, openfold/utils/checkpointing.py) and Lightning 2.6
(strategies/deepspeed.py); read 2026-11."""

from __future__ import annotations

from memfit.lint import openfold
from memfit.lint.parse import OPENFOLD_PARTS, Found, Options, Setup


def openfold_seed(o: Options, s: Setup) -> Found:
    if s.ranks is not None and s.ranks > 1 and o.raw("seed") is None and "seed" not in o.unsure:
        yield {"ranks": s.ranks}


def openfold_fp16_deepspeed(o: Options, s: Setup) -> Found:
    if str(o.get("precision")) == "16" and o.raw("deepspeed_config_path") is not None:
        yield {}


def openfold_accumulation(o: Options, s: Setup) -> Found:
    if (steps := o.size("accumulate_grad_batches")) and steps > 1:
        yield {"steps": steps}


def openfold_preset(o: Options, s: Setup) -> Found:
    name = openfold.preset(s)
    known = name in openfold.PRESETS or name is None
    if not known and not str(name).startswith("seq") and "multimer" not in str(name):
        yield {"name": name, "known": ", ".join(openfold.PRESETS)}


def openfold_unknown_key(c: Options, s: Setup) -> Found:
    """It is added to the configuration, where nobody reads it."""
    keys = [f"globals.{k}" for k in c.section("globals") if k not in openfold.GLOBALS]
    keys += [k for k in c.data if k not in OPENFOLD_PARTS]
    if keys:
        yield {"keys": ", ".join(keys)}


def openfold_two_kernels(c: Options, s: Setup) -> Found:
    used = [k for k in openfold.KERNELS if c.raw(f"globals.{k}") is True]
    if len(used) > 1:
        yield {"used": " and ".join(used)}


def openfold_chunk_training(c: Options, s: Setup) -> Found:
    chunk = openfold.changed(s, ["globals.chunk_size"])
    if chunk is not None and openfold.changed(s, openfold.TUNED, True) is True:
        yield {"chunk": chunk}


def openfold_blocks_per_ckpt(c: Options, s: Setup) -> Found:
    """Template blocks are recomputed in groups of the same size, which must not be more than there are."""
    together, asked = openfold.blocks_per_ckpt(s), openfold.crop(s)
    if together is None:
        return
    templates = asked is None or asked.templates
    most = openfold.TEMPLATE_BLOCKS if templates else openfold.EVOFORMER_BLOCKS
    if together > most:
        yield {"together": together, "most": most, "stack": "template" if templates else "Evoformer"}


def openfold_extra_ckpt(c: Options, s: Setup) -> Found:
    if openfold.blocks_per_ckpt(s) is None and openfold.changed(s, [openfold.EXTRA_CKPT], True) is True:
        yield {}


def openfold_deepspeed_accumulation(o: Options, d: Options, s: Setup) -> Found:
    if (steps := d.raw("gradient_accumulation_steps")) is not None:
        yield {"steps": steps}


def openfold_deepspeed_stage3(o: Options, d: Options, s: Setup) -> Found:
    if d.count("zero_optimization.stage") == 3:
        yield {}


CHECKS = {
    ("openfold",): (openfold_seed, openfold_fp16_deepspeed, openfold_accumulation, openfold_preset),
    ("openfold_config",): (
        openfold_unknown_key, openfold_two_kernels, openfold_chunk_training, openfold_blocks_per_ckpt,
        openfold_extra_ckpt,
    ),
    ("openfold", "deepspeed"): (openfold_deepspeed_accumulation, openfold_deepspeed_stage3),
}  # fmt: skip
