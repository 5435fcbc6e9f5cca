"""Export for Slurm: an sbatch file with one task per node. Each starts torchrun.sh with its node rank.

Options are those of sbatch(1) and srun(1), Slurm 25.05.
"""

from __future__ import annotations

from collections.abc import Iterator

from memfit.export import torchrun
from memfit.export.base import Files, Handover

JOB = "job.sbatch"

_BODY = """\
set -euo pipefail
cd -- "$SLURM_SUBMIT_DIR"
if [ ! -f {script} ]; then
  echo "{script} is not in $SLURM_SUBMIT_DIR: submit from the folder of this file" >&2
  exit 2
fi
HEAD_ADDR="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)"
HEAD_PORT="$((20000 + SLURM_JOB_ID % 20000))"
RUN_ID="$SLURM_JOB_ID-${{SLURM_RESTART_COUNT:-0}}"
LOGS="logs/$RUN_ID"
SRUN_CPUS_PER_TASK="$SLURM_CPUS_PER_TASK"
export HEAD_ADDR HEAD_PORT RUN_ID LOGS SRUN_CPUS_PER_TASK
srun --kill-on-bad-exit=1 bash -c 'NODE_RANK="$SLURM_NODEID" exec bash {script}'
"""


def files(handover: Handover) -> Files:
    """Return the files of the export, name -> text: those of ``torchrun.files`` (torchrun.sh and what every
    node needs beside it), and job.sbatch. Raises UserError if the engine's configuration cannot be passed to
    the user's script."""
    return {**torchrun.files(handover), JOB: sbatch(handover)}


def sbatch(handover: Handover) -> str:
    """Return the text of job.sbatch."""
    options = "".join(f"#SBATCH --{option}\n" for option in _options(handover))
    return f"#!/usr/bin/env bash\n{options}{_BODY.format(script=torchrun.SCRIPT)}"


def _options(handover: Handover) -> Iterator[str]:
    yield f"job-name={handover.name}"
    yield f"nodes={handover.nodes}"
    yield "ntasks-per-node=1"
    yield f"cpus-per-task={handover.cpus_per_node}"
    if handover.on_gpus:
        yield f"gpus-per-node={handover.per_node}"
    yield "requeue"
    yield "open-mode=append"
    yield "output=%x-%j.log"
