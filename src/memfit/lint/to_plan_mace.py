"""Convert flags of mace_run_train to a Plan.

Checked against mace/tools/arg_parser.py, mace/cli/run_train.py and mace/tools/train.py of ACEsuit/mace at
667eee4e58d2 (2026-03-01); read 2026-11.
"""

from __future__ import annotations

from memfit.lint.draft import Draft
from memfit.lint.option_reasons import account_for, option_reasons
from memfit.lint.parse import Setup

DEFAULT_CLIP = 10.0
_BATCH, _EMA_DECAY = 10, 0.99


def from_mace(setup: Setup, draft: Draft) -> None:
    """Add the flags of mace_run_train to ``draft``: data parallelism of --distributed (without it, one
    process is predicted), the batch, and the average of weights. The model itself and float64, its default
    precision, cannot be in a plan. The flags that are not in it are listed as left out, with the reasons."""
    options = setup.mace
    assert options is not None
    if options.on("distributed") and draft.ranks > 1:
        draft.take("ddp", "distributed", bucket_view=False)
    elif draft.ranks > 1:
        draft.ranks = 1
        draft.leave("processes", "without --distributed, each process trains by itself: predicted for one")
    elif options.on("distributed") and setup.ranks is None:
        draft.leave(
            "distributed", "the script does not say how many processes train: predicted with the machine's"
        )
    if not options.undetermined("batch_size"):
        draft.micro_batch = options.size("batch_size") or _BATCH
        draft.set_batch(draft.ranks, 1)
    if options.on("ema"):
        decay = options.number("ema_decay")
        is_decay = decay is not None and 0 < decay < 1
        draft.ema = decay if is_decay else _EMA_DECAY
        if not is_decay and (value := options.get("ema_decay")) is not None:
            draft.leave(f"ema_decay {value}", "it is no number above 0 and below 1: predicted without it")
    dtype = str(options.get("default_dtype") or "float64")
    draft.leave(
        f"default_dtype {dtype}",
        "a plan has no float64: build the job's model in it, with twice the bytes of float32"
        if dtype == "float64"
        else "the job's model must be built in it: a plan does not change it",
    )
    if options.raw("optimizer") is None and options.raw("amsgrad") is None:
        reason = option_reasons("mace").reasons["amsgrad"]
        draft.leave("Adam with AMSGrad, the default of mace_run_train", reason)
    account_for(options, "mace", draft)
