"""A plan as a YAML file that people read and edit. Unknown keys are errors.

::

    techniques:
      activation-checkpointing: {every: 1}
      bf16-autocast: {}
    ranks: 8        # processes with one device each; 1 by default
"""

from __future__ import annotations

from pathlib import Path

from memfit.files.read import read_yaml
from memfit.techniques.registry import check, make_use
from memfit.types.errors import MemfitError, UserError, suggest
from memfit.types.plan import Plan

_KEYS_OF_A_PLAN = ("techniques", "ranks", "note", "watch")


def read_plan(path: Path) -> Plan:
    """Read a plan from a YAML file. Raises UserError if the file cannot be read, is not YAML in UTF-8, or
    does not describe a valid plan (see `parse_plan`)."""
    return parse_plan(read_yaml(path), what=str(path))


def parse_plan(data: object, *, what: str) -> Plan:
    """Return the plan that parsed YAML ``data`` describes. The keys ``note`` and ``watch`` (thresholds of
    alarms, `memfit.monitoring.limits`) are ignored.

    Raises UserError if ``data`` is not a mapping. Raises UserError, too, if there are unknown keys, a wrong
    value of ``techniques`` or ``ranks``, unknown techniques or settings, or values that are not allowed: one
    message lists all these problems, but of each technique only the first. These messages begin with
    ``what``, the name of the source.

    If there are no such problems, raises UserError for the first conflict between techniques or, without
    conflicts, for the first technique whose packages are not installed. These messages do not name the
    source.
    """
    if not isinstance(data, dict):
        raise UserError(
            f"{what} is not a plan: it does not contain a mapping",
            allowed=f"a mapping with any of the keys {', '.join(_KEYS_OF_A_PLAN)}",
        )
    problems = [_unknown(key) for key in data if key not in _KEYS_OF_A_PLAN]
    techniques = data.get("techniques") or {}
    if not isinstance(techniques, dict):
        problems.append("the value of techniques is not a mapping of technique names to settings")
        techniques = {}
    ranks = data.get("ranks", 1)
    if not isinstance(ranks, int) or isinstance(ranks, bool) or ranks < 1:
        problems.append(f"the value of ranks is {ranks!r} (allowed: an integer of at least 1)")
    uses = []
    for name, settings in techniques.items():
        try:
            uses.append(make_use(str(name), _settings(str(name), settings)))
        except MemfitError as error:
            problems.append(str(error))
    if problems:
        raise UserError(f"{what} is not valid as a plan: {'. '.join(problems)}")
    return check(Plan(uses=tuple(uses), ranks=ranks))


def _settings(name: str, value: object) -> dict[str, object]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise UserError(
            f"the settings of the technique {name} are {value!r}, which is not a mapping",
            allowed="a mapping of names to values such as {micro_batches: 2}; {} or nothing for the default "
            "settings",
        )
    return {str(k): v for k, v in value.items()}


def _unknown(key: object) -> str:
    hint = suggest(str(key), _KEYS_OF_A_PLAN)
    return f"unknown key {key!r} (allowed: {', '.join(_KEYS_OF_A_PLAN)}{hint and f', {hint}'})"


def plan_text(plan: Plan, *, note: str = "") -> str:
    """Return YAML text that `read_plan` reads back as the same plan. If ``note`` is not empty, it is the
    first entry, ``note: ...``."""
    import yaml

    data: dict[str, object] = {"note": note} if note else {}
    data["techniques"] = plan.to_dict()
    if plan.ranks > 1:
        data["ranks"] = plan.ranks
    return yaml.safe_dump(data, sort_keys=False, allow_unicode=True)
