"""What the Trainer's own arguments say against each other. Checked against transformers 5.24
(training_args.py, _validate_args) and torch's DataLoader; read 2026-11."""

from __future__ import annotations

from memfit.lint.parse import Found, Options, Setup


def _strategy(t: Options, *names: str, default: str) -> str | None:
    """The first that is given; None where it is only known when run."""
    name = next((n for n in names if t.raw(n) is not None or n in t.unsure), None)
    if name is None:
        return default
    value = t.get(name)
    return "no" if value is False else str(value).lower() if value is not None else None  # YAML's no


def trainer_best_steps(t: Options, s: Setup) -> Found:
    """Saving may also be by the best."""
    evaluated = _strategy(t, "eval_strategy", "evaluation_strategy", default="no")
    saved = _strategy(t, "save_strategy", default="steps")
    if not t.on("load_best_model_at_end") or evaluated is None or saved in (None, "best"):
        return
    if evaluated != saved:
        yield {"evaluated": evaluated, "saved": saved}
    elif saved == "steps" and not _multiple(*(steps := _steps(t))):
        yield {"evaluated": f"steps, every {steps[1]:g}", "saved": f"steps, every {steps[0]:g}"}


def _steps(t: Options) -> tuple[float | None, float | None]:
    """Of saving and of evaluation."""
    logged = 500.0 if t.raw("logging_steps") is None else t.number("logging_steps")
    saved = 500.0 if t.raw("save_steps") is None else t.number("save_steps")
    return saved, logged if t.raw("eval_steps") in (None, 0) else t.number("eval_steps")


def _multiple(saved: float | None, evaluated: float | None) -> bool:
    """Steps, or shares of all steps; where one is not known they may be."""
    if not saved or not evaluated:
        return True
    if (saved < 1) != (evaluated < 1):
        return False
    times = 1_000_000 if saved < 1 else 1  # shares are compared as whole numbers
    return round(saved * times) % round(evaluated * times) == 0 if evaluated * times >= 1 else True


def trainer_no_workers(t: Options, s: Setup) -> Found:
    keys = ["dataloader_prefetch_factor"] if t.size("dataloader_prefetch_factor") else []
    keys += ["dataloader_persistent_workers"] if t.on("dataloader_persistent_workers") else []
    if keys and _none(t, "dataloader_num_workers"):
        yield {"keys": ", ".join(keys)}


def torchtitan_no_workers(t: Options, s: Setup) -> Found:
    for table in ("training.dataloader", "validation.dataloader"):
        keys = ["prefetch_factor"] if t.size(f"{table}.prefetch_factor") else []
        keys += ["persistent_workers"] if t.on(f"{table}.persistent_workers") else []
        if keys and _none(t, f"{table}.num_workers"):
            yield {"keys": ", ".join(f"{table}.{key}" for key in keys), "table": table}


def _none(o: Options, path: str) -> bool:
    """Not given, where the default is 0, or 0."""
    return path not in o.unsure and (o.raw(path) is None or o.number(path) == 0)


def trainer_two_warmups(t: Options, s: Setup) -> Found:
    ratio, steps = t.number("warmup_ratio"), t.number("warmup_steps")
    if ratio and steps:
        yield {"ratio": f"{ratio:g}", "steps": f"{steps:g}"}


def trainer_constant_warmup(t: Options, s: Setup) -> Found:
    for name in ("warmup_steps", "warmup_ratio"):
        if t.get("lr_scheduler_type") == "constant" and (value := t.number(name)):
            yield {"name": name, "value": f"{value:g}"}


CHECKS = {
    ("trainer",): (
        trainer_best_steps, trainer_no_workers, trainer_two_warmups, trainer_constant_warmup,
    ),
    ("torchtitan",): (torchtitan_no_workers,),
}  # fmt: skip
