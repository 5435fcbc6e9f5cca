"""Rules for arguments of the Trainer that contradict each other, and for torchtitan's DataLoaders. Checked
against transformers 5.24 (training_args.py, _validate_args) and torch's DataLoader; read 2026-11."""

from __future__ import annotations

from memfit.lint.parse import Found, Options, Setup
from memfit.lint.phrases import phrase


def _strategy(t: Options, *names: str, default: str) -> str | None:
    """Return the value, in lower case, of the first of the settings ``names`` that is given, or ``default``
    if none is. Return None if the value is known only when the script runs. The boolean false, as which YAML
    reads the word no, is "no"."""
    name = next((n for n in names if t.raw(n) is not None or n in t.unsure), None)
    if name is None:
        return default
    value = t.get(name)
    # YAML reads the word no as False.
    return "no" if value is False else str(value).lower() if value is not None else None


def trainer_best_steps(t: Options, s: Setup) -> Found:
    """Report load_best_model_at_end if saving and evaluation have different strategies, or if both are by
    steps and save_steps is no multiple of eval_steps. Nothing is reported if the strategy of saving is
    "best", or if one of the strategies is known only when a script runs."""
    eval_strategy = _strategy(t, "eval_strategy", "evaluation_strategy", default="no")
    save_strategy = _strategy(t, "save_strategy", default="steps")
    if not t.on("load_best_model_at_end") or eval_strategy is None or save_strategy in (None, "best"):
        return
    if eval_strategy != save_strategy:
        yield {"evaluated": eval_strategy, "saved": save_strategy}
    elif save_strategy == "steps" and not _multiple(*(intervals := _steps(t))):
        saved, evaluated = (phrase("every-steps", interval=f"{interval:g}") for interval in intervals)
        yield {"evaluated": evaluated, "saved": saved}


def _steps(t: Options) -> tuple[float | None, float | None]:
    """Return the intervals of (saving, evaluation): a number of steps, or a fraction of all steps if below 1.
    An interval is None if it is known only when the script runs or is no number. Without save_steps, that of
    saving is 500. Without eval_steps, or if that is 0, the interval of evaluation is logging_steps, whose
    default is 500."""
    logging_interval = 500.0 if t.raw("logging_steps") is None else t.number("logging_steps")
    save_interval = 500.0 if t.raw("save_steps") is None else t.number("save_steps")
    eval_interval = t.number("eval_steps")
    follows_logging = t.raw("eval_steps") is None or eval_interval == 0
    return save_interval, logging_interval if follows_logging else eval_interval


def _multiple(save_interval: float | None, eval_interval: float | None) -> bool:
    """Return whether the interval of saving is a multiple of the interval of evaluation. Intervals below 1
    are fractions of all steps; return False if only one of the two is a fraction. Return True if either is
    None or 0."""
    if not save_interval or not eval_interval:
        return True
    if (save_interval < 1) != (eval_interval < 1):
        return False
    scale = 1_000_000 if save_interval < 1 else 1  # fractions are compared as whole numbers
    return (
        round(save_interval * scale) % round(eval_interval * scale) == 0
        if eval_interval * scale >= 1
        else True
    )


def trainer_no_workers(t: Options, s: Setup) -> Found:
    """Report dataloader_prefetch_factor (above 0) and dataloader_persistent_workers (on) if
    dataloader_num_workers is 0, its default: both settings need worker processes."""
    keys = ["dataloader_prefetch_factor"] if t.size("dataloader_prefetch_factor") else []
    keys += ["dataloader_persistent_workers"] if t.on("dataloader_persistent_workers") else []
    if keys and _none(t, "dataloader_num_workers"):
        yield {"keys": ", ".join(keys)}


def torchtitan_no_workers(t: Options, s: Setup) -> Found:
    """Report prefetch_factor (above 0) and persistent_workers (on) if num_workers of the same table is 0, its
    default: both settings need worker processes. The tables are training.dataloader and
    validation.dataloader."""
    for table in ("training.dataloader", "validation.dataloader"):
        keys = ["prefetch_factor"] if t.size(f"{table}.prefetch_factor") else []
        keys += ["persistent_workers"] if t.on(f"{table}.persistent_workers") else []
        if keys and _none(t, f"{table}.num_workers"):
            yield {"keys": ", ".join(f"{table}.{key}" for key in keys), "table": table}


def _none(o: Options, path: str) -> bool:
    """Return whether the setting at ``path``, a number with the default 0, is 0, null or not given. Return
    False if it is known only when the script runs."""
    return path not in o.unsure and (o.raw(path) is None or o.number(path) == 0)


def trainer_two_warmups(t: Options, s: Setup) -> Found:
    """Report warmup_ratio together with warmup_steps, which takes precedence, if neither is 0."""
    ratio, steps = t.number("warmup_ratio"), t.number("warmup_steps")
    if ratio and steps:
        yield {"ratio": f"{ratio:g}", "steps": f"{steps:g}"}


def trainer_constant_warmup(t: Options, s: Setup) -> Found:
    """Report each of warmup_steps and warmup_ratio that is given and not 0, if lr_scheduler_type is
    "constant": this scheduler has no warm-up."""
    for name in ("warmup_steps", "warmup_ratio"):
        if t.get("lr_scheduler_type") == "constant" and (value := t.number(name)):
            yield {"name": name, "value": f"{value:g}"}


CHECKS = {
    ("trainer",): (
        trainer_best_steps,
        trainer_no_workers,
        trainer_two_warmups,
        trainer_constant_warmup,
    ),
    ("torchtitan",): (torchtitan_no_workers,),
}
