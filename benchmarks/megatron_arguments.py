"""Does Megatron-LM's trainer take the arguments that memfit renders? Its own parser and validation say.

    python benchmarks/megatron_arguments.py CHECKOUT

CHECKOUT: a clone of NVIDIA/Megatron-LM at a core release (`git checkout core_v0.16.1`); the parser is in no
package. It needs `pip install six`. Writes records/megatron_arguments.jsonl, a line a plan.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

from memfit.engines.megatron import CONFIG, ENGINE
from memfit.engines.registry import render
from memfit.jobs.gpt import Gpt, GptSize
from memfit.techniques.registry import check, make_use
from memfit.techniques.world import layout
from memfit.types.job import JobRef
from memfit.types.launch import RunSpec
from memfit.types.plan import Plan
from memfit.worker.megatron_gpt import read, sizes

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
    "tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size",
    "data_parallel_size", "world_size",
)  # fmt: skip


def main(checkout: str) -> None:
    lines = [judged(checkout, plan) for plan in plans()]
    RECORDS.write_text("".join(json.dumps(line) + "\n" for line in lines))
    for line in lines:
        print(line["plan"], "|", line["refused"] or "taken", "|", line["said"])
    if any(line["refused"] for line in lines):
        raise SystemExit(1)


def plans() -> list[Plan]:
    return [
        check(Plan(ranks=ranks, uses=tuple(make_use(n, k) for n, k in uses.items()))) for ranks, uses in PLANS
    ]


def judged(checkout: str, plan: Plan) -> dict[str, Any]:
    assert ENGINE.supports(plan) == (), ENGINE.supports(plan)
    spec = RunSpec(
        name="x", role="run", job=JobRef(spec="x"), plan=plan, engine="megatron", seed=0, steps=10,
        batch_size=SIZE.batch_size, sizes=sizes(read(Gpt(SIZE))),
    )  # fmt: skip
    text = render(spec).files[CONFIG]
    child = subprocess.run(
        (sys.executable, __file__, "--parse", checkout, str(plan.ranks), *text.split()),
        capture_output=True, text=True, check=False, env={**os.environ, **ENGINE.env},
    )  # fmt: skip
    last = (child.stderr.strip().splitlines() or [""])[-1]
    said = json.loads(child.stdout.splitlines()[-1]) if child.returncode == 0 else {}
    refused = last if child.returncode else ""
    differs = [name for name, value in _wanted(plan).items() if said.get(name) != value]
    if said and differs:
        refused = f"not as planned: {', '.join(differs)}"
    return {"plan": plan.label, "arguments": text.splitlines(), "refused": refused, "said": said}


def _wanted(plan: Plan) -> dict[str, Any]:
    """What the parsed arguments must say."""
    place, zero, stages = layout(plan), plan.get("zero"), plan.get("pipeline")
    bf16 = bool(plan.get("bf16-parameters")) or (zero is not None and zero.settings["precision"] == "bf16")
    tensor, virtual = plan.get("tensor-parallel"), int(stages.settings["virtual"]) if stages else 1
    return {
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


def parse(checkout: str, ranks: str, given: list[str]) -> None:
    """In a process of its own: the checkout's parser, without what its package loads for training."""
    sys.path.insert(0, checkout)
    package = types.ModuleType("megatron.training")
    package.__path__ = [f"{checkout}/megatron/training"]
    sys.modules["megatron.training"] = package
    from megatron.training import global_vars

    vars(package).update({k: v for k, v in vars(global_vars).items() if k.startswith("get_")})
    from megatron.core.package_info import __version__
    from megatron.training import arguments

    sys.argv = ["pretrain_gpt.py", *given]
    arguments.get_device_arch_version = lambda: 9  # it looks at the GPU that it will run on
    with contextlib.redirect_stdout(io.StringIO()):
        found = arguments.parse_args()
        found.world_size = int(ranks)
        arguments.validate_args(found)
    told = {name: getattr(found, name) for name in DEGREES}
    told |= {
        "virtual": found.virtual_pipeline_model_parallel_size,
        "sequence_parallel": found.sequence_parallel,
        "distributed_optimizer": found.use_distributed_optimizer,
        "recompute": found.recompute_granularity,
        "dtype": str(found.params_dtype),
        "micro_batch_size": found.micro_batch_size,
        "layers": found.num_layers,
        "core": __version__,
    }
    print(json.dumps(told))


if __name__ == "__main__":
    if sys.argv[1] == "--parse":
        parse(sys.argv[2], sys.argv[3], sys.argv[4:])
    else:
        main(str(Path(sys.argv[1]).resolve()))
