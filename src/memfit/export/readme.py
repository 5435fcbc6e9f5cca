"""Write the README.md of an export: how to start it, what it contains, and what it does not do."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from memfit.export import openfold, torchtitan
from memfit.export.base import RUN, Files, Handover
from memfit.export.script_steps import script_steps
from memfit.export.torchtitan import newer_cannot
from memfit.techniques.registry import effect_of

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
    """Return the text of README.md. ``files``: all other files of the export."""
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
    yield from _script_lines(handover)
    yield from _settings_lines(handover, files)
    yield "\n## What to know\n"
    if (caution := dependence_line(handover)) is not None:
        yield f"- {caution}"
    yield f"- {_clipping(target, handover)}"
    for line in _notes(target, handover):
        yield f"- {line}"


def dependence_line(handover: Handover) -> str | None:
    """Return a sentence saying that the plan splits a batch whose samples depend, or may depend, on each
    other; None if they do not."""
    dependence = handover.dependence
    if dependence is None or not dependence.sentence:
        return None
    effect = effect_of(handover.plan, dependence).label
    return f"{effect}: {dependence.sentence}."


def _script_lines(handover: Handover) -> Iterator[str]:
    steps = script_steps(handover.config.spec) if handover.script else ()
    if not steps:
        return
    yield f"\n## What {handover.script[0]} must do itself\n"
    yield "No file here applies these, and `--script-applies` said that the script does:\n"
    yield from (f"- `{step.name}`: {step.text}" for step in steps)
    yield "\n`memfit.conform(model, optimizer, 'plan.yaml', step=one_step)` checks it on every rank."


def _settings_lines(handover: Handover, files: Files) -> Iterator[str]:
    given, kept = handover.user_files, handover.kept
    if given is None or kept is None:
        return
    yield "\n## Your settings\n"
    for name, path in sorted(kept.sources.items()):
        yield f"- `{name}` has every setting of `{Path(path).name}` that the plan does not decide."
    yield from (f"- Changed for the plan: {change}." for change in kept.changed)
    yield from (f"- Not in the export: {left}." for left in kept.not_carried)
    if torchtitan.ARGUMENTS in files and kept.sources:
        yield f"- `{torchtitan.ARGUMENTS}` has the plan alone: v0.3 reads no TOML with your other settings."
    for unused in set(given.setup.files) - set(kept.sources.values()):
        yield f"- Not in the export: settings of `{Path(unused).name}`; this target has no file for them."
    for left in given.carried.left_out:
        yield f"- Not in the plan: {left.option}: {left.reason}."


_DEFAULT_CLIPPING = {
    "trainer": "the Trainer's own default, 1.0 (max_grad_norm), holds, without DeepSpeed",
    "torchtitan": "torchtitan's own default, 1.0 (training.max_norm), holds",
    "megatron": "Megatron-LM's own default, 1.0 (--clip-grad), holds for a script of yours",
    "deepspeed": "DeepSpeed's file says 0, as its own default is 1.0: write yours there",
}


def _clipping(target: str, handover: Handover) -> str:
    """Return a sentence on where gradients are clipped, and to which norm."""
    spec, given = handover.config.spec, handover.user_files
    if target == "openfold":
        return "Gradients are clipped as openfold's files say; DeepSpeed's file says its norm."
    if spec.clip:
        said = given is not None and (given.clipping.explicit or given.job_clip is None)
        by = "your configuration" if said else "the job"
        return f"Gradients are clipped to a norm of {spec.clip:g}, as {by} says."
    if given is not None and given.clipping.explicit:
        return "Gradients are not clipped, as your configuration says."
    key = target if target in _DEFAULT_CLIPPING else spec.engine
    default = _DEFAULT_CLIPPING.get(
        key if spec.engine != "accelerate" or "zero" not in spec.plan.label else "deepspeed"
    )
    return "Neither the job nor a configuration clips gradients, and the prediction is for none" + (
        f"; {default}." if default else "."
    )


def _what(name: str, handover: Handover) -> str:
    if name in handover.engine_files:
        as_run = handover.kept is None and not handover.script
        return f"the configuration of {handover.config.engine}" + (
            ", byte for byte what `memfit run` uses" if as_run else ""
        )
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
        yield "Its steps are torchtitan's own: chunked losses are its configuration's."
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
