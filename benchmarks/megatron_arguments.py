"""Does Megatron-LM's trainer take the arguments that memfit renders? Its own parser and validation say.

    python benchmarks/megatron_arguments.py CHECKOUT...

CHECKOUT: a clone of NVIDIA/Megatron-LM at a core release (`git checkout core_v0.16.1`), or a folder with the
package megatron-core of 0.17 or later, which holds the parser too. It needs `pip install six`. Writes
records/megatron_arguments.jsonl, a line a plan and release, and megatron_arguments.md.
tests/engines/test_megatron_parser.py does the same with a package.
"""

from __future__ import annotations

import contextlib
import datetime
import io
import json
import os
import subprocess
import sys
import types
import typing
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

from memfit.engines.megatron import CONFIG, ENGINE
from memfit.engines.megatron.gpt import read, sizes
from memfit.engines.registry import render
from memfit.jobs.builtin.gpt import Gpt, GptSize
from memfit.techniques.rank_mesh import layout
from memfit.techniques.registry import check, make_use
from memfit.types.job import JobRef
from memfit.types.launch import RunSpec
from memfit.types.plan import Plan

PAGE = Path(__file__).with_suffix(".md")
RECORDS = Path(__file__).parent / "records" / "megatron_arguments.jsonl"
SIZE = GptSize(layers=8, width=64, heads=4, length=32, vocabulary=128, batch_size=64)
_TENSOR = {"vocabulary": "gathered"}
PLANS: tuple[tuple[int, dict[str, dict[str, Any]]], ...] = (
    (1, {}),
    (1, {"gradient-accumulation": {"micro_batches": 8}, "activation-checkpointing": {}, "sgd": {}}),
    (2, {"tensor-parallel": _TENSOR}),
    (4, {"tensor-parallel": {**_TENSOR, "degree": 4, "sequence": True}, "activation-checkpointing": {}}),
    (4, {"tensor-parallel": {**_TENSOR, "sequence": True}, "fsdp2": {"replicas": 2}}),
    (2, {"ddp": {"bucket_mib": 4}}),
    (8, {"zero": {"stage": 1, "precision": "bf16"}, "gradient-accumulation": {"micro_batches": 2}}),
    (4, {"zero": {"stage": 1, "overlap": True, "reduce_bucket_elements": 1_000_000}}),
    (1, {"bf16-parameters": {}}),
    (2, {"pipeline": {"stages": 2, "micro_batches": 8}}),
    (4, {"pipeline": {"stages": 2, "schedule": "interleaved", "virtual": 2, "micro_batches": 8}, "ddp": {}}),
    (4, {"pipeline": {"stages": 2, "micro_batches": 4}, "tensor-parallel": _TENSOR}),
    (2, {"context-parallel": {"degree": 2}}),
)
DEGREES = (
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "context_parallel_size",
    "data_parallel_size",
    "world_size",
)
RENAMED = {"norm_epsilon": "layernorm_epsilon"}


def main(checkouts: list[Path]) -> None:
    lines = [line for checkout in checkouts for line in judged(checkout)]
    RECORDS.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    PAGE.write_text(page(lines), encoding="utf-8")
    print(PAGE.read_text(encoding="utf-8"))
    if any(line["refused"] for line in lines):
        raise SystemExit(1)


def page(lines: list[dict[str, Any]]) -> str:
    tried: dict[tuple[str, str, str], list[str]] = {}
    for line in lines:
        tried.setdefault((line["core"], line["commit"], line["date"]), []).append(line["refused"])
    rows = (
        f"| {core} | {commit} | {date} | {refused.count('')} of {len(refused)} |"
        for (core, commit, date), refused in tried.items()
    )
    found = [f"- {line['core']}, {line['plan']}: {line['refused']}" for line in lines if line["refused"]]
    named = [f"- {plan}" for plan in dict.fromkeys(line["plan"] for line in lines)]
    return "\n".join(
        [
            "# Arguments of Megatron-LM",
            "",
            "Written by `python benchmarks/megatron_arguments.py CHECKOUT...`: what the engine `megatron`",
            "renders for plans, read by `parse_args` and `validate_args` of Megatron-LM's trainer. Taken:",
            "neither objects, every option comes out as given, and degrees, type, recomputation and",
            "optimizer that follow are the plan's. Nothing was trained.",
            "",
            "| megatron-core | commit | tried | plans taken |",
            "|---|---|---|--:|",
            *rows,
            "",
            *(["Refused:", "", *found, ""] if found else []),
            "The plans:",
            "",
            *named,
            "",
        ]
    )


def plans() -> list[Plan]:
    return [
        check(Plan(ranks=ranks, uses=tuple(make_use(n, k) for n, k in uses.items()))) for ranks, uses in PLANS
    ]


def judged(checkout: Path) -> list[dict[str, Any]]:
    """By plan: what was rendered, what the parser said, and why it was not taken, "" where it was."""
    texts = [_rendered(plan) for plan in plans()]
    given = [[plan.ranks, text.split()] for plan, text in zip(plans(), texts, strict=True)]
    child = subprocess.run(
        (sys.executable, __file__, "--parse", str(checkout)),
        input=json.dumps(given),
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **ENGINE.variables("cpu")},
    )
    if child.returncode:
        raise RuntimeError(f"the parser of {checkout} does not load: {child.stderr}")
    told = json.loads(child.stdout.splitlines()[-1])
    where = {
        "core": told["core"],
        "commit": _commit(checkout),
        "date": f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d}",
    }
    return [
        {
            **where,
            "plan": plan.label,
            "arguments": text.splitlines(),
            "refused": _why(plan, said),
            "said": said,
        }
        for plan, text, said in zip(plans(), texts, told["said"], strict=True)
    ]


def _rendered(plan: Plan) -> str:
    assert ENGINE.refusals(plan) == (), ENGINE.refusals(plan)
    spec = RunSpec(
        name="x",
        role="run",
        job=JobRef(spec="x"),
        plan=plan,
        engine="megatron",
        seed=0,
        steps=10,
        batch_size=SIZE.batch_size,
        sizes=sizes(read(Gpt(SIZE))),
    )
    return render(spec).files[CONFIG]


def _why(plan: Plan, said: dict[str, Any]) -> str:
    if "refused" in said:
        return str(said["refused"])
    differs = [name for name, value in _wanted(plan).items() if said[name] != value]
    return f"not as planned: {', '.join(differs)}" if differs else ""


def _commit(checkout: Path) -> str:
    if not (checkout / ".git").exists():
        return "the package"
    command = ("git", "-C", str(checkout), "rev-parse", "--short=12", "HEAD")
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def _wanted(plan: Plan) -> dict[str, Any]:
    """What the parsed arguments must say."""
    place, zero, stages = layout(plan), plan.get("zero"), plan.get("pipeline")
    bf16 = bool(plan.get("bf16-parameters")) or (zero is not None and zero.settings["precision"] == "bf16")
    tensor, virtual = plan.get("tensor-parallel"), int(stages.settings["virtual"]) if stages else 1
    return {
        "misread": [],
        "tensor_model_parallel_size": place.tensor,
        "pipeline_model_parallel_size": place.pipeline,
        "context_parallel_size": place.context,
        "data_parallel_size": place.data,
        "world_size": plan.ranks,
        "virtual": virtual if virtual > 1 else None,
        "sequence_parallel": tensor is not None and bool(tensor.settings["sequence"]),
        "distributed_optimizer": zero is not None,
        "recompute": "full" if plan.get("activation-checkpointing") else None,
        "dtype": "torch.bfloat16" if bf16 else "torch.float32",
        "layers": SIZE.layers,
    }


def parse(checkout: str, given: list[tuple[int, list[str]]]) -> dict[str, Any]:
    """In a process of its own: the checkout's parser, without what its package loads for training."""
    sys.path.insert(0, checkout)
    package = types.ModuleType("megatron.training")
    package.__path__ = [f"{checkout}/megatron/training"]
    sys.modules["megatron.training"] = package
    # 0.19: kernels that want Triton, and a name that typing has since Python 3.12.
    sys.modules["megatron.core.transformer.moe.ops.paged_stash"] = MagicMock()
    if not hasattr(typing, "override"):
        vars(typing)["override"] = lambda method: method
    with contextlib.redirect_stdout(io.StringIO()):
        from megatron.training import global_vars

        vars(package).update({k: v for k, v in vars(global_vars).items() if k.startswith("get_")})
        from megatron.core.package_info import __version__
        from megatron.training import arguments

        arguments.get_device_arch_version = lambda: 9  # it looks at the GPU that it will run on
        said = [_parsed(arguments, ranks, words) for ranks, words in given]
    return {"core": __version__.partition("+")[0], "said": said}


def _parsed(arguments: Any, ranks: int, words: list[str]) -> dict[str, Any]:
    sys.argv = ["pretrain_gpt.py", *words]
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            found = arguments.parse_args()
            misread = _misread(found, words)
            found.world_size = ranks
            arguments.validate_args(found)
    except (SystemExit, AssertionError, RuntimeError, TypeError, ValueError) as error:
        last = (complaint.getvalue().strip().splitlines() or [""])[-1]
        return {"refused": f"{type(error).__name__} {error}: {last}"}
    return {name: getattr(found, name) for name in DEGREES} | {
        "misread": misread,
        "virtual": found.virtual_pipeline_model_parallel_size,
        "sequence_parallel": found.sequence_parallel,
        "distributed_optimizer": found.use_distributed_optimizer,
        "recompute": found.recompute_granularity,
        "dtype": str(found.params_dtype),
        "micro_batch_size": found.micro_batch_size,
        "layers": found.num_layers,
    }


def _misread(found: Any, words: list[str]) -> list[str]:
    """Options that do not come out with the value given; ``no-x`` and ``disable-x`` only need to be
    known."""
    pairs = zip(words, [*words[1:], "--"], strict=True)
    options = {w[2:].replace("-", "_"): True if v[:2] == "--" else v for w, v in pairs if w[:2] == "--"}
    kept = {
        RENAMED.get(name, name): value
        for name, value in options.items()
        if not name.startswith(("no_", "disable_"))
    }
    return [
        name
        for name, value in kept.items()
        if not hasattr(found, name) or type(getattr(found, name))(value) != getattr(found, name)
    ]


if __name__ == "__main__":
    if sys.argv[1] == "--parse":
        print(json.dumps(parse(sys.argv[2], json.load(sys.stdin))))
    else:
        main([Path(given).resolve() for given in sys.argv[1:]])
