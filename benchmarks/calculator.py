"""Whether the calculator's page answers as `memfit estimate JOB` does.

    python benchmarks/calculator.py                 # goes on with the record, then writes the page
    python benchmarks/calculator.py --draw          # prints the drawn settings
    python benchmarks/calculator.py --page          # writes the page from the record alone

Protocol, committed before the first comparison. 200 settings are drawn by the first seed below: model,
device, precision, recomputation and sharding evenly; batch and length evenly on a logarithmic scale that
begins below and ends above what the page knows, so that the page has to refuse some. The page's own script
answers under Node. The same setting is predicted by `anatomy`, the function behind `memfit estimate JOB`.
Compared are the peak of tensors, the reserved memory and the device memory, each with both ends, and whether
the plan fits the device. A setting is right if the largest relative difference is at most 0.5 % and the
verdict is the same, or if the page says "run this command". Settings that memfit itself refuses must not be
answered by the page.

Changed once, after 83 comparisons: HyenaDNA's windows end at 262,144 bases and the U-Net's patches at 160
voxels, above which the jobs have no data, so that these sizes are drawn anew; none of them had been answered.
In a first comparison 24 of 187 settings were wrong. 100 settings of a second seed, committed before its first
result, show whether what was mended since holds where nobody looked.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))
import memory_pages

COUNTS = {32: 200, 1132: 100}  # seed -> number of settings
TOLERANCE = 0.005
HERE = Path(__file__).parent
PAGE, RECORD = HERE / "calculator.md", HERE / "records" / "calculator.jsonl"
SCRIPT = memory_pages.HERE / "answer.js"
_ASK = """
const page = require(process.argv[1]), fs = require("fs");
const { file, settings } = JSON.parse(fs.readFileSync(0));
(async () => {
  for (const s of settings) console.log(JSON.stringify(await page.answer(file, s)));
})();
"""
FIGURES = ("allocated", "reserved", "device")


def draw(seed: int) -> list[dict[str, Any]]:
    """Return the settings of a seed of `COUNTS`. ``batch`` is that of one device."""
    rng = random.Random(seed)
    settings = []
    for _ in range(COUNTS[seed]):
        name = rng.choice(list(memory_pages.MODELS))
        model = memory_pages.MODELS[name]
        setting = {
            "model": name,
            "device": rng.choice(memory_pages.DEVICES),
            "precision": rng.choice(list(memory_pages.PRECISIONS)),
            "recomputation": rng.choice(list(memory_pages.RECOMPUTATION)),
            "sharding": rng.choice(list(memory_pages.SHARDING)),
            "batch": _between(rng, 1, 1.25 * model.batches[-1]),
            "second": 1,
        }
        if model.second:
            low, high = model.seconds[0] / model.multiple, model.seconds[-1] / model.multiple
            setting["second"] = model.multiple * _between(rng, max(1, 0.8 * low), 1.25 * high)
        settings.append(setting)
    return settings


def _between(rng: random.Random, low: float, high: float) -> int:
    return max(1, round(math.exp(rng.uniform(math.log(low), math.log(high)))))


def plan_key(setting: Mapping[str, Any]) -> str:
    return "/".join(setting[name] for name in ("model", "precision", "recomputation", "sharding"))


def page_answers(settings: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return what the page's script answers: {"run": reason} or the figures."""
    given = json.dumps({"file": memory_pages.page_data(), "settings": settings})
    done = subprocess.run(
        ["node", "-e", _ASK, str(SCRIPT)], input=given, capture_output=True, text=True, check=True
    )
    return [json.loads(line) for line in done.stdout.splitlines()]


def predicted(setting: Mapping[str, Any]) -> dict[str, Any]:
    """Return what `memfit estimate JOB` answers: {"refused": why} or the figures."""
    from memfit.planner.capacity import needed_bytes
    from memfit.techniques.plan_file import parse_plan
    from memfit.types.errors import MemfitError, first_line
    from memfit.workflows.proof_of_concept import anatomy

    model = memory_pages.MODELS[setting["model"]]
    plan = memory_pages.plan_of(*(setting[n] for n in ("precision", "recomputation", "sharding")))
    try:
        request = memory_pages.request_of(model, plan, setting["batch"], setting["second"], setting["device"])
        explained = anatomy(request, [parse_plan(plan, what="plan")], lambda *progress: None)
    except MemfitError as error:
        return {"refused": first_line(error)}
    estimate = explained[0].estimate
    figures = {
        name: [interval.value, interval.low, interval.high]
        for name in FIGURES
        if (interval := getattr(estimate, f"{name}_bytes")) is not None
    }
    memory = request.machine.device.memory_bytes.value
    return figures | {"fits": needed_bytes(estimate, request.machine) <= memory}


def judge(page: Mapping[str, Any], truth: Mapping[str, Any]) -> tuple[str, float | None]:
    """Return (verdict, largest relative difference): "equal", "run", "wrong" or "refused"."""
    if "run" in page:
        return "run", None
    if "refused" in truth:
        return "wrong", None
    pairs = [(a, b) for name in FIGURES for a, b in zip(page[name], truth[name], strict=True)]
    error = max(abs(a / b - 1) for a, b in pairs)
    right = error <= TOLERANCE and page["fits"] == truth["fits"]
    return ("equal" if right else "wrong"), error


def records() -> list[dict[str, Any]]:
    return [json.loads(line) for line in RECORD.read_text().splitlines()] if RECORD.is_file() else []


def compare(seed: int, only: str) -> None:
    done = {row["number"] for row in records() if row["seed"] == seed}
    settings = draw(seed)
    missing = [n for n, s in enumerate(settings) if n not in done and re.search(only, plan_key(s))]
    pages = page_answers([settings[n] for n in missing])
    # what the page refuses needs no trace
    pairs = sorted(zip(missing, pages, strict=True), key=lambda pair: "run" not in pair[1])
    for number, page in pairs:
        truth = {} if "run" in page else predicted(settings[number])
        verdict, error = judge(page, truth)
        kept = {k: v for k, v in page.items() if k in (*FIGURES, "fits", "run")}
        row = {"seed": seed, "number": number, "setting": settings[number], "page": kept, "estimate": truth}
        row |= {"verdict": verdict, "error": error, "revision": memory_pages.revision()}
        with RECORD.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(number, verdict, error, *settings[number].values(), page.get("run", ""), flush=True)


def write_page() -> None:
    rows = records()
    kinds = {
        "equal": "answers within 0.5 %, with the same verdict on whether it fits",
        "run": "says “run this command”",
        "wrong": "is wrong",
    }
    counts = {
        kind: [sum(row["verdict"] == kind and row["seed"] == seed for row in rows) for seed in COUNTS]
        for kind in kinds
    }
    totals = [f"{sum(row['seed'] == seed for row in rows)} of {count}" for seed, count in COUNTS.items()]
    errors = sorted(row["error"] for row in rows if row["error"] is not None)
    revisions = ", ".join(sorted({row["revision"] for row in rows}))
    lines = [
        "# The calculator against `memfit estimate`",
        "",
        "Command: `python benchmarks/calculator.py`; the protocol and the seed are at the top of that file.",
        "Not compared: step times and the host's memory, which the page does not answer.",
        "",
        f"Revisions: {revisions}.",
        "",
        "| the page | " + " | ".join(f"settings of seed {seed}" for seed in COUNTS) + " |",
        "|---|" + "--:|" * len(COUNTS),
        *(f"| {text} | {' | '.join(map(str, counts[kind]))} |" for kind, text in kinds.items()),
        f"| compared | {' | '.join(totals)} |",
        "",
    ]
    if errors:
        exact, largest = sum(e < 1e-9 for e in errors), f"{100 * errors[-1]:.3g} %"
        answers = f"Of the {len(errors)} answers {exact} are equal to the byte; the largest difference of a"
        lines += [f"{answers} figure or an end of an interval is {largest}.", ""]
    wrong = [row for row in rows if row["verdict"] == "wrong"]
    if wrong:
        lines += [
            "| wrong: seed, number | setting | difference | page fits | estimate |",
            "|--:|---|--:|---|---|",
        ]
        lines += [
            "| {}, {} | {} | {} | {} | {} |".format(
                row["seed"],
                row["number"],
                " ".join(map(str, row["setting"].values())),
                "" if row["error"] is None else f"{100 * row['error']:.2f} %",
                row["page"].get("fits"),
                row["estimate"].get("refused", row["estimate"].get("fits")),
            )
            for row in wrong
        ]
        lines.append("")
    reasons = sorted({row["page"]["run"] for row in rows if "run" in row["page"]})
    if reasons:
        lines += ["| why the page says “run this command” | settings |", "|---|--:|"]
        lines += [
            f"| {reason} | {sum(row['page'].get('run') == reason for row in rows)} |" for reason in reasons
        ]
        lines.append("")
    PAGE.write_text("\n".join(lines))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--draw", action="store_true")
    parser.add_argument("--page", action="store_true")
    parser.add_argument("--seed", type=int, choices=COUNTS, default=next(iter(COUNTS)), help="default 32")
    parser.add_argument("--only", default="", metavar="REGEX", help="MODEL/PRECISION/RECOMPUTATION/SHARDING")
    options = parser.parse_args()
    if options.draw:
        print("\n".join(map(json.dumps, draw(options.seed))))
        return
    if not options.page:
        compare(options.seed, options.only)
    write_page()


if __name__ == "__main__":
    main()
