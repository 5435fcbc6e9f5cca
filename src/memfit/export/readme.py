"""Write the README.md of an export: how to start it, what it contains, and what it does not do."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from memfit.engines import deepspeed
from memfit.export import openfold, torchtitan
from memfit.export.base import RUN, Files, Handover
from memfit.export.script_steps import LOSS_TERMS, dependence_caution
from memfit.export.torchtitan import newer_cannot

NAME = "README.md"

_START = {
    "torchrun": "Run this on every node; with several nodes, `NODE_RANK` is different on each:\n\n"
    "```sh\n{where}bash torchrun.sh\n```\n\n"
    "`HEAD_PORT` (default 29400), `LOGS` (logs), `PYTHON` (python) and `LOCAL_ADDR` can be set as well.",
    "slurm": "From this folder, on a file system that all nodes see:\n\n"
    "```sh\nsbatch job.sbatch\n```\n\n"
    "Partition, account and time limit depend on your cluster: "
    "`sbatch --partition=... --time=... job.sbatch`. "
    "Slurm requeues the job when a node fails or it is preempted.",
    "k8s": "```sh\nkubectl apply -f job.yaml\nkubectl logs -f job/{name} --all-pods --prefix\n```\n\n"
    "No operator is needed. The ConfigMap in job.yaml holds the other files. Pods that start one by one wait "
    "for each other; a queue such as Kueue starts them together.",
    "skypilot": "From this folder:\n\n"
    "```sh\nsky launch -c {name} task.yaml\n```\n\n"
    "`sky jobs launch task.yaml` restarts the task after a preemption or an error.",
    "trainer": "In your script:\n\n"
    "```python\n(args,) = HfArgumentParser(TrainingArguments).parse_json_file('training_args.json')\n```\n\n"
    "Start it on {ranks} processes. Set what is not in the file (learning rate, epochs, folders) yourself. "
    "`memfit.integrations.transformers.MemfitCallback` checks that the run follows the plan.",
    "torchtitan": "torchtitan v0.3, with your `--module` and `--config`:\n\n"
    "```sh\ntorchrun --nproc-per-node {ranks} -m torchtitan.train --module llama3 --config llama3_8b "
    "$(cat torchtitan.args)\n```\n\n"
    "v0.2.2, the last version that reads TOML: add your `[model]` and data to torchtitan.toml, then run "
    "`torchrun ... -m torchtitan.train --job.config_file torchtitan.toml`.",
    "openfold": "Run this with your data, from this folder, on every node:\n\n"
    "```sh\npython train_openfold.py MMCIF_DIR ALIGNMENT_DIR TEMPLATE_MMCIF_DIR OUTPUT_DIR 2021-10-10 "
    "$(cat openfold.args)\n```\n\n"
    "Pass what is not in the files (caches of chains, learning rate, epochs) yourself.",
}


def readme(target: str, handover: Handover, files: Files) -> str:
    """Return the text of README.md. ``target``: name of the export's target, such as slurm; ``files``: all
    other files of the export, name -> text."""
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
    if handover.user_files is not None:
        yield from (f"- {sentence}" for sentence in handover.user_files.unused_norms)
    for line in _notes(target, handover):
        yield f"- {line}"


def dependence_line(handover: Handover) -> str | None:
    """Return the README's caution that the plan splits a batch whose samples depend on each other, or were
    not tested for it (`dependence_caution`); None if there is nothing to say."""
    return dependence_caution(handover.plan, handover.dependence)


def _script_lines(handover: Handover) -> Iterator[str]:
    steps = handover.script_steps
    if not steps:
        return
    yield f"\n## What {handover.training_code} must do itself\n"
    yield "No file here applies these steps; `--script-applies` declared that the script does:\n"
    yield from (f"- `{step.name}`: {step.text}" for step in steps)
    if names := [f"`{step.name}`" for step in steps if step.name != LOSS_TERMS]:
        yield (
            "\n`memfit.conform(model, optimizer, 'plan.yaml', step=one_step)` checks "
            f"{', '.join(names)} on every rank."
        )
    if len(names) < len(steps):
        yield f"\nNothing checks `{LOSS_TERMS}`."


def _settings_lines(handover: Handover, files: Files) -> Iterator[str]:
    user_files, settings = handover.user_files, handover.kept
    if user_files is None or settings is None:
        return
    yield "\n## Your settings\n"
    for name, path in sorted(settings.sources.items()):
        yield f"- `{name}` keeps every setting of `{Path(path).name}` that the plan does not decide."
    yield from (f"- Changed for the plan: {change}." for change in settings.changed)
    yield from (f"- Not in the export: {omission}." for omission in settings.not_carried)
    if torchtitan.ARGUMENTS in files and settings.sources:
        yield f"- `{torchtitan.ARGUMENTS}` has only the plan: v0.3 does not read TOML with your settings."
    for unused in sorted(set(user_files.setup.files) - set(settings.sources.values())):
        yield f"- Not in the export: settings of `{Path(unused).name}`; this target has no file for them."
    for omission in user_files.carried.left_out:
        yield f"- Not in the plan: {omission.option}: {omission.reason}."


_DEFAULT_CLIPPING = {
    "trainer": "without DeepSpeed, the Trainer's own default of 1.0 (max_grad_norm) applies",
    "torchtitan": "torchtitan's own default of 1.0 (training.max_norm) applies",
    "megatron": "in a script of yours, Megatron-LM's own default of 1.0 (--clip-grad) applies",
    "deepspeed": "DeepSpeed's file sets 0, because its own default is 1.0; write your norm there",
}


def _clipping(target: str, handover: Handover) -> str:
    """Return one or two sentences for the README on whether gradients are clipped, to which norm, and whether
    the user's files, the job or a library's default decide this. ``target``: name of the export's target,
    such as slurm."""
    spec, user_files = handover.config.spec, handover.user_files
    if target == "openfold":
        return _openfold_clipping(handover)
    if spec.clip:
        from_files = user_files is not None and (user_files.clipping.explicit or user_files.job_clip is None)
        source = "your configuration" if from_files else "the job"
        return f"Gradients are clipped to a norm of {spec.clip:g}, as {source} specifies."
    if user_files is not None and user_files.clipping.explicit:
        return "Gradients are not clipped, as your configuration specifies."
    key = target if target in _DEFAULT_CLIPPING else spec.engine
    default = _DEFAULT_CLIPPING.get(
        key if spec.engine != "accelerate" or "zero" not in spec.plan.label else "deepspeed"
    )
    return "Neither the job nor a configuration clips gradients, and the prediction assumes no clipping" + (
        f"; {default}." if default else "."
    )


def _openfold_clipping(handover: Handover) -> str:
    if "zero" not in handover.plan and "bf16-parameters" not in handover.plan:
        return "No file here clips gradients, and the prediction assumes no clipping."
    if handover.config.spec.clip:
        return f"DeepSpeed's file clips gradients to a norm of {handover.config.spec.clip:g}."
    return (
        "DeepSpeed's file does not clip gradients, as the prediction assumes; OpenFold's own file clips to a "
        "norm of 0.1."
    )


def _what(name: str, handover: Handover) -> str:
    if name in handover.engine_files:
        is_unchanged = handover.kept is None and not handover.script
        return f"the configuration of {handover.config.engine}" + (
            ", byte for byte what `memfit run` uses" if is_unchanged else ""
        )
    descriptions = {
        RUN: "the run, as `memfit run` would execute it",
        "plan.yaml": "the plan, for `memfit estimate JOB --plan` and `memfit.conform`",
        "torchrun.sh": "the script that every node executes",
        "training_args.json": "the plan as TrainingArguments",
        "torchtitan.toml": "the plan for torchtitan v0.2.2",
        "torchtitan.args": "the plan for torchtitan v0.3",
        openfold.ARGUMENTS: "arguments of train_openfold.py",
        openfold.CHANGES: "changes to OpenFold's configuration",
        openfold.DEEPSPEED: "DeepSpeed's configuration, in the form that Lightning accepts",
    }
    return descriptions.get(name) or ("your file" if name in handover.own_files else "the file to submit")


def _notes(target: str, handover: Handover) -> Iterator[str]:
    spec = handover.config.spec
    zero = handover.plan.get("zero")
    if zero is not None and zero.settings["nvme"] != "none" and handover.config.engine != "native":
        yield (
            f"Optimizer state goes to `nvme_path` in `{deepspeed.CONFIG}`, which is `{deepspeed.NVME_PATH}` "
            "unless your file says otherwise: give a folder on a local NVMe disk of each node. DeepSpeed "
            "writes there with libaio, which must be installed."
        )
    if target == "torchtitan":
        yield "The training step is torchtitan's own; its configuration decides whether losses are chunked."
        yield from (
            f"torchtitan.args is missing, because v0.3 does not support {n}."
            for n in newer_cannot(handover.plan)
        )
    if target == "openfold":
        yield from openfold.notes(handover.plan)
    if target in {"trainer", "torchtitan", "openfold"}:
        yield f"The batch is {spec.batch_size} samples per step over all ranks."
        return
    if handover.script:
        yield (
            "Every node needs Python with the packages that your script imports; put your own modules beside "
            "it. The configuration says how many samples a rank takes; over all ranks the plan has "
            f"{spec.batch_size} per step."
        )
        if handover.config.engine == "native":
            yield (
                "The native engine has no configuration file: your script applies plan.yaml, and "
                "`memfit.conform(model, optimizer, plan)` checks that it did."
            )
        return
    yield (
        "memfit's worker connects its ranks over gloo and trains on CPUs; it does not use GPUs for several "
        "ranks. For GPUs use a script of your own: `memfit export --script train.py`."
    )
    if spec.keep.save:
        directory = f"`{spec.keep.save}`, which all nodes must be able to access"
        yield f"Restarted ranks continue from the newest complete checkpoint in {directory}."
    else:
        yield "The run saves no checkpoint, so a restart begins at step 0 (`--save DIR` changes that)."
    extra = "" if handover.config.engine == "native" else f"[{handover.config.engine}]"
    yield f"Every node needs Python with memfit and the engine's packages: `pip install 'memfit{extra}'`."
    paths = [f"`{p}`" for p in (spec.job.data, spec.job.weights) if p]
    if paths:
        yield f"These paths must exist on every node: {', '.join(paths)}."
    if handover.nodes > 1:
        yield "If gloo picks the wrong network interface, name the right one: `GLOO_SOCKET_IFNAME=eth0`."
