"""Do runs survive the bound that memfit states for them?

    python benchmarks/capped_runs.py [--first N] [--count N]   make runs that are not in the records yet
    python benchmarks/capped_runs.py --page                    the page from the records only

Protocol, fixed in a commit before the first run:

- 300 runs, drawn by the seeds 0 to 299: a multi-layer perceptron, a transformer or a convolutional network of
  drawn sizes, an optimizer, and a plan of up to two techniques of those in `PLANS`.
- Each is `memfit run JOB --plan PLAN --steps 4 --capped` without `--memory`: the cap is what memfit predicts
  that the plan needs, beside what Python and the libraries hold after the warm-up.
- Every third run also saves after every step and evaluates on 1 to 16 times as many samples as a batch has.
- A run that does not end with the outcome "ok" counts as a death, whatever its reason.
- Aim: no deaths. A run whose plan memfit refuses for this job is drawn again with the next seed from 1000 on.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import json
import random
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import yaml

from memfit.cli.app import main as memfit
from memfit.types.units import format_bytes

FOLDER = Path(__file__).parent
RECORDS, PAGE = FOLDER / "records" / "capped_runs.jsonl", FOLDER / "capped_runs.md"
RUNS, REDRAWN = 300, 1000
PLANS: tuple[dict[str, dict[str, Any]], ...] = (
    {},
    {"activation-checkpointing": {"every": 1}},
    {"activation-checkpointing": {"every": 2}},
    {"bf16-autocast": {}},
    {"bf16-parameters": {}},
    {"optimizer-in-backward": {}},
    {"gradient-accumulation": {"micro_batches": 2}},
    {"sgd": {}},
    {"adamw-fused": {}},
    {"activation-checkpointing": {"every": 1}, "bf16-autocast": {}},
    {"activation-checkpointing": {"every": 1}, "optimizer-in-backward": {}},
    {"gradient-accumulation": {"micro_batches": 2}, "bf16-autocast": {}},
)
JOB = """
import torch
from torch import nn
from memfit import Job

WIDTH, LAYERS, BATCH, LENGTH, ROWS = {width}, {layers}, {batch}, {length}, {rows}


class Mlp(nn.Module):
    def __init__(self):
        super().__init__()
        parts = [(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH)) for i in range(LAYERS)]
        self.blocks = nn.ModuleList([nn.Sequential(*of_block) for of_block in parts])

    def forward(self, x):
        for block in self.blocks:
            x = x + block(x)
        return x


class Transformer(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(
            [nn.TransformerEncoderLayer(WIDTH, 4, 2 * WIDTH, 0.0, batch_first=True) for _ in range(LAYERS)]
        )

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


class Convolutions(nn.Module):
    def __init__(self):
        super().__init__()
        parts = [(nn.Conv1d(WIDTH, WIDTH, 3, 1, 1), nn.GroupNorm(4, WIDTH), nn.ReLU()) for i in range(LAYERS)]
        self.blocks = nn.ModuleList([nn.Sequential(*of_block) for of_block in parts])

    def forward(self, x):
        x = x.transpose(1, 2)
        for block in self.blocks:
            x = x + block(x)
        return x.transpose(1, 2)


def batch(step, seed):
    return torch.randn(BATCH, LENGTH, WIDTH, generator=torch.Generator().manual_seed(1000 * seed + step))


def evaluate(model):
    with torch.no_grad():
        return float(model(torch.zeros(ROWS, LENGTH, WIDTH)).square().mean())


job = Job(
    name="drawn",
    build_model={family},
    make_batch=batch,
    loss=lambda model, x: (model(x) - x.flip(1)).square().mean(),
    batch_size=BATCH,
    optimizer="{optimizer}",
    blocks="blocks",
    evaluate=evaluate if ROWS else None,
)
"""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Draw:
    """A run. ``rows``: samples of the evaluation; 0: it neither evaluates nor saves."""

    seed: int
    family: str
    width: int
    layers: int
    batch: int
    length: int
    rows: int
    optimizer: str
    plan: Mapping[str, Mapping[str, Any]]


def draw(number: int, seed: int) -> Draw:
    """Return the run ``number`` of the 300, as ``seed`` draws it."""
    rng = random.Random(seed)
    batch = rng.choice((2, 4, 8, 16))
    return Draw(
        seed=seed,
        family=rng.choice(("Mlp", "Transformer", "Convolutions")),
        width=rng.choice((32, 64, 128, 256)),
        layers=rng.randint(2, 6),
        batch=batch,
        length=rng.choice((8, 32, 128)),
        rows=batch * rng.randint(1, 16) if number % 3 == 0 else 0,
        optimizer=rng.choice(("adamw", "adamw", "adam", "sgd")),
        plan=rng.choice(PLANS),
    )


def run(case: Draw) -> dict[str, Any]:
    """Make a run and return its record."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        facts = {k: v for k, v in dataclasses.asdict(case).items() if k not in ("seed", "plan")}
        (folder / "drawn.py").write_text(JOB.format(**facts))
        (folder / "plan.yaml").write_text(yaml.safe_dump({"techniques": dict(case.plan)}))
        words = ["run", f"{folder / 'drawn.py'}:job", "--plan", str(folder / "plan.yaml"), "--steps", "4"]
        words += ["--capped", "--json", "--threads", "1", "--store", str(folder / "store.db")]
        if case.rows:
            words += ["--save", str(folder / "saved"), "--save-every", "1"]
        output = io.StringIO()
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(io.StringIO()):
            code = memfit(words)
        answer = json.loads(output.getvalue().strip() or "{}")
    record = {
        "draw": dataclasses.asdict(case),
        "code": code,
        "error": answer.get("error", {}).get("message", ""),
    }
    names = ("outcome", "reason", "cap_bytes", "raised_cap_bytes", "measured_peak_bytes", "overhead_ratio")
    return record | {key: answer.get(key) for key in names}


def _all_records() -> list[dict[str, Any]]:
    return [json.loads(line) for line in RECORDS.read_text().splitlines()] if RECORDS.exists() else []


def _records() -> dict[int, dict[str, Any]]:
    """Return number of the run -> its record, the last one of each."""
    return {int(r["number"]): r for r in _all_records()}


def _make(numbers: range) -> None:
    done = _records()
    for number in (n for n in numbers if n not in done):
        seed, record = number, run(draw(number, number))
        while record["code"] == 2:  # the plan does not suit the job
            seed = max(seed, REDRAWN + 10 * number - 1) + 1
            record = run(draw(number, seed))
        with RECORDS.open("a") as file:
            file.write(json.dumps({"number": number, **record}) + "\n")
        print(number, record["outcome"], record["reason"] or record["error"], flush=True)


def _page(records: Mapping[int, Mapping[str, Any]]) -> Iterator[str]:
    saving = {n: r for n, r in records.items() if r["draw"]["rows"]}
    deaths = {n: r for n, r in records.items() if r["outcome"] != "ok"}
    yield "# Runs under memfit's own bound"
    yield ""
    yield "Generated by `python benchmarks/capped_runs.py --page` from the records; do not edit. The"
    yield "protocol is at the top of the script and was committed before the first run."
    yield ""
    raised = sum(bool(r["raised_cap_bytes"]) for r in saving.values())
    yield f"{len(records)} of {RUNS} runs made, {len(deaths)} deaths. {len(saving)} of them save after every"
    yield f"step and evaluate; in {raised} of these that raised the bound of training, as measured in the"
    yield f"warm-up. One process each, one thread, CPU, torch {torch.__version__}."
    for record in _all_records():
        if record["outcome"] != "ok" and record["number"] not in deaths:
            number, outcome = record["number"], f"{record['outcome']}: {record['reason'][:160]}"
            yield f"Run {number} first ended otherwise, and was made again after a change: {outcome}"
    yield ""
    yield "| run | seed | model | plan | saves, evaluates | bound | peak | outcome |"
    yield "|--:|--:|---|---|---|--:|--:|---|"
    for number, record in sorted(records.items()):
        case = record["draw"]
        model = f"{case['family']} {case['layers']} × {case['width']}, {case['batch']} × {case['length']}"
        bound = record["raised_cap_bytes"] or record["cap_bytes"]
        saves = f"{case['rows']} samples" if case["rows"] else ""
        outcome = "ok" if record["outcome"] == "ok" else f"**{record['outcome']}: {record['reason']}**"
        sizes = [format_bytes(size) if size else "" for size in (bound, record["measured_peak_bytes"])]
        plan = " + ".join(case["plan"]) or "plain"
        cells = (str(number), str(case["seed"]), model, plan, saves, *sizes, outcome)
        yield f"| {' | '.join(cells)} |"


def main() -> None:
    """Run the program."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--count", type=int, default=RUNS)
    parser.add_argument("--page", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if not options.page:
        _make(range(options.first, min(RUNS, options.first + options.count)))
    PAGE.write_text("\n".join(_page(_records())) + "\n")


if __name__ == "__main__":
    main()
