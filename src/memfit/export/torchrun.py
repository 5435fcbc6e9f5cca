"""Export of the script that every node executes: torch's elastic launcher, or accelerate launch around it.

Flags are those of torch/distributed/run.py (2.13) and accelerate/commands/launch.py (1.15).
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from pathlib import Path

from memfit.export.base import Files, Handover, quote
from memfit.types.errors import UserError

SCRIPT = "torchrun.sh"

_HEAD = """\
#!/usr/bin/env bash
# {label}
# {engine}: {ranks} ranks, {per_node} on each of {nodes} nodes. Start it on every node; README.md says how.
set -euo pipefail
cd -- "$(dirname -- "${{BASH_SOURCE[0]}}")"
: "${{PYTHON:=python}}" "${{LOGS:=logs}}"
# Otherwise restarted ranks read the addresses of dead ones (pytorch/pytorch issue 135712).
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
"""
_SEVERAL_NODES = """\
: "${NODE_RANK:?is 0 on the first node, then 1, 2, ...}"
: "${HEAD_ADDR:?is the name or address of the first node}"
: "${HEAD_PORT:=29400}" "${RUN_ID:=memfit}"
# The first node hosts the rendezvous; torchrun does not have to guess it from host names.
if [ "$NODE_RANK" = 0 ]; then is_host=1; else is_host=0; fi
"""


def files(handover: Handover) -> Files:
    """Return the files of the export, name -> text: torchrun.sh and ``handover.carried``, the files that
    every node needs beside it. Raises UserError if the engine's configuration cannot be passed to the user's
    script (see `program`)."""
    return {**handover.carried, SCRIPT: script(handover)}


def script(handover: Handover) -> str:
    """Return the text of torchrun.sh. Raises UserError as `program` does."""
    head = _HEAD.format(
        label=handover.plan.label,
        engine=handover.config.engine,
        ranks=handover.plan.ranks,
        per_node=handover.per_node,
        nodes=handover.nodes,
    )
    node_variables = _SEVERAL_NODES if handover.nodes > 1 else ""
    export_lines = "".join(f"export {k}={shlex.quote(v)}\n" for k, v in environment(handover).items())
    by_accelerate = handover.script and handover.config.engine == "accelerate"
    command = _accelerate(handover) if by_accelerate else _torchrun(handover)
    return head + node_variables + export_lines + "exec " + " \\\n  ".join(command) + "\n"


def environment(handover: Handover) -> dict[str, str]:
    """Return the environment variables of the launch, name -> value, without PYTHONPATH, which holds paths of
    this machine, and LOCAL_RANK, which the launcher sets. For a script of the user three variables of
    memfit's worker are left out too: DS_ACCELERATOR, which makes DeepSpeed train on CPUs, PYTHONSAFEPATH,
    which removes the current folder from the import path, and TORCH_CUDNN_SDPA_DEPRIORITIZED, which chooses
    attention kernels."""
    of_worker = ("DS_ACCELERATOR", "PYTHONSAFEPATH", "TORCH_CUDNN_SDPA_DEPRIORITIZED")
    worker_variables = of_worker if handover.script else ()
    excluded = {"PYTHONPATH", "LOCAL_RANK", *worker_variables}
    return {k: v for k, v in handover.config.env.items() if k not in excluded}


def _torchrun(handover: Handover) -> Iterator[str]:
    yield '"$PYTHON" -m torch.distributed.run'
    yield f"--nnodes={handover.nodes} --nproc-per-node={handover.per_node}"
    yield f"--max-restarts={handover.max_restarts}"
    if handover.nodes > 1:
        yield '--rdzv-backend=c10d --rdzv-endpoint="$HEAD_ADDR:$HEAD_PORT" --rdzv-id="$RUN_ID"'
        yield '--rdzv-conf="is_host=$is_host" ${LOCAL_ADDR:+--local-addr="$LOCAL_ADDR"}'
    else:
        yield "--standalone"
    yield '--log-dir="$LOGS" --tee=3'
    yield program(handover)


def _accelerate(handover: Handover) -> Iterator[str]:
    """Yield the lines of the command ``accelerate launch``. accelerate.yaml describes one machine; the
    numbers of machines and processes and the first node's address are on the command line, which takes
    precedence. Raises UserError as `program` does."""
    yield '"$PYTHON" -m accelerate.commands.launch --config_file accelerate.yaml'
    yield f"--num_machines {handover.nodes} --num_processes {handover.plan.ranks}"
    if handover.nodes > 1:
        yield '--machine_rank "$NODE_RANK" --main_process_ip "$HEAD_ADDR" --main_process_port "$HEAD_PORT"'
        yield '--rdzv_backend c10d --rdzv_conf "is_host=$is_host"'
    yield f'--max_restarts {handover.max_restarts} --log_dir "$LOGS" --tee 3'
    yield program(handover)


def program(handover: Handover) -> str:
    """Return, as shell words, what every rank starts: memfit's worker, or the user's script with its
    arguments, followed by those that pass it the engine's configuration. Raises UserError if memfit does not
    know by which argument the script takes the configuration: with an engine other than native, accelerate,
    deepspeed and megatron, unless the script's own arguments name the file."""
    if not handover.script:
        return quote(part.replace("{dir}/", "") for part in handover.config.argv[1:])
    return " ".join(filter(None, (quote(handover.script), _configuration_arguments(handover))))


def _configuration_arguments(handover: Handover) -> str:
    """Return, as shell words, the arguments that pass the configuration of DeepSpeed or Megatron-LM to the
    user's script, such as "--deepspeed --deepspeed_config deepspeed.json".

    It is "" for the engines native and accelerate, which need none, and if the script's command line already
    contains the name of one of the engine's files, or of the user's file that it replaces. Otherwise raises
    UserError for an engine with neither deepspeed.json nor megatron.args.
    """
    engine, config_names = handover.config.engine, handover.engine_files
    sources = handover.kept.sources if handover.kept is not None else {}
    names = (*config_names, *(Path(sources[n]).name for n in config_names if n in sources))
    if engine in ("native", "accelerate") or any(n in word for n in names for word in handover.script):
        return ""
    if "deepspeed.json" in config_names:
        return "--deepspeed --deepspeed_config deepspeed.json"  # deepspeed.add_config_arguments
    if "megatron.args" in config_names:
        return "$(cat megatron.args)"
    raise UserError(
        f"memfit does not know the argument by which your script gets the configuration of engine {engine}, "
        f"{' and '.join(config_names)}",
        hint="add it to the command line of --script, with the argument that your script expects",
    )
