"""What is printed and written: a line a row, the statistics, and the page made of a record."""

from __future__ import annotations

import dataclasses
import statistics
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from published.score import Answer, Scored, Statistic, statistic

HEADER = f"{'id':32} {'quality':7} {'kind':10} {'measured':>9} {'predicted':>9} {'error':>7}  (GiB)"
_LARGE, _LARGE_STEP = 0.03, 0.15
_FOLDER = Path(__file__).parent
_UNITS = {
    "tok_s_gpu": "tokens/s/GPU",
    "tok_s_total": "tokens/s",
    "samples_s": "samples/s",
    "step_time_s": "s/step",
}
_LINES = (("predicted", "predicted rows"), ("all", "refused rows are misses"))


# -- the terminal -----------------------------------------------------------------------------------------


def line(s: Scored) -> str:
    row = s.as_row()
    numbers = f"{_size(row['measured']):>9} {_size(row['predicted']):>9} {_signed(s.error):>7}"
    remark = ("rejected: " if s.rejected else "") + s.reason or ("card full" if s.full else "")
    return f"{s.id:32} {s.quality:7} {s.kind:10} {numbers}  {remark}".rstrip() + _speed(s)


def _speed(s: Scored) -> str:
    if s.speed is None:
        return ""
    if s.speed.error is None:
        return f"  step: {s.speed.reason}"
    return f"  step {s.speed.measured_s:.4g} s, predicted {s.speed.predicted_s:.4g} ({s.speed.error:+.1%})"


def in_words(s: Statistic) -> list[str]:
    """Both lines of a statistic."""
    begin = f"{s.name}: {s.predicted.rows} of {s.all.rows} predicted, {s.rejected} of the file rejected"
    return [begin, *(f"  {name}: {_words(getattr(s, key))}" for key, name in _LINES)]


def _words(errors: Any) -> str:
    numbers = [_percent(v) for v in (errors.median_of_sources, errors.median, errors.worst, errors.inside)]
    return "median of sources {}, of rows {}, worst {}; inside of the interval {}".format(*numbers)


def held_out_in_words(found: Mapping[str, Any]) -> list[str]:
    return [
        f"constants {name}: median of sources {_percent(errors['median_of_sources'])}, "
        f"within 30 % {_percent(errors['within'])}"
        for key, name in _KINDS.items()
        if key in found["summary"]
        for errors in [found["summary"][key]["times"][0]["predicted"]]
    ]


def _size(gib: float | None) -> str:
    return "-" if gib is None else f"{gib:.2f}"


def _percent(value: float | None) -> str:
    return "a miss" if value is None else f"{value:.1%}"


def _signed(value: float | None) -> str:
    return "-" if value is None else f"{value:+.1%}"


def _cell(text: str) -> str:
    return text.replace("|", "/")


# -- the page ---------------------------------------------------------------------------------------------


def page(record: Mapping[str, Any]) -> str:
    """Caveats first, then targets and statistics, then every row with what explains a large error."""
    why = tomllib.loads((_FOLDER / "why.toml").read_text(encoding="utf-8"))
    environment = record["environment"]
    minutes = "in parts" if "--resume" in record["command"] else f"{record['took_s'] / 60:.0f} minutes"
    took = f"{minutes}, cores {environment['cores']}"
    made = f"torch {environment['torch']}, {record['created'][:10]}"
    lines = [
        "# Published training runs",
        "",
        why["caveats"].strip(),
        "",
        f"Command: `{record['command']}`, {took}, {made}.",
        "Generated from `benchmarks/records/published.jsonl`. Sizes in GiB.",
        "",
        *_carried(record),
        *_blind(record, why["blind"]),
        "## Targets",
        "",
        *_targets(record),
        *_memory(record, why),
    ]
    if record["times"][0]["all"]["rows"]:
        lines += _step_time(record, why["time"])
    return "\n".join(lines) + "\n"


def _carried(record: Mapping[str, Any]) -> list[str]:
    """What was not predicted by this run."""
    carried = record.get("carried", {})
    told = []
    if "rows" in carried:
        told.append(
            f"{carried['rows']} rows are those of {carried['created'][:16]}, with the intervals of then"
        )
    if "times" in carried:
        told.append(f"step times are those of {carried['times'][:16]}")
    return [f"Of earlier runs: {'; '.join(told)} (UTC).", ""] if told else []


def _blind(record: Mapping[str, Any], why: Mapping[str, str]) -> list[str]:
    """Their first scores, whatever later code says."""
    found = list(record["first_scores"].values())
    lines = ["## Blind rows, as they were scored first", ""]
    if not found:
        return [*lines, "None: every row was seen before rules were written (PROTOCOL.md, 7).", ""]
    sizes = [
        Answer(source=r["source"], error=r["error"], inside=r["inside"], width=_width(r))
        for r in found
        if not r["rejected"] and r["measured"]
    ]
    steps = [
        Answer(source=r["source"], error=r["step_error"], inside=r["step_inside"])
        for r in found
        if r.get("speed_unit")
    ]
    rejected = sum(r["rejected"] for r in found)
    kinds = [statistic("memory", sizes, rejected), statistic("step time", steps, rejected)]
    lines += [*_statistics([dataclasses.asdict(s) for s in kinds]), "", why["text"].strip(), ""]
    lines += ["| id | scored by | kind | measured | predicted | error | in interval | step | reason |"]
    lines += ["|---|---|---|--:|--:|--:|---|--:|---|"]
    for r in found:
        numbers = f"{_size(r['measured'])} | {_size(r['predicted'])} | {_signed(r['error'])}"
        inside = "-" if r["error"] is None else "yes" if r["inside"] else "no"
        told = f"{_signed(r.get('step_error'))} | {_cell(r['reason'])}"
        lines.append(f"| {r['id']} | {r['blind']} | {r['kind']} | {numbers} | {inside} | {told} |")
    return [*lines, ""]


def _width(row: Mapping[str, Any]) -> float:
    low, high = row["interval"]
    return float(high - low)


_TABLE = [
    "| rows | line | rows | sources | median of sources | of rows | worst | within 30 % | inside | width |",
    "|---|---|--:|--:|--:|--:|--:|--:|--:|--:|",
]


def _statistics(found: Sequence[Mapping[str, Any]]) -> list[str]:
    lines = [*_TABLE]
    for s in found:
        for key, name in _LINES:
            e = s[key]
            if not e["rows"]:
                continue
            keys = ("median_of_sources", "median", "worst", "within", "inside")
            numbers = " | ".join(_percent(e[k]) for k in keys)
            width = "-" if (found_width := e.get("width")) is None else f"{found_width:.1%}"
            lines.append(f"| {s['name']} | {name} | {e['rows']} | {e['sources']} | {numbers} | {width} |")
    rejected = found[0]["rejected"]
    return [*lines, "", f"Rows of the file that are rejected, and in neither line: {rejected}."]


def _targets(record: Mapping[str, Any]) -> list[str]:
    """Each on both lines. A statistic that a miss decides is not reached."""
    sizes = {s["name"]: s for s in record["memory"]}
    lines = [
        "| target | predicted rows | reached | refused rows are misses | reached |",
        "|---|--:|---|--:|---|",
    ]

    def add(name: str, found: Mapping[str, Any], key: str, low: float | None, high: float | None) -> None:
        cells = []
        for side, _ in _LINES:
            value = found[side][key]
            good = value is not None and (low is None or value >= low) and (high is None or value <= high)
            shown = f"{value:.2f}" if key == "rank" and value is not None else _percent(value)
            cells.append(f"{shown} | {'yes' if good else 'no'}")
        lines.append(f"| {name} | {' | '.join(cells)} |")

    quality_a, reserved = sizes["allocated, quality A"], sizes["reserved and device below 94 % of the card"]
    add("allocated, quality A: median over sources at most 3 %", quality_a, "median_of_sources", None, 0.03)
    add("allocated, quality A: worst row at most 10 %", quality_a, "worst", None, 0.10)
    add("reserved and device: median over sources at most 10 %", reserved, "median_of_sources", None, 0.10)
    for name, rows in (
        ("memory inside of the interval, test half, 80 to 97 %", "all of the test half"),
        ("memory inside of the interval, all rows, 80 to 97 %", "all with a measurement"),
    ):
        add(name, sizes[rows], "inside", 0.80, 0.97)
    if held := record.get("held_out"):
        blind = held["summary"]["left out"]
        whole, order = blind["times"][0], blind["order"]
        add(
            "step time, house left out: median over sources at most 12 %",
            whole,
            "median_of_sources",
            None,
            0.12,
        )
        add("step time, house left out: within 30 %, at least 90 %", whole, "within", 0.90, None)
        add("step time, house left out: inside of the interval, 80 to 97 %", whole, "inside", 0.80, 0.97)
        ranks = {"predicted": _least(order["ranks"]), "all": _least(order["ranks_with_misses"])}
        add("step time, house left out: least rank correlation, at least 0.9", ranks, "rank", 0.9, None)
        pairs = {"predicted": {"share": order["pairs"]}, "all": {"share": order["pairs_with_misses"]}}
        add("step time, house left out: pairs in order, at least 90 %", pairs, "share", 0.9, None)
    return lines


def _least(ranks: Sequence[float]) -> dict[str, float | None]:
    return {"rank": min(ranks, default=None)}


def _memory(record: Mapping[str, Any], why: Mapping[str, Any]) -> list[str]:
    rows: Sequence[Mapping[str, Any]] = record["rows"]
    lines = ["", "# Memory", "", why["intervals"].strip(), "", *_statistics(record["memory"])]
    known = [r for r in rows if r["measured"] is not None and not r["reference"] and not r["rejected"]]
    lines += [
        "",
        "## Predicted",
        "",
        "| id | quality | kind | measured | predicted | error | interval | why |",
    ]
    lines += ["|---|---|---|--:|--:|--:|---|---|"]
    for r in known:
        if r["predicted"] is not None:
            measured = _size(r["measured"]) + ("" if r["unit_sure"] else " (unit unsure)")
            ends = " to ".join(_size(r["predicted"] * end) for end in r["interval"])
            numbers = f"{measured} | {_size(r['predicted'])} | {_signed(r['error'])}"
            inside = ends + _open(r) + ("" if r["inside"] else ", outside")
            told = _why(r, why["rows"])
            lines.append(f"| {r['id']} | {r['quality']} | {r['kind']} | {numbers} | {inside} | {told} |")
    refused = [r for r in known if r["predicted"] is None]
    lines += ["", "## Refused: misses in the second line", "", "| id | quality | kind | measured | reason |"]
    lines += ["|---|---|---|--:|---|"]
    lines += [
        f"| {r['id']} | {r['quality']} | {r['kind']} | {_size(r['measured'])} | {_cell(r['reason'])} |"
        for r in refused
    ]
    lines += [
        "",
        "## Rejected before prediction",
        "",
        "| id | quality | what its own figures say |",
        "|---|---|---|",
    ]
    lines += [f"| {r['id']} | {r['quality']} | {_cell(r['reason'])} |" for r in rows if r["rejected"]]
    without = [r for r in rows if (r["measured"] is None or r["reference"]) and not r["rejected"]]
    names = ", ".join(f"`{r['id']}`" for r in without)
    return [*lines, "", f"{len(without)} more rows publish no memory, or a formula's: {names}."]


def _open(row: Mapping[str, Any]) -> str:
    """The columns that the source does not state, and that the interval covers."""
    columns = dict.fromkeys(name.partition(" ")[0] for name in row.get("others", {}))
    return f" ({', '.join(columns)})" if columns else ""


def _why(row: Mapping[str, Any], why: Mapping[str, str]) -> str:
    """What is known about this row or its source, where the error is above 3 %."""
    if abs(row["error"]) < _LARGE:
        return ""
    if row["card_full"]:
        return "the allocator's cache fills the card: an upper bound only"
    return _explained(row["id"], why)


def _explained(name: str, why: Mapping[str, str]) -> str:
    return next((text for start, text in why.items() if name.startswith(start)), "not known")


_KINDS = {
    "left out": "chosen without the row's house",
    "left out, said": "chosen without the row's house, but for what papers, code and logs say",
    "before": "as they stood before any row was seen",
    "used": "as used",
    "all": "chosen on all rows",
}


def _step_time(record: Mapping[str, Any], why: Mapping[str, Any]) -> list[str]:
    rows = [r for r in record["rows"] if r.get("speed_unit")]
    lines = ["", "# Step time", "", why["caveats"].strip(), ""]
    if held := record.get("held_out"):
        lines += ["## Without the row's own house", "", why["held_out"].strip(), ""]
        if held["created"] != record["created"]:
            lines += [f"Chosen on {held['created'][:10]}, from the rows and the code of that day.", ""]
        lines += _statistics(held["summary"]["left out"]["times"])
        lines += ["", *_kinds(held), "", *_choices(held), "", *_houses(rows, held)]
    lines += ["", "## With the constants in use", "", *_statistics(record["times"])]
    lines += ["", *_sweeps(record["sweeps"], why)]
    return [*lines, *_steps(rows, why, held), *_refused_steps(rows)]


def _kinds(held: Mapping[str, Any]) -> list[str]:
    lines = [
        "| constants | line | median of sources | within 30 % | worst | ranks | pairs, small sweeps |",
        "|---|---|--:|--:|--:|---|--:|",
    ]
    for key, name in ((k, n) for k, n in _KINDS.items() if k in held["summary"]):
        order = held["summary"][key]["order"]
        for side, told in _LINES:
            e = held["summary"][key]["times"][0][side]
            end = "_with_misses" if side == "all" else ""
            ranks = " ".join(f"{x:.2f}" for x in sorted(order["ranks" + end]))
            numbers = " | ".join(_percent(e[k]) for k in ("median_of_sources", "within", "worst"))
            lines.append(f"| {name} | {told} | {numbers} | {ranks or '-'} | {order['pairs' + end]:.1%} |")
    return lines


def _choices(held: Mapping[str, Any]) -> list[str]:
    lines = [
        "| constant | before | used | on all rows | without each house | said by |",
        "|---|--:|--:|--:|---|---|",
    ]
    for i, choice in enumerate(held["choices"]):
        took: dict[float, list[str]] = {}
        for name, levels in held["families"].items():
            took.setdefault(levels[i], []).append(name)
        most = max(took, key=lambda level: len(took[level]))
        others = [f"{level:g} without {', '.join(names)}" for level, names in took.items() if level != most]
        chosen = "; ".join([f"{most:g}", *others])
        known = " | ".join(f"{level:g}" for level in (choice["levels"][0], choice["used"], held["all"][i]))
        lines.append(f"| {choice['name']} | {known} | {chosen} | {choice['said']} |")
    return lines


def _houses(rows: Sequence[Mapping[str, Any]], held: Mapping[str, Any]) -> list[str]:
    """Median errors of each house's rows."""
    lines = ["| house left out | rows | before | left out | used |", "|---|--:|--:|--:|--:|"]
    for name in held["families"]:
        own = [r for r in rows if r["house"] == name and r["id"] in held["rows"]]
        seconds = [
            {**held["rows"][r["id"]], "used_s": r["step_s"], "true_s": r["measured_step_s"]} for r in own
        ]
        if own:
            cells = [
                f"{statistics.median(abs(s[key] / s['true_s'] - 1) for s in seconds):.1%}"
                for key in ("before_s", "left_out_s", "used_s")
            ]
            lines.append(f"| {name} | {len(own)} | {' | '.join(cells)} |")
    return lines


def _sweeps(found: Sequence[Mapping[str, Any]], why: Mapping[str, Any]) -> list[str]:
    lines = [
        "| source | unit | rows | refused | rank correlation | pairs in order | median error |",
        "|---|---|--:|--:|--:|--:|--:|",
    ]
    lines += [
        f"| {s['name']} | {_UNITS[s['unit']]} | {s['rows']} | {s['refused']} | {s['rank']:.2f} "
        f"| {s['pairs']:.0%} | {s['median']:.1%} |"
        for s in found
    ]
    apart = dict.fromkeys(s["name"].partition(", all")[0] for s in found if not s["comparable"])
    return [*lines, *(text for name in apart for text in ("", why["apart"].get(name, "")))]


def _steps(
    rows: Sequence[Mapping[str, Any]], why: Mapping[str, Any], held: Mapping[str, Any] | None
) -> list[str]:
    head, ruler = ("house left out | as used", "--:|--:") if held else ("error", "--:")
    lines = [
        "",
        "## Step time, every row",
        "",
        f"| id | quality | unit | published | predicted | step | predicted | {head} | most of it | why |",
        f"|---|---|---|--:|--:|--:|--:|{ruler}|---|---|",
    ]
    for r in rows:
        if r["step_error"] is None:
            continue
        most = sorted(r["busy_s"].items(), key=lambda kv: -kv[1])[:3]
        busy = ", ".join(f"{name} {busy_s / r['step_s']:.0%}" for name, busy_s in most)
        numbers = f"{_value(r['measured_speed'])} | {_value(r['predicted_speed'])}"
        seconds = f"{r['measured_step_s']:.4g} s | {r['step_s']:.4g} s"
        error = _signed(r["step_error"])
        if held:
            alone = held["rows"].get(r["id"])  # none: a row that the choice has not seen
            error = f"{_signed(alone and alone['left_out_s'] / r['measured_step_s'] - 1)} | {error}"
        told = _explained(r["id"], why["rows"]) if abs(r["step_error"]) >= _LARGE_STEP else ""
        lines.append(
            f"| {r['id']} | {r['quality']} | {_UNITS[r['speed_unit']]} | {numbers} | {seconds} | {error} "
            f"| {busy} | {told} |"
        )
    return lines


def _refused_steps(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    lines = [
        "",
        "## Step time refused: misses in the second line",
        "",
        "| id | quality | published | reason |",
    ]
    lines += ["|---|---|--:|---|"]
    return lines + [
        f"| {r['id']} | {r['quality']} | {_value(r['measured_speed'])} {_UNITS[r['speed_unit']]} "
        f"| {_cell(r['step_reason'])} |"
        for r in rows
        if r["step_error"] is None
    ]


def _value(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"
