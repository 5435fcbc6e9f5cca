"""A SkyPilot task: its folder goes to every node, and each starts torchrun.sh.

Fields are those of SkyPilot's task YAML (0.14); nodes are told by SKYPILOT_NODE_RANK and SKYPILOT_NODE_IPS.
"""

from __future__ import annotations

import shlex
from typing import Any

from memfit.export import torchrun
from memfit.export.base import Files, Handover
from memfit.export.kubernetes import text
from memfit.types.errors import UserError

TASK = "task.yaml"

_RUN = """\
set -euo pipefail
export NODE_RANK="$SKYPILOT_NODE_RANK" RUN_ID="$SKYPILOT_TASK_ID"
HEAD_ADDR="$(echo "$SKYPILOT_NODE_IPS" | sed -n 1p)"
export HEAD_ADDR
exec bash {script}
"""


def files(handover: Handover) -> Files:
    return {**torchrun.files(handover), TASK: text([task(handover)])}


def task(handover: Handover) -> dict[str, Any]:
    return {
        "name": handover.name,
        "num_nodes": handover.nodes,
        "workdir": ".",  # the folder that `sky launch` is called in
        "resources": _resources(handover),
        "setup": (handover.setup or _check(handover)).rstrip("\n") + "\n",
        "run": _RUN.format(script=torchrun.SCRIPT),
    }


def _resources(handover: Handover) -> dict[str, Any]:
    recovery = {"job_recovery": {"max_restarts_on_errors": handover.max_restarts}}  # of managed jobs
    if not handover.on_gpus:
        return {"cpus": f"{handover.cpus_per_node}+", **recovery}
    if not handover.gpu:
        raise UserError("no --gpu", allowed="an accelerator as `sky show-gpus` lists it", hint="--gpu H100")
    return {"accelerators": f"{handover.gpu}:{handover.per_node}", **recovery}


def _check(handover: Handover) -> str:
    """Without a command that installs, a node that lacks something says so before anything starts."""
    needed = ["torch"] if handover.script else ["torch", "memfit"]
    distribution = {"accelerate": "accelerate", "deepspeed": "deepspeed", "megatron": "megatron.core"}
    needed += [distribution[handover.config.engine]] if handover.config.engine in distribution else []
    return f"python -c {shlex.quote('import ' + ', '.join(needed))}"
