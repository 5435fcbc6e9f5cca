"""README.md of an export: how it is started, what it holds, what it does not do."""

from __future__ import annotations

from collections.abc import Iterator

from memfit.export import openfold
from memfit.export.base import RUN, Files, Handover
from memfit.export.torchtitan import newer_cannot

NAME = "README.md"

_START = {
    "torchrun": "On every node, with its own number:\n\n"
    "```sh\n{where}bash torchrun.sh\n```\n\n"
    "`HEAD_PORT` (29400), `LOGS` (logs), `PYTHON` (python) and `LOCAL_ADDR` may be set too.",
    "slurm": "From this folder, on a file system that all nodes see:\n\n"
    "```sh\nsbatch job.sbatch\n```\n\n"
    "Partition, account and time limit are your cluster's: `sbatch --partition=... --time=... job.sbatch`. "
    "Slurm requeues the job when a node fails or it is preempted.",
    "k8s": "```sh\nkubectl apply -f job.yaml\nkubectl logs -f job/{name} --all-pods --prefix\n```\n\n"
    "No operator is needed. The ConfigMap in job.yaml holds the other files. Pods that come one by one wait "
    "for each other; a queue such as Kueue starts them together.",
    "skypilot": "From this folder:\n\n"
    "```sh\nsky launch -c {name} task.yaml\n```\n\n"
    "`sky jobs launch task.yaml` starts again after a preemption, and after errors too.",
    "trainer": "In your script:\n\n"
    "```python\n(args,) = HfArgumentParser(TrainingArguments).parse_json_file('training_args.json')\n```\n\n"
    "started on {ranks} processes. What is not in the file (learning rate, epochs, folders) is yours to set. "
    "`memfit.integrations.transformers.MemfitCallback` looks whether it does what the plan says.",
    "torchtitan": "torchtitan v0.3, with your `--module` and `--config`:\n\n"
    "```sh\ntorchrun --nproc-per-node {ranks} -m torchtitan.train --module llama3 --config llama3_8b "
    "$(cat torchtitan.args)\n```\n\n"
    "v0.2.2, the last with TOML: add your `[model]` and data to torchtitan.toml, and "
    "`torchrun ... -m torchtitan.train --job.config_file torchtitan.toml`.",
    "openfold": "With your data, from this folder, on every node:\n\n"
    "```sh\npython train_openfold.py MMCIF_DIR ALIGNMENT_DIR TEMPLATE_MMCIF_DIR OUTPUT_DIR 2021-10-10 "
    "$(cat openfold.args)\n```\n\n"
    "What is not in the files (caches of chains, learning rate, epochs) is yours to give.",
}


def readme(target: str, handover: Handover, files: Files) -> str:
    return "\n".join(_lines(target, handover, files)) + "\n"


def _lines(target: str, handover: Handover, files: Files) -> Iterator[str]:
    plan = handover.plan
    yield f"# {handover.name}\n"
    yield f"Plan: {plan.label}. Engine: {handover.config.engine}.\n"
    yield f"{plan.ranks} processes, {handover.per_node} on each of {handover.nodes} nodes.\n"
    yield "## Start\n"
    where = "NODE_RANK=0 HEAD_ADDR=first-node " if handover.nodes > 1 else ""
    yield _START[target].format(where=where, name=handover.name, ranks=plan.ranks) + "\n"
    yield "## Files\n"
    for name in sorted(files):
        yield f"- `{name}`: {_what(name, handover)}"
    yield "\n## What to know\n"
    for line in _notes(target, handover):
        yield f"- {line}"


def _what(name: str, handover: Handover) -> str:
    if name in handover.engine_files:
        return f"the configuration of {handover.config.engine}, byte for byte what `memfit run` uses"
    known = {
        RUN: "the run, as `memfit run` would execute it",
        "plan.yaml": "the plan, for `memfit explain --plan` and `memfit.conform`",
        "torchrun.sh": "what every node executes",
        "training_args.json": "the plan as TrainingArguments",
        "torchtitan.toml": "the plan for torchtitan v0.2.2",
        "torchtitan.args": "the plan for torchtitan v0.3",
        openfold.ARGUMENTS: "arguments of train_openfold.py",
        openfold.CHANGES: "what they change of OpenFold's configuration",
        openfold.DEEPSPEED: "DeepSpeed's configuration, as Lightning takes it",
    }
    return known.get(name) or ("yours" if name in handover.own_files else "what is submitted")


def _notes(target: str, handover: Handover) -> Iterator[str]:
    spec = handover.config.spec
    if target == "torchtitan":
        yield "Its steps are torchtitan's own: chunked losses and clipping are its configuration's."
        yield from (f"torchtitan.args is not here: v0.3 has no {n}." for n in newer_cannot(handover.plan))
    if target == "openfold":
        yield from openfold.notes(handover.plan)
    if target in {"trainer", "torchtitan", "openfold"}:
        yield f"The batch is {spec.batch_size} samples a step on all ranks."
        return
    if handover.script:
        yield (
            "Every node needs Python with what your script imports; modules of your own go beside it. The "
            "configuration says how many samples a rank takes: "
            f"{spec.batch_size} a step on all ranks were given."
        )
        if handover.config.engine == "native":
            yield (
                "The native engine has no configuration file: your script applies plan.yaml, and "
                "`memfit.conform(model, optimizer, plan)` tells whether it did."
            )
        return
    yield (
        "memfit's worker joins its ranks over gloo and trains on processors; it does not use GPUs on several "
        "ranks. For GPUs hand the plan to your own script: `memfit export --script train.py`."
    )
    if spec.keep.save:
        where = f"`{spec.keep.save}`, which all nodes must see"
        yield f"Ranks that are started again go on from the newest complete checkpoint in {where}."
    else:
        yield "It keeps no checkpoints: a restart begins at the first step (`--save DIR` changes that)."
    extra = "" if handover.config.engine == "native" else f"[{handover.config.engine}]"
    yield f"Every node needs Python with memfit and the engine's packages: `pip install 'memfit{extra}'`."
    given = [f"`{p}`" for p in (spec.job.data, spec.job.weights) if p]
    if given:
        yield f"These must be there on every node: {', '.join(given)}."
    if handover.nodes > 1:
        yield "Where gloo takes the wrong network, say which: `GLOO_SOCKET_IFNAME=eth0`."
