"""Does AlphaFold 2 learn alike under memory techniques? A long record that can be stopped and continued.

    python benchmarks/alphafold_learning.py [--minutes 150]   the next runs of the protocol, for so long
    python benchmarks/alphafold_learning.py --baselines       the methods without a network
    python benchmarks/alphafold_learning.py --page            the page from the records only

Every run trains the tiny size of the job ``alphafold2`` under one plan, on simulated alignments, with one
thread. Every EVERY steps it adds a line to benchmarks/records/alphafold_learning.jsonl with its scores on
held-out chains, and saves a checkpoint beside the records, in a folder that git ignores; so it does when its
time is up. A run that was stopped goes on from its last checkpoint. Runs come in the order of the protocol,
the most important first.

Runs had 2,000 steps until 2026-12-01, when none had ended: their checkpoints were lost twice, and 21 such
runs take 13 hours of a core. Since then they have 800. Plain training of seed 0 had been seen up to that
step, no other run. Its lines were removed, and it is run again.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import shutil
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from alphafold_baselines import precisions
from alphafold_learning_page import page

from memfit.jobs import checkpoints
from memfit.jobs.builtin import alphafold2
from memfit.jobs.builtin.alphafold.model import FoldSize, distance_edges, small_size
from memfit.jobs.builtin.batches import evaluating, to_device
from memfit.jobs.registry import load
from memfit.jobs.training_step import TrainingStep
from memfit.store.environment import fingerprint
from memfit.techniques.registry import make_use
from memfit.types.errors import UserError
from memfit.types.job import Job, JobRef
from memfit.types.launch import CheckpointSettings, RunSpec
from memfit.types.plan import Plan
from memfit.worker.checkpoint import Checkpointer

HERE = Path(__file__).parent
RECORDS, PAGE = HERE / "records" / "alphafold_learning.jsonl", HERE / "alphafold_learning.md"
CHECKPOINTS = HERE / "records" / "alphafold_learning.checkpoints"

# -- protocol: fixed before the first run -----------------------------------------------------------------

STEPS, EVERY, SEEDS = 800, 200, (0, 1, 2)
SHAPE = small_size(residues=64, batch_size=4)
PLANS: Mapping[str, Mapping[str, Mapping[str, Any]]] = {
    "plain": {},
    "bf16-autocast": {"bf16-autocast": {}},
    "adamw-8bit": {"adamw-8bit": {}},
    "bf16-autocast without islands": {"bf16-autocast": {}},
    "activation-checkpointing": {"activation-checkpointing": {}},
    "chunking": {"chunking": {}},
    "activation-offload": {"activation-offload": {"to": "disk"}},
}
ORDER = [(name, seed) for name in PLANS for seed in SEEDS]
ORDER.sort(key=lambda run: (list(PLANS).index(run[0]) // 2, run[1], list(PLANS).index(run[0])))


# -- one run ----------------------------------------------------------------------------------------------


def job_of(name: str) -> Job:
    job = load(JobRef(spec="alphafold2"))
    return dataclasses.replace(job, islands=()) if name.endswith("without islands") else job


def train(name: str, seed: int, deadline: float) -> bool:
    """Train a run from its last checkpoint on, until it ends (True) or the time is up."""
    job, folder = job_of(name), CHECKPOINTS / f"{name.replace(' ', '-')}-{seed}"
    plan = Plan(uses=tuple(make_use(technique, settings) for technique, settings in PLANS[name].items()))
    folds = alphafold2.built_in_folds()
    torch.manual_seed(seed)
    step = TrainingStep(job, plan)
    try:
        resume = str(checkpoints.find(folder)[0])
    except UserError:  # there is none yet
        resume = ""
    spec = RunSpec(
        name=name,
        role="run",
        job=JobRef(spec="alphafold2"),
        plan=plan,
        seed=seed,
        steps=STEPS,
        keep=CheckpointSettings(save=str(folder), every_steps=EVERY, resume=resume),
    )
    keeper = Checkpointer(spec, step)
    done = keeper.restore() if resume else 0
    if not resume:
        add(point(name, seed, 0, step.model, folds, cpu_s=0.0, losses=[]))
    losses: list[float] = []
    begun = time.process_time() - paused_s(name, seed, done)
    while done < STEPS and time.monotonic() < deadline:
        losses.append(float(step.run(job.make_batch(done, seed))[0]))
        done += 1
        if keeper.due(done):
            spent = time.process_time() - begun
            add(point(name, seed, done, step.model, folds, cpu_s=spent, losses=losses))
            losses, begun = [], time.process_time()
            keep(keeper, done, folder)
    if losses:
        spent = time.process_time() - begun
        add({"kind": "pause", "run": name, "seed": seed, "step": done, "cpu_s": spent})
        keep(keeper, done, folder)
    step.close()
    return done >= STEPS


def keep(keeper: Checkpointer, done: int, folder: Path) -> None:
    """Save a checkpoint and delete the one before."""
    keeper.save(done)
    for old in sorted(folder.glob("step-*"))[:-1]:
        shutil.rmtree(old)


def paused_s(name: str, seed: int, done: int) -> float:
    """CPU seconds of the steps between the last point of a run and step ``done``, at which it was stopped."""
    pauses = [r for r in lines() if r["kind"] == "pause" and (r["run"], r["seed"]) == (name, seed)]
    return next((r["cpu_s"] for r in reversed(pauses) if r["step"] == done), 0.0) if done % EVERY else 0.0


def point(
    name: str,
    seed: int,
    done: int,
    model: torch.nn.Module,
    folds: alphafold2.Folds,
    *,
    cpu_s: float,
    losses: list[float],
) -> dict[str, Any]:
    """A line of the record. ``cpu_s``: of the steps since the last point. ``losses``: those of this block."""
    return {
        "kind": "point",
        "run": name,
        "seed": seed,
        "step": done,
        "cpu_s": cpu_s,
        "training_loss": float(np.mean(losses)) if losses else None,
        **scores(model, folds, SHAPE),
    }


def scores(model: torch.nn.Module, folds: alphafold2.Folds, shape: FoldSize) -> dict[str, float]:
    """Means over the held-out chains of the job: contact precisions in percent, of the L/2 and the L
    likeliest pairs; and terms of the loss, weighted by chains."""
    contact_bins = int((distance_edges() <= alphafold2.CONTACT_ANGSTROM).sum())
    half: list[float] = []
    whole: list[float] = []
    sums: dict[str, float] = {}
    with evaluating(model) as device:
        for tensors in alphafold2.test_parts(folds, shape):
            batch = to_device(tensors, device)
            out = model(batch)
            count = len(batch["mask"])
            for term, value in alphafold2.terms(out, batch).items():
                sums[term] = sums.get(term, 0.0) + count * float(value)
            sure = out["distance"].float().softmax(-1)[..., :contact_bins].sum(-1).numpy()
            arrays = sure, tensors["atoms"].numpy(), tensors["mask"].numpy()
            half += alphafold2.chain_precisions(*arrays, divisor=2)
            whole += alphafold2.chain_precisions(*arrays, divisor=1)
    chains = min(alphafold2.TESTED, folds.count - folds.train_count)
    means = {term: value / chains for term, value in sums.items()}
    return {"precision": 100 * float(np.mean(half)), "precision_l": 100 * float(np.mean(whole)), **means}


# -- the record -------------------------------------------------------------------------------------------


def add(line: Mapping[str, Any]) -> None:
    created = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    with RECORDS.open("a", encoding="utf-8") as file:
        file.write(json.dumps({"created": created, **line}, ensure_ascii=False) + "\n")
    print(json.dumps(line), flush=True)


def lines() -> list[dict[str, Any]]:
    return (
        [json.loads(t) for t in RECORDS.read_text(encoding="utf-8").splitlines()] if RECORDS.exists() else []
    )


def open_runs() -> Iterator[tuple[str, int]]:
    """Runs of the protocol whose last step is not in the record, in order."""
    ended = {(r["run"], r["seed"]) for r in lines() if r["kind"] == "point" and r["step"] == STEPS}
    yield from (run for run in ORDER if run not in ended)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=150.0)
    parser.add_argument("--baselines", action="store_true")
    parser.add_argument("--page", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.baselines:
        add({"kind": "baselines", **precisions(alphafold2.built_in_folds(), SHAPE.residues)})
    elif not options.page:
        deadline = time.monotonic() + 60 * options.minutes
        add({"kind": "block", "minutes": options.minutes, "environment": dict(fingerprint())})
        for name, seed in open_runs():
            if not train(name, seed, deadline):
                break
    PAGE.write_text(page(lines(), STEPS, list(PLANS), len(SEEDS)), encoding="utf-8")


if __name__ == "__main__":
    main()
