"""Rules for OpenFold's settings. Checked against OpenFold at ce0029e (train_openfold.py,
openfold/config.py, openfold/model/, openfold/utils/checkpointing.py) and Lightning 2.6
(strategies/deepspeed.py); read 2026-11."""

from __future__ import annotations

from memfit.lint import openfold
from memfit.lint.parse import OPENFOLD_PARTS, Found, Options, Setup
from memfit.lint.phrases import Series, phrase


def openfold_seed(o: Options, s: Setup) -> Found:
    """Report a number of processes above 1 without --seed: train_openfold.py refuses to start."""
    if s.ranks is not None and s.ranks > 1 and o.raw("seed") is None and "seed" not in o.unsure:
        yield {"ranks": s.ranks}


def openfold_fp16_deepspeed(o: Options, s: Setup) -> Found:
    """Report --precision 16 together with --deepspeed_config_path: train_openfold.py refuses to start."""
    if str(o.get("precision")) == "16" and o.raw("deepspeed_config_path") is not None:
        yield {}


def openfold_accumulation(o: Options, s: Setup) -> Found:
    """Report --accumulate_grad_batches above 1: it has no effect, because train_openfold.py does not pass it
    to its Trainer."""
    if (steps := o.size("accumulate_grad_batches")) and steps > 1:
        yield {"steps": steps}


def openfold_preset(o: Options, s: Setup) -> Found:
    """Report a --config_preset that OpenFold does not have. Names of presets for networks other than the one
    for single chains, which begin with "seq" or contain "multimer", are skipped."""
    name = openfold.preset(s)
    is_known = name in openfold.PRESETS or name is None
    if not is_known and not str(name).startswith("seq") and "multimer" not in str(name):
        yield {"name": name, "known": ", ".join(openfold.PRESETS)}


def openfold_unknown_key(c: Options, s: Setup) -> Found:
    """Report the top-level keys of OpenFold's JSON, and the keys below "globals", that OpenFold does not
    have. OpenFold adds them to its configuration, but nothing reads them."""
    keys = [f"globals.{k}" for k in c.section("globals") if k not in openfold.GLOBALS]
    keys += [k for k in c.data if k not in OPENFOLD_PARTS]
    if keys:
        yield {"keys": ", ".join(keys)}


def openfold_two_kernels(c: Options, s: Setup) -> Found:
    """Report attention kernels of which more than one is switched on in "globals":
    use_deepspeed_evo_attention, use_lma and use_flash."""
    enabled_kernels = [k for k in openfold.KERNELS if c.raw(f"globals.{k}") is True]
    if len(enabled_kernels) > 1:
        yield {"used": Series(tuple(enabled_kernels), "and")}


def openfold_chunk_training(c: Options, s: Setup) -> Found:
    """Report a chunk_size in "globals" that is not null, unless tune_chunk_size, which is on by default, is
    switched off: with both, OpenFold stops in training."""
    chunk = openfold.changed_value(s, ["globals.chunk_size"])
    if chunk is not None and openfold.changed_value(s, openfold.TUNED, True) is True:
        yield {"chunk": chunk}


def openfold_blocks_per_ckpt(c: Options, s: Setup) -> Found:
    """Report a blocks_per_ckpt, the number of blocks recomputed together, above the number of blocks of a
    stack. The Evoformer (48 blocks) and the template stack (2 blocks) share the setting: the limit is 2 if
    the network has templates or is unknown, otherwise 48."""
    blocks_per_group, crop = openfold.blocks_per_ckpt(s), openfold.crop(s)
    if blocks_per_group is None:
        return
    has_templates = crop is None or crop.templates
    max_blocks = openfold.TEMPLATE_BLOCKS if has_templates else openfold.EVOFORMER_BLOCKS
    if blocks_per_group > max_blocks:
        yield {
            "together": blocks_per_group,
            "most": max_blocks,
            "stack": phrase("template-stack" if has_templates else "evoformer-stack"),
        }


def openfold_extra_ckpt(c: Options, s: Setup) -> Found:
    """Report that the extra-MSA stack is recomputed although the set-up sets blocks_per_ckpt to null
    (default: 1), which switches the recomputation of the other stacks off: this stack has a setting of its
    own, which is on by default. Report nothing if that is off."""
    if openfold.blocks_per_ckpt(s) is None and openfold.changed_value(s, [openfold.EXTRA_CKPT], True) is True:
        yield {}


def openfold_deepspeed_accumulation(o: Options, d: Options, s: Setup) -> Found:
    """Report gradient_accumulation_steps in DeepSpeed's file, which Lightning refuses."""
    if (steps := d.raw("gradient_accumulation_steps")) is not None:
        yield {"steps": steps}


def openfold_deepspeed_stage3(o: Options, d: Options, s: Setup) -> Found:
    """Report ZeRO stage 3 in DeepSpeed's file: OpenFold's moving average of the parameters needs whole
    parameters on each process."""
    if d.count("zero_optimization.stage") == 3:
        yield {}


CHECKS = {
    ("openfold",): (openfold_seed, openfold_fp16_deepspeed, openfold_accumulation, openfold_preset),
    ("openfold_config",): (
        openfold_unknown_key,
        openfold_two_kernels,
        openfold_chunk_training,
        openfold_blocks_per_ckpt,
        openfold_extra_ckpt,
    ),
    ("openfold", "deepspeed"): (openfold_deepspeed_accumulation, openfold_deepspeed_stage3),
}
