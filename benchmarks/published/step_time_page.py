"""Step time in words and tables: every row with a published speed."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from published.score import Scored, Sweep, Times, told_apart

_NAMES = {
    "tok_s_gpu": "tokens/s/GPU",
    "tok_s_total": "tokens/s",
    "samples_s": "samples/s",
    "step_time_s": "s/step",
}
_RANK, _LARGE_SWEEP = 0.9, 5


def time_in_words(t: Times) -> str:
    begin = f"step time, {t.name}: {t.predicted} of {t.rows} predicted"
    if t.median is None or t.within is None or t.worst is None:
        return begin
    return f"{begin}, median error {t.median:.1%}, {t.within:.0%} within 30%, worst {t.worst:.1%}"


def sweep_in_words(s: Sweep) -> str:
    return (
        f"order, {s.name} ({_NAMES[s.unit]}): {s.rows} rows, rank correlation {s.rank:.2f}, "
        f"{s.pairs:.0%} of pairs, median error {s.median:.1%}"
    )


def speed_line(s: Scored) -> str:
    """What follows a row's memory in the terminal."""
    if s.speed is None:
        return ""
    if s.speed.error is None:
        return f"  step: {s.speed.reason}"
    return f"  step {s.speed.measured_s:.4g} s, predicted {s.speed.predicted_s:.4g} ({s.speed.error:+.1%})"


def tables(record: Mapping[str, Any], why: Mapping[str, str]) -> list[str]:
    rows = [r for r in record["rows"] if r.get("speed_unit")]
    if not rows:
        return []
    lines = ["", "# Step time", "", why["caveats"].strip(), ""]
    lines += [
        "| rows | published | predicted | median error | within 30 % | worst |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for t in record["times"]:
        numbers = " | ".join("-" if t[k] is None else f"{t[k]:.1%}" for k in ("median", "within", "worst"))
        lines.append(f"| {t['name']} | {t['rows']} | {t['predicted']} | {numbers} |")
    lines += ["", *_targets(record), "", "## Order within a source", ""]
    lines += [
        "| source | unit | rows | rank correlation | pairs in order | median error |",
        "|---|---|--:|--:|--:|--:|",
    ]
    lines += [
        f"| {s['name']} | {_NAMES[s['unit']]} | {s['rows']} | {s['rank']:.2f} | {s['pairs']:.0%} "
        f"| {s['median']:.1%} |"
        for s in record["sweeps"]
    ]
    lines += _told_apart(record["sweeps"])
    lines += _held_out(record, why)
    lines += _rows([r for r in rows if r["step_error"] is not None], why, record.get("held_out"))
    refused = [r for r in rows if r["step_error"] is None]
    lines += [
        "",
        "## Step time not expressed",
        "",
        "| id | quality | published | reason |",
        "|---|---|--:|---|",
    ]
    lines += [
        f"| {r['id']} | {r['quality']} | {_value(r['measured_speed'])} {_NAMES[r['speed_unit']]} "
        f"| {r['step_reason'].replace('|', '/')} |"
        for r in refused
    ]
    return lines


def _told_apart(sweeps: Sequence[Mapping[str, Any]]) -> list[str]:
    """What sources say of rows that they do not want compared."""
    lines: list[str] = []
    for source in dict.fromkeys(
        s["name"].partition(", all")[0] for s in sweeps if not s.get("comparable", True)
    ):
        told = told_apart()[source]
        said = [f"from {day} {why}" for day, why in told["since"]] + [f"one row {told['apart'][1]}"]
        lines += ["", f"{source} is cut where the source asks for it ({told['where']}): {'; '.join(said)}."]
    return lines


def _order(found: Sequence[Mapping[str, Any]]) -> tuple[list[float], float, int]:
    """Of comparable rows: rank correlations of large sweeps; pairs in order over the small ones, and how many
    these are."""
    known = [s for s in found if s.get("comparable", True)]
    small = [s for s in known if s["rows"] < _LARGE_SWEEP]
    ordered = sum(s["pairs"] * s["told"] for s in small) / max(1, sum(s["told"] for s in small))
    return [s["rank"] for s in known if s["rows"] >= _LARGE_SWEEP], ordered, len(small)


def _targets(record: Mapping[str, Any]) -> list[str]:
    whole = record["times"][0]
    large, ordered, small = _order(record["sweeps"])
    low = min(large, default=1.0)
    checks = [
        (
            "median error at most 12%",
            whole["median"],
            whole["median"] is not None and whole["median"] <= 0.12,
            True,
        ),
        (
            "nine in ten within 30%",
            whole["within"],
            whole["within"] is not None and whole["within"] >= 0.9,
            True,
        ),
        (
            f"rank correlation at least 0.9 in each of {len(large)} sweeps of 5 or more comparable rows",
            low,
            low >= _RANK,
            False,
        ),
        (
            f"nine in ten pairs in order over the {small} smaller ones",
            ordered,
            ordered >= _RANK,
            True,
        ),
    ]
    lines = ["| target | found | reached |", "|---|--:|---|"]
    for name, found, reached, percent in checks:
        shown = "-" if found is None else f"{found:.1%}" if percent else f"{found:.2f} at least"
        lines.append(f"| {name} | {shown} | {'yes' if reached else 'no'} |")
    return lines


_KINDS = {
    "before": "as they stood before",
    "left out": "chosen without the row's source",
    "left out, said": "chosen without the row's source, but for what papers, code and logs say",
    "used": "as used",
    "all": "chosen on all rows",
}


def held_out_in_words(found: Mapping[str, Any]) -> list[str]:
    return [f"constants {name}: {numbers}" for name, numbers in _summaries(found, ", ")]


def _summaries(found: Mapping[str, Any], between: str) -> list[tuple[str, str]]:
    lines = []
    for key, name in _KINDS.items():
        whole = found["summary"][key]["times"][0]
        large, ordered, _ = _order(found["summary"][key]["sweeps"])
        errors = [f"{whole[k]:.1%}" for k in ("median", "within", "worst")]
        ranks = " ".join(f"{x:.2f}" for x in sorted(large))
        lines.append((name, between.join([*errors, ranks or "-", f"{ordered:.1%}"])))
    return lines


def _held_out(record: Mapping[str, Any], why: Mapping[str, str]) -> list[str]:
    found = record.get("held_out")
    if not found:
        return []
    lines = ["", "## Leave one source out", "", why["held_out"].strip(), ""]
    lines += [
        "| constants | median error | within 30 % | worst | ranks of large sweeps | pairs in smaller ones |",
        "|---|--:|--:|--:|---|--:|",
    ]
    lines += [f"| {name} | {numbers} |" for name, numbers in _summaries(found, " | ")]
    lines += [
        "",
        "| constant | before | used | on all rows | without each source | said by |",
        "|---|--:|--:|--:|---|---|",
    ]
    for i, choice in enumerate(found["choices"]):
        took: dict[float, list[str]] = {}
        for name, levels in found["families"].items():
            took.setdefault(levels[i], []).append(name)
        most = max(took, key=lambda level: len(took[level]))
        others = [f"{level:g} without {', '.join(names)}" for level, names in took.items() if level != most]
        chosen = "; ".join([f"{most:g}", *others])
        known = " | ".join(f"{level:g}" for level in (choice["levels"][0], choice["used"], found["all"][i]))
        lines.append(f"| {choice['name']} | {known} | {chosen} | {choice['said']} |")
    return [*lines, *_families(record["rows"], found)]


def _families(rows: Sequence[Mapping[str, Any]], found: Mapping[str, Any]) -> list[str]:
    """Median errors of each family's rows."""
    lines = ["", "| source left out | rows | before | left out | used |", "|---|--:|--:|--:|--:|"]
    known = [r for r in rows if r["id"] in found["rows"]]
    for name in found["families"]:
        own = [r for r in known if found["family"][r["source"]] == name]
        steps = [{**found["rows"][r["id"]], "used_s": r["step_s"]} for r in own]
        middles = [
            statistics.median(abs(s[k] / r["measured_step_s"] - 1) for s, r in zip(steps, own, strict=True))
            for k in ("before_s", "left_out_s", "used_s")
        ]
        lines.append(f"| {name} | {len(own)} | {' | '.join(f'{m:.1%}' for m in middles)} |")
    return lines


def _rows(
    rows: Sequence[Mapping[str, Any]], why: Mapping[str, str], held: Mapping[str, Any] | None
) -> list[str]:
    head, line = ("error | left out", "--:|--:") if held else ("error", "--:")
    lines = [
        "",
        "## Step time, every row",
        "",
        f"| id | quality | unit | published | predicted | step | predicted | {head} | most of it | why |",
        f"|---|---|---|--:|--:|--:|--:|{line}|---|---|",
    ]
    for r in rows:
        most = sorted(r["busy_s"].items(), key=lambda kv: -kv[1])[:3]
        shares = ", ".join(f"{name} {busy / r['step_s']:.0%}" for name, busy in most)
        numbers = f"{_value(r['measured_speed'])} | {_value(r['predicted_speed'])}"
        seconds = f"{r['measured_step_s']:.4g} s | {r['step_s']:.4g} s"
        error = f"{r['step_error']:+.1%} |"
        if held:
            error += f" {held['rows'][r['id']]['left_out_s'] / r['measured_step_s'] - 1:+.1%} |"
        unit = _NAMES[r["speed_unit"]]
        lines.append(
            f"| {r['id']} | {r['quality']} | {unit} | {numbers} | {seconds} | {error} "
            f"{shares} | {_why(r, why)} |"
        )
    return lines


def _value(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"


def _why(row: Mapping[str, Any], why: Mapping[str, str]) -> str:
    """What is known about a row more than 15 % off."""
    if abs(row["step_error"]) < 0.15:
        return ""
    return next((text for start, text in why["rows"].items() if row["id"].startswith(start)), "not known")
