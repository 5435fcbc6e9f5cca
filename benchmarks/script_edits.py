"""Public training scripts, edited by `memfit plan --diff`: do they peak as predicted and train the same?

    python benchmarks/script_edits.py [NAME ...] --sources DIR     edit, run, predict, record
    python benchmarks/script_edits.py --page                       the page from the records only

scripts/script_edits.toml has the edits (scripts, plans, number of steps) and the margins, fixed before the
first run; scripts.py says where the scripts come from. The diff is printed, and applied with `patch` to a
copy beside the script, which is removed again. Peaks and losses are counted in the script's own processes by
scripts/counting/sitecustomize.py, which knows nothing of the plan. If losses differ by more than the margin,
controls run (added after the first results): the script as published, with each of its first weights off by
the rounding of the type in which the edited one computes. Every number in the page comes from
benchmarks/records/script_edits.jsonl; of several records of an edit the latest counts.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime
import json
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

sys.path.insert(0, str(Path(__file__).parent))

from scripts.corpus import PublicScript, ScriptError, check_unmodified, load_scripts
from scripts.measure import PREDICTED_STEPS, environment_of, measure, predict, prepare

from memfit.export.script_diff import ScriptDiff, read_script, script_diff
from memfit.techniques.plan_file import parse_plan
from memfit.techniques.registry import effect_of
from memfit.types.errors import UserError
from memfit.types.plan import Plan

HERE = Path(__file__).parent
RECORDS, PAGE = HERE / "records" / "script_edits.jsonl", HERE / "script_edits.md"
_COLUMNS = (
    "script",
    "plan",
    "class",
    "edit",
    "before",
    "measured",
    "predicted",
    "error",
    "loss",
    "allowed",
    "controls",
    "holds",
)
ROUNDING = {"E0": 0.0, "E1": 2.0**-24, "E2": 2.0**-9}  # of float32, of bfloat16
LIST = HERE / "scripts" / "script_edits.toml"


@dataclass(frozen=True, slots=True, kw_only=True)
class Edit:
    script: str
    effect: str
    plan: Mapping[str, Mapping[str, Any]]
    replace: Mapping[str, str] = field(default_factory=dict)
    batch: int = 1

    @property
    def name(self) -> str:
        return f"{self.script}-{self.effect}"

    def parsed(self) -> Plan:
        plan = parse_plan({"techniques": dict(self.plan)}, what=self.name)
        assert effect_of(plan).name == self.effect, f"{self.name}: {effect_of(plan).name}"
        return plan


@dataclass(frozen=True, slots=True, kw_only=True)
class Protocol:
    steps: int
    peak_ratio: float
    torch_seed: int
    controls: int
    loss_ratio: Mapping[str, float]
    edit: tuple[Edit, ...]


def load_protocol() -> Protocol:
    """Return the protocol. Unknown keys raise pydantic's ValidationError."""
    return TypeAdapter(Protocol).validate_python(tomllib.loads(LIST.read_text(encoding="utf-8")))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="of a script or an edit such as nanogpt-E1")
    parser.add_argument("--sources", type=Path, help="folder of the checkouts, as for scripts.py")
    parser.add_argument("--page", action="store_true")
    options = parser.parse_args()
    protocol = load_protocol()
    if not options.page:
        if options.sources is None:
            parser.error("--sources DIR is needed")
        originals: dict[str, dict[str, Any]] = {}
        for edit in protocol.edit:
            if not options.names or {edit.name, edit.script} & set(options.names):
                _record(edit, protocol, options.sources.resolve(), originals)
    records = [json.loads(line) for line in RECORDS.read_text(encoding="utf-8").splitlines()]
    PAGE.write_text(page(protocol, records), encoding="utf-8")
    return 0


def _record(edit: Edit, protocol: Protocol, sources: Path, originals: dict[str, dict[str, Any]]) -> None:
    script = load_scripts()[edit.script]
    try:
        check_unmodified(script, sources)
        record = _run(edit, protocol, script, sources, originals)
    except (ScriptError, UserError) as error:
        reason = [part.strip() for part in str(error).split(" | ") if part.strip()][-1]
        record = {"edit": edit.name, "plan": edit.parsed().label, "error": reason}
    record |= {
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "script": script.name,
        "commit": script.commit,
        "environment": environment_of(script),
    }
    with RECORDS.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record, ensure_ascii=False) + "\n")
    print(_row(protocol, record), flush=True)


def _run(
    edit: Edit,
    protocol: Protocol,
    script: PublicScript,
    sources: Path,
    originals: dict[str, dict[str, Any]],
) -> dict[str, Any]:
    command = script.command
    for old, new in edit.replace.items():
        assert old in command, f"{edit.name}: no {old} in the command"
        command = command.replace(old, new)
    script = dataclasses.replace(script, command=command, torch_seed=protocol.torch_seed)
    work = prepare(script, sources)
    plan = edit.parsed()
    diff = script_diff(read_script(script.file(sources)), plan, batch_size=edit.batch, on_host=True)
    print(f"\n{edit.name}: {plan.label}\n{diff.diff}", *diff.remarks, sep="\n", flush=True)
    if not diff.diff:
        raise ScriptError(f"not edited: {diff.reason}")
    if command not in originals:
        runs = [measure(script, sources, work, repeats=1, steps=protocol.steps) for _ in range(2)]
        originals[command] = runs[0] | {"reproducible": _losses(runs[0]) == _losses(runs[1])}
    original = originals[command]
    with _edited(script, diff, sources) as copy:
        predicted = predict(copy, sources, work)
        peak_steps = predicted.get("steps", PREDICTED_STEPS)
        measured = measure(copy, sources, work, repeats=1, steps=protocol.steps, peak_steps=peak_steps)
    record = {
        "edit": edit.name,
        "effect": edit.effect,
        "plan": plan.label,
        "idiom": "memfit.apply" if "memfit.apply(" in diff.diff else "the library's arguments",
        "lines_added": _count(diff.diff, "+"),
        "lines_removed": _count(diff.diff, "-"),
        "remarks": diff.remarks,
        "replace": dict(edit.replace),
        "original": {
            "peak_bytes": original["peak_bytes"],
            "losses": _losses(original),
            "reproducible": original["reproducible"],
        },
        "edited": {
            "peak_bytes": measured["peak_bytes"],
            "losses": _losses(measured),
            "backward_calls": [s["backward_calls"] for s in measured["ranks"][0]["steps"]],
        },
        "predicted": predicted,
    }
    if loss_ratio(record) > protocol.loss_ratio[edit.effect] and (nudge := ROUNDING[edit.effect]):
        runs = [
            measure(script, sources, work, repeats=1, steps=protocol.steps, nudge=nudge, nudge_seed=seed)
            for seed in range(1, protocol.controls + 1)
        ]
        record["controls"] = {"nudge": nudge, "losses": [_losses(run) for run in runs]}
    return record


@contextlib.contextmanager
def _edited(script: PublicScript, diff: ScriptDiff, sources: Path) -> Iterator[PublicScript]:
    """Yield the script with its file's edited copy, which stands beside it for the time being."""
    path = script.file(sources)
    copy = path.with_name(f"{path.stem}_edited.py")
    shutil.copyfile(path, copy)
    try:
        patch = ["patch", "--no-backup-if-mismatch", str(copy)]
        subprocess.run(patch, input=diff.diff, text=True, check=True, capture_output=True)
        yield dataclasses.replace(script, command=script.command.replace(path.name, copy.name, 1))
    finally:
        copy.unlink()


def _count(diff: str, sign: str) -> int:
    lines = diff.splitlines()[2:]
    return sum(line.startswith(sign) for line in lines)


def _losses(measured: Mapping[str, Any]) -> list[float]:
    return [step["loss"] for step in measured["ranks"][0]["steps"]]


# -- the page -------------------------------------------------------------------------------------


def loss_ratio(record: Mapping[str, Any], losses: Sequence[float] | None = None) -> float:
    """Return the largest relative difference between the losses of the copy, or ``losses``, and of the
    original."""
    pairs = zip(losses or record["edited"]["losses"], record["original"]["losses"], strict=True)
    return max(abs(a - b) / abs(b) if a != b else 0.0 for a, b in pairs)


def control_ratios(record: Mapping[str, Any]) -> list[float]:
    """Return what `loss_ratio` is for each control; empty if none ran."""
    return [loss_ratio(record, losses) for losses in record.get("controls", {}).get("losses", ())]


def is_as_controls(record: Mapping[str, Any]) -> bool:
    """Return whether a control differs as much as the edited script."""
    return "error" not in record and loss_ratio(record) <= max(control_ratios(record), default=-1)


def peak_error(record: Mapping[str, Any]) -> float | None:
    """Return (predicted - measured) / measured, None without a prediction."""
    predicted = record["predicted"].get("allocated_bytes")
    return predicted["value"] / record["edited"]["peak_bytes"] - 1 if predicted else None


def holds(protocol: Protocol, record: Mapping[str, Any]) -> tuple[bool, bool]:
    """Return whether (the peak, the losses) are within the margins."""
    if "error" in record:
        return False, False
    error = peak_error(record)
    peak = error is not None and abs(error) <= protocol.peak_ratio
    same = record["original"]["reproducible"] and loss_ratio(record) <= protocol.loss_ratio[record["effect"]]
    return peak, same


def page(protocol: Protocol, history: Sequence[Mapping[str, Any]]) -> str:
    latest = {r["edit"]: r for r in history}
    first = {r["edit"]: r for r in reversed(history)}
    records = [latest[e.name] for e in protocol.edit if e.name in latest]
    lines = [
        "# Public training scripts, edited for a plan",
        "",
        "Generated by `python benchmarks/script_edits.py` from `benchmarks/records/script_edits.jsonl`; do",
        "not edit. Scripts, plans, steps and margins were fixed in",
        "[script_edits.toml](scripts/script_edits.toml) before the first run; [scripts.md](scripts.md) says",
        "where the scripts come from. One machine's CPU.",
        "",
        "`edit`: the lines that `memfit plan --diff` adds and removes. `measured`: the peak of live tensor",
        "bytes of the edited script, from its first forward pass to the end of the last traced step;",
        "`before`: that of the script. `predicted`: `memfit estimate -- COMMAND` of the edited script.",
        "`loss`: the largest relative difference from the losses of the script as published over",
        f"{protocol.steps} steps from the same seed, recorded where `backward` is called. `controls`, where",
        "that is more than allowed: the smallest and the largest difference of the script as published from",
        "itself with its first weights off by the rounding of float32 (E1) or bfloat16 (E2), in",
        f"{protocol.controls} draws of the signs. What lies within is the training's own: it enlarges any",
        "rounding so much.",
        "",
        f"- {_summary(protocol, records)}",
        f"- in the first record of each edit: {_summary(protocol, [first[r['edit']] for r in records])}",
        "",
        f"| {' | '.join(_COLUMNS)} |",
        "|---|---|---|---|--:|--:|--:|--:|--:|--:|--:|---|",
        *(_row(protocol, r) for r in records),
    ]
    lines += ["", *(f"- `{r['edit']}`: with {_replacements(r)}" for r in records if r.get("replace"))]
    lines += [f"- `{r['edit']}`: {_judged(r)}" for r in records if control_ratios(r)]
    return "\n".join(lines) + "\n"


def _replacements(record: Mapping[str, Any]) -> str:
    return ", ".join(f"`{new}` in place of `{old}`" for old, new in record["replace"].items())


def _judged(record: Mapping[str, Any]) -> str:
    """Return how the losses outside the margin compare with those of the controls."""
    ratios, edited = control_ratios(record), record["edited"]["losses"]
    more = sum(ratio >= loss_ratio(record) for ratio in ratios)
    pairs = zip(edited, record["original"]["losses"], strict=True)
    by_step = ", ".join(f"{abs(a - b) / abs(b):.1e}" for a, b in pairs)
    return (
        f"{more} of {len(ratios)} controls differ as much or more; the edit differs step by step by {by_step}"
    )


def _summary(protocol: Protocol, records: Sequence[Mapping[str, Any]]) -> str:
    peaks, losses = zip(*(holds(protocol, r) for r in records), strict=True)
    errors = [abs(e) for r in records if "error" not in r and (e := peak_error(r)) is not None]
    worst = f", worst {max(errors):.3%}" if errors else ""
    own = sum(is_as_controls(r) for r in records)
    more = f", {own} more differ no more than their controls do" if own else ""
    return (
        f"{sum(peaks)} of {len(records)} peaks within {protocol.peak_ratio:.1%} of the prediction{worst};"
        f" {sum(losses)} of {len(records)} losses as the effect class says{more}"
    )


def _row(protocol: Protocol, record: Mapping[str, Any]) -> str:
    if "error" in record:
        reason = record["error"]
        return f"| {record['script']} | {record['plan']} | {record['edit'][-2:]} | {reason} |" + " |" * 8
    error, ratio = peak_error(record), loss_ratio(record)
    predicted = record["predicted"].get("allocated_bytes")
    cells = (
        record["script"],
        record["plan"],
        record["effect"],
        f"{record['idiom']}, +{record['lines_added']} -{record['lines_removed']}",
        _mib(record["original"]["peak_bytes"]),
        _mib(record["edited"]["peak_bytes"]),
        _mib(predicted["value"]) if predicted else f"none: {record['predicted']['error'][-80:]}",
        "" if error is None else f"{error:+.3%}",
        ("equal" if ratio == 0 else f"{ratio:.1e}")
        + ("" if record["original"]["reproducible"] else " (the original's own losses differ)"),
        f"{protocol.loss_ratio[record['effect']]:g}",
        f"{min(ratios):.1e} to {max(ratios):.1e}" if (ratios := control_ratios(record)) else "",
        _verdict(protocol, record),
    )
    return f"| {' | '.join(cells)} |"


def _verdict(protocol: Protocol, record: Mapping[str, Any]) -> str:
    peak, same = holds(protocol, record)
    if peak and not same and is_as_controls(record):
        return "as its controls"
    return "yes" if peak and same else "no"


def _mib(count_bytes: float) -> str:
    return f"{count_bytes / 2**20:.2f} MiB"


if __name__ == "__main__":
    sys.exit(main())
