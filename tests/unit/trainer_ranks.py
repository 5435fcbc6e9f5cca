"""One rank of a launch that makes a Trainer and predicts its step; the arguments are the file for the answer
and the TrainingArguments as JSON."""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
from child_ranks import leave
from hf_trainer import make_trainer

import memfit


def main() -> None:
    arguments = json.loads(sys.argv[2])
    ranks = arguments.pop("ranks", None)
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(folder, **arguments)
        prediction = memfit.from_trainer(trainer, ranks=ranks, probe=False)
        total = torch.ones(1)
        dist.all_reduce(total)  # the launch's own process group still works
        trainer.train()
    answer = {
        "plan": {use.technique: use.settings for use in prediction.plan.uses},
        "ranks": prediction.plan.ranks,
        "batch": prediction.job.batch_size,
        "clip": prediction.job.clip,
        "assumptions": list(prediction.estimate.assumptions),
        "bytes": prediction.allocated_bytes.value,
        "sum": float(total),
    }
    Path(sys.argv[1]).write_text(json.dumps(answer))


main()
leave()
