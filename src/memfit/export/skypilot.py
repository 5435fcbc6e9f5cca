"""Export for SkyPilot: a task that copies its folder to every node and runs torchrun.sh there.

Fields are those of SkyPilot's task YAML (0.14). Nodes learn their place from SKYPILOT_NODE_RANK and
SKYPILOT_NODE_IPS.
"""

from __future__ import annotations

import shlex
from typing import Any

from memfit.engines.registry import ENGINES
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
    """Return the files of the export, name -> text: those of ``torchrun.files`` (torchrun.sh and what every
    node needs beside it), and task.yaml. Raises UserError if a script of the user trains and no accelerator
    is named (``--gpu``), or if the engine's configuration cannot be passed to the user's script."""
    return {**torchrun.files(handover), TASK: text([task(handover)])}


def task(handover: Handover) -> dict[str, Any]:
    """Return the content of task.yaml. Raises UserError if a script of the user trains and no accelerator is
    named (``--gpu``)."""
    return {
        "name": handover.name,
        "num_nodes": handover.nodes,
        "workdir": ".",  # the folder in which `sky launch` is called
        "resources": _resources(handover),
        "setup": (handover.setup or _check(handover)).rstrip("\n") + "\n",
        "run": _RUN.format(script=torchrun.SCRIPT),
    }


def _resources(handover: Handover) -> dict[str, Any]:
    recovery = {"job_recovery": {"max_restarts_on_errors": handover.max_restarts}}  # for managed jobs
    if not handover.on_gpus:
        return {"cpus": f"{handover.cpus_per_node}+", **recovery}
    if not handover.gpu:
        raise UserError(
            "--gpu is missing, which --to skypilot needs with --script",
            allowed="an accelerator as `sky show-gpus` lists it",
            hint="for example --gpu H100",
        )
    return {"accelerators": f"{handover.gpu}:{handover.per_node}", **recovery}


def _check(handover: Handover) -> str:
    """Return a shell command that fails if a Python package is missing: it imports torch; memfit if its
    worker trains; and the engine's package if it has one. It serves as set-up command if none is given, so
    that a node reports a missing package before anything starts."""
    packages = ["torch"] if handover.script else ["torch", "memfit"]
    engine = ENGINES[handover.config.engine]
    if package := engine.module or engine.distribution:
        packages.append(package)
    return f"python -c {shlex.quote('import ' + ', '.join(packages))}"
