"""Models that nobody looked at while memfit was written: 40 jobs drawn by a seed from a dozen libraries.

    python benchmarks/unseen_models.py --seed 23 [--page benchmarks/unseen_models.md]

Of each group of unseen_population.py names are taken in the seed's order; the first that train in the plain
loop below, within the limits of time and parameters, are the jobs. What memfit says decides nothing of the
draw. A job is estimated in one fresh process (the first question, `memfit.estimate`) and trained in another,
for three steps of forward, backward and optimizer, on real tensors, under the counting allocator.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime
import importlib.metadata
import multiprocessing
import os
import random
import resource
import signal
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

LIMIT_S, WALL_LIMIT_S = 100, 600.0  # of one process: processor time, and time on a busy machine
CONTEXT = multiprocessing.get_context("forkserver")  # of one that has imported libraries and run nothing
PRELOADED = (
    "torch",
    "unseen_population",
    "memfit.api",
    "timm",
    "torchvision",
    "diffusers",
    "transformers",
    "torch_geometric",
    "e3nn.nn",
    "mace.modules",
    "monai.networks.nets",
    "segmentation_models_pytorch",
    "lightning.pytorch.demos",
)
STEPS, THREADS = 3, 2
OPTIMIZERS = ("adamw", "sgd", "adam")
LIBRARIES = (
    "torch",
    "timm",
    "torchvision",
    "diffusers",
    "transformers",
    "torch-geometric",
    "e3nn",
    "mace-torch",
    "monai",
    "segmentation-models-pytorch",
    "lightning",
)


def optimizer_of(name: str) -> Any:
    made = {
        "adamw": lambda params: torch.optim.AdamW(params, lr=1e-4),
        "adam": lambda params: torch.optim.Adam(params, lr=1e-4),
        "sgd": lambda params: torch.optim.SGD(params, lr=1e-3, momentum=0.9),
    }
    return made[name]


def task(group: str, name: str) -> Any:
    from unseen_population import GROUPS

    torch.manual_seed(0)
    return GROUPS[group][1]()[name]()


# -- the two processes of a job ---------------------------------------------------------------------


def measure(group: str, name: str, optimizer_name: str) -> dict[str, Any]:
    from memfit.runtime.memory import peak_counter

    torch.set_num_threads(THREADS)
    counter = peak_counter()
    made = task(group, name)
    made.model.train()
    form = first_form(made)
    batch, made.batches = made.batches[form], []
    optimizer = optimizer_of(optimizer_name)([p for p in made.model.parameters() if p.requires_grad])
    made.model.zero_grad(set_to_none=True)
    counter.reset_peak()
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = made.loss(made.model, batch)
        loss.backward()
        optimizer.step()
    return {"measured": counter.peak_bytes(), "form": form, "source": counter.source}


def first_form(made: Any) -> int:
    """The index of the first batch that the model takes. Raises the last error where there is none."""
    for index, batch in enumerate(made.batches):
        last = index == len(made.batches) - 1
        with contextlib.nullcontext() if last else contextlib.suppress(Exception):
            made.loss(made.model, batch).backward()
            return index
    raise ValueError("no batch")


def ask(group: str, name: str, optimizer_name: str, form: int) -> dict[str, Any]:
    import memfit

    torch.set_num_threads(THREADS)
    made = task(group, name)
    made.model.train()
    begun = time.perf_counter()
    found = memfit.estimate(
        made.model, made.batches[form], loss=made.loss, optimizer=optimizer_of(optimizer_name)
    )
    allocated = found.allocated_bytes
    return {
        "estimate": allocated.value,
        "low": allocated.low,
        "high": allocated.high,
        "seconds": time.perf_counter() - begun,
        "assumptions": list(found.estimate.assumptions),
    }


def child(work: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any]:
    """What ``work`` returns in a fresh process, or {"error": one line}."""
    receiver, sender = CONTEXT.Pipe(duplex=False)
    process = CONTEXT.Process(target=_answer, args=(sender, work, arguments))
    process.start()
    sender.close()
    found: dict[str, Any] | None = None
    with contextlib.suppress(EOFError):
        found = receiver.recv() if receiver.poll(WALL_LIMIT_S) else {"error": f"more than {WALL_LIMIT_S:g} s"}
    if found is not None and "error" in found:
        process.kill()
    process.join()
    if found is not None:
        return found
    limit = process.exitcode == -signal.SIGXCPU
    return {"error": f"more than {LIMIT_S} s of processor time" if limit else f"exit {process.exitcode}"}


def _answer(sender: Any, work: Callable[..., dict[str, Any]], arguments: tuple[Any, ...]) -> None:
    resource.setrlimit(resource.RLIMIT_CPU, (LIMIT_S, LIMIT_S + 5))
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    try:
        found = work(*arguments)
    except BaseException as error:  # noqa: BLE001 a failure is the answer
        found = {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"}
    sender.send(found)


# -- the draw ---------------------------------------------------------------------------------------


@dataclasses.dataclass
class Row:
    group: str
    name: str
    optimizer: str
    answer: dict[str, Any]

    @property
    def error_ratio(self) -> float | None:
        if "estimate" not in self.answer:
            return None
        return float(self.answer["estimate"] / self.answer["measured"] - 1)

    @property
    def inside(self) -> bool:
        return "estimate" in self.answer and (
            self.answer["low"] <= self.answer["measured"] <= self.answer["high"]
        )

    @property
    def width_ratio(self) -> float | None:
        if "estimate" not in self.answer:
            return None
        return float((self.answer["high"] - self.answer["low"]) / self.answer["estimate"])

    def text(self) -> str:
        mib, a = 2**20, self.answer
        start = f"| {self.group} | {self.name} | {self.optimizer} | {a['measured'] / mib:.2f} |"
        if "estimate" not in a:
            return f"{start} | | | | no | | {a['error'].replace('|', '/')} |"
        numbers = " | ".join(f"{a[k] / mib:.2f}" for k in ("estimate", "low", "high"))
        assumed = "; ".join(s for s in a["assumptions"] if "as in the batch" not in s)[:120]
        inside = "yes" if self.inside else "no"
        return f"{start} {numbers} | {self.error_ratio:+.2%} | {inside} | {a['seconds']:.1f} | {assumed} |"


def draw(group: str, quota: int, names: list[str], seed: int, skipped: list[str]) -> list[Row]:
    """The first ``quota`` names in the seed's order that train in the plain loop, each with its answer."""
    rng = random.Random(f"{seed} {group}")
    order, rows = rng.sample(names, len(names)), list[Row]()
    while order and len(rows) < quota:
        name, optimizer = order.pop(0), rng.choice(OPTIMIZERS)
        truth = child(measure, group, name, optimizer)
        if "error" in truth:
            skipped.append(f"{group} / {name}: {truth['error']}")
            continue
        answer = child(ask, group, name, optimizer, truth["form"])
        rows.append(Row(group, name, optimizer, {**truth, **answer}))
        print(rows[-1].text(), flush=True)
    return rows


def summary(rows: list[Row]) -> str:
    errors = [abs(e) for r in rows if (e := r.error_ratio) is not None]
    widths = [w for r in rows if (w := r.width_ratio) is not None]
    if not errors:
        return f"{len(rows)} jobs, none answered"
    return (
        f"{len(rows)} jobs, {len(errors)} answered, measured peak inside the interval in "
        f"{sum(r.inside for r in rows)}; interval {statistics.median(widths):.1%} wide in the median; error "
        f"of the estimate: median {statistics.median(errors):.3%}, largest {max(errors):.2%}, "
        f"{sum(e <= 0.01 for e in errors)} within 1 %"
    )


def page(rows: list[Row], skipped: list[str], seed: int) -> str:
    head = (
        "| group | model | optimizer | measured, MiB | estimate | low | high | error | inside | s | notes |"
    )
    versions = ", ".join(f"{n} {importlib.metadata.version(n)}" for n in LIBRARIES)
    today = f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d}"
    where = f"{today}, {THREADS} threads of a processor, other work beside it"
    lines = [
        "# Unseen models",
        "",
        f"`python benchmarks/unseen_models.py --seed {seed}`, {where}. {versions}.",
        "",
    ]
    lines += [*(__doc__ or "").strip().splitlines()[4:], "", f"**{summary(rows)}.**", ""]
    lines += [head, "|---|---|---|--:|--:|--:|--:|--:|---|--:|---|", *(row.text() for row in rows), ""]
    lines += [f"Not drawn, as the plain loop did not train them here ({len(skipped)}):", ""]
    return "\n".join([*lines, *(f"- {line}" for line in skipped), ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--groups", nargs="*", help="only these")
    parser.add_argument("--side-by-side", type=int, default=1, help="groups at a time")
    parser.add_argument("--page", type=Path)
    asked = parser.parse_args()
    from unseen_population import GROUPS

    os.environ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] = "1"  # e3nn reads its constants with pickle
    CONTEXT.set_forkserver_preload(list(PRELOADED))
    chosen = {g: v for g, v in GROUPS.items() if not asked.groups or g in asked.groups}
    populations = {group: list(make()) for group, (_, make) in chosen.items()}
    print(f"{sum(map(len, populations.values()))} models in {len(chosen)} groups", flush=True)
    skipped: list[str] = []
    with ThreadPoolExecutor(asked.side_by_side) as pool:
        parts = [
            pool.submit(draw, group, quota, populations[group], asked.seed, skipped)
            for group, (quota, _) in chosen.items()
        ]
        rows = [row for part in parts for row in part.result()]
    print(summary(rows))
    for line in skipped:
        print("not drawn:", line)
    if asked.page:
        asked.page.write_text(page(rows, skipped, asked.seed))


if __name__ == "__main__":
    main()
