"""Every rule of `memfit lint`: a configuration that triggers only that rule, and one that triggers none."""

from __future__ import annotations

import ast
import dataclasses
import json
import re
import string
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from memfit.lint import phrases
from memfit.lint.check import CHECKS, Finding, Severity, check, texts
from memfit.lint.openfold import PRESETS, TUNED
from memfit.lint.option_reasons import option_reasons
from memfit.lint.option_schema import library_settings
from memfit.lint.parse import read

File = tuple[str, str]  # name and content


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    bad: tuple[File, ...]
    good: tuple[File, ...]
    ranks: int | None = None
    parameters: int | None = None


def case(bad: Any, good: Any, **known: int) -> Case:
    """A case of one file each, or of several files that form one configuration."""
    several = [f if isinstance(f[0], tuple) else (f,) for f in (bad, good)]
    return Case(bad=several[0], good=several[1], **known)


def ds(**keys: Any) -> File:
    return "ds.json", json.dumps({"train_micro_batch_size_per_gpu": 4, **zero(0)} | keys)


def zero(stage: int, **keys: Any) -> dict[str, Any]:
    return {"zero_optimization": {"stage": stage, **keys}}


def acc(kind: str = "DEEPSPEED", **keys: Any) -> File:
    return "accelerate.yaml", yaml.safe_dump({"distributed_type": kind, **keys})


def fsdp(version: int = 1, **keys: Any) -> File:
    section = {"fsdp_version": version} | {f"fsdp_{k}": v for k, v in keys.items()}
    return acc("FSDP", num_processes=8, fsdp_config=section)


def tr(**keys: Any) -> File:
    return "trainer.json", json.dumps({"output_dir": "out", "per_device_train_batch_size": 4} | keys)


def mg(flags: str, before: str = "") -> File:
    return "train.sh", f"{before}\ntorchrun pretrain_gpt.py --num-layers 24 --micro-batch-size 1 {flags}\n"


def tt(**tables: Mapping[str, Any]) -> File:
    """JSON's numbers, strings and lists are valid TOML too."""
    lines = []
    for name, keys in ({"job": {}, "model": {}} | tables).items():
        lines += [f"[{name}]", *(f"{k} = {json.dumps(v)}" for k, v in keys.items())]
    return "job.toml", "\n".join(lines)


def of(flags: str, preset: str = "initial_training") -> File:
    return "fold.sh", f"python3 train_openfold.py a b c d 2021-10-10 --config_preset {preset} {flags}\n"


def changed(more: Mapping[str, Any] | None = None, **settings: Any) -> File:
    """Changes of OpenFold's settings as flat JSON."""
    return "changes.json", json.dumps({f"globals.{k}": v for k, v in settings.items()} | dict(more or {}))


def ax(**options: Any) -> File:
    base = {"base_model": "m", "datasets": [], "micro_batch_size": 1}
    return "axolotl.yml", yaml.safe_dump(base | options)


def lf(**options: Any) -> File:
    base = {"stage": "sft", "model_name_or_path": "m", "finetuning_type": "full", "template": "t"}
    return "factory.yaml", yaml.safe_dump(base | options)


def li(**trainer: Any) -> File:
    return "lightning.yaml", yaml.safe_dump({"trainer": {"devices": 2, **trainer}, "model": {}})


def mesh(**degrees: int) -> dict[str, int]:
    return {f"{name}_parallel_degree": degree for name, degree in degrees.items()}


def replicas(shard: int) -> dict[str, int]:
    degrees = {"data_parallel_replicate_degree": 2, "data_parallel_shard_degree": shard}
    return degrees | mesh(tensor=2)


DS = "--deepspeed_config_path ds.json"
SHARDED = ds(**zero(2))
UNTUNED = dict.fromkeys(TUNED, False)
HIDDEN = {"fp16": {"initial_scale_power": 16}}
ONE_BIT = {"optimizer": {"type": "OneBitAdam", "params": {"lr": 1e-4}}}
BARE = ("ds.json", '{"train_micro_batch_size_per_gpu": 4}')
RATE = {"learning_rate": 1e-4}
LAMB = {"optimizer": {"type": "Lamb"}, "zero_allow_untested_optimizer": True}
DECAY = {"type": "WarmupDecayLR", "params": {"warmup_num_steps": 10}}
FILE = {"deepspeed_config_file": "ds.json"}
CPU, NVME = {"device": "cpu"}, {"device": "nvme"}
WHEN = {"save_strategy": "steps", "eval_strategy": "steps"}
BEST = WHEN | {"save_only_model": True, "load_best_model_at_end": True}
REENTRANT = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}
EARLY, COMPILED = {"early_step_in_backward": True}, {"enable": True}
ASYNC = {"enable_async_tensor_parallel": True} | mesh(tensor=2)
ADAM = {"optimizer": {"type": "AdamW", "params": {"lr": 1e-4}}}
TORCH_ADAM = {"optimizer": {"type": "AdamW", "params": {"lr": 1e-4, "torch_adam": True}}}
DISK = NVME | {"nvme_path": "/disk"}
TWO = {"num_machines": 2, "num_processes": 16}
DENSE = "--hidden-size 1024"
EVERY_LOG = "--eval_strategy steps --eval_steps 0"
GROUPED = f"{DENSE} --num-attention-heads 24 --group-query-attention"
RECOMPUTED = "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"
MOE = "--num-experts 8 --expert-model-parallel-size 2 --train-iters 5"
ZERO_BY_ANOTHER_NAME = '{"train_micro_batch_size_per_gpu": 4, "zero_optimisation": {"stage": 2}}'
DEEPSPEED = {
    "deepspeed-batch-product": case(
        ds(train_batch_size=100, gradient_accumulation_steps=2),
        ds(train_batch_size=64, gradient_accumulation_steps=2),
        ranks=8,
    ),
    "deepspeed-two-precisions": case(
        ds(fp16={"enabled": True}, bf16={"enabled": True}),
        ds(fp16={"enabled": False}, bf16={"enabled": True}),
    ),
    "deepspeed-fp16-off": case(ds(**HIDDEN), ds(fp16={"enabled": True, "initial_scale_power": 16})),
    "deepspeed-bf16-loss-scale": case(
        ds(bf16={"enabled": True, "loss_scale": 0}), ds(bf16={"enabled": True})
    ),
    "deepspeed-offload-parameters": case(ds(**zero(2, offload_param=CPU)), ds(**zero(3, offload_param=CPU))),
    "deepspeed-offload-optimizer": case(
        ds(**zero(0, offload_optimizer=CPU)), ds(**zero(1, offload_optimizer=CPU))
    ),
    "deepspeed-stage3-keys": case(
        ds(**zero(2, stage3_max_live_parameters=9)),
        ds(**zero(2, stage3_gather_16bit_weights_on_model_save=True)),
    ),
    "deepspeed-nvme-path": case(
        ds(**zero(3, offload_param=NVME)), ds(**zero(3, offload_param=NVME | {"nvme_path": "/disk"}))
    ),
    "deepspeed-contiguous-checkpoints": case(
        ds(activation_checkpointing={"contiguous_memory_optimization": True}),
        ds(activation_checkpointing={"contiguous_memory_optimization": True, "partition_activations": True}),
    ),
    "deepspeed-checkpointing-unused": case(
        (ds(activation_checkpointing={"cpu_checkpointing": True}), tr()),
        (ds(activation_checkpointing={"cpu_checkpointing": False}), tr()),
    ),
    "deepspeed-unknown-key": case(ds(gradient_clippping=1.0), ds(gradient_clipping=1.0, my_own_tag=1)),
    "deepspeed-section-key": case(ds(**zero(2, aio={})), ds(**zero(2, prefetch_bucket_size=1))),
    "deepspeed-newer-key": case(ds(**zero(2, of_another_release=1)), ds(my_own=1)),
    "deepspeed-text-for-number": case(ds(gradient_clipping="1.0"), ds(gradient_clipping="auto")),
    "deepspeed-value": case(ds(**zero(5)), ds(**zero(1))),
    "deepspeed-auto-unfilled": case(
        (ds(**zero(2, allgather_bucket_size="auto")), acc(deepspeed_config=FILE)),
        (ds(**zero(2, reduce_bucket_size="auto")), acc(deepspeed_config=FILE)),
    ),
    "deepspeed-untested-optimizer": case(
        ds(optimizer={"type": "Adafactor"}, **zero(2)),
        ds(optimizer={"type": "Adafactor"}, zero_allow_untested_optimizer=True, **zero(2)),
    ),
    "deepspeed-one-bit": case(ds(**ONE_BIT, **zero(1)), ds(**ADAM, **zero(1))),
    "deepspeed-offload-lamb": case(ds(**LAMB, **zero(2, offload_optimizer=CPU)), ds(**LAMB, **zero(2))),
    "deepspeed-scheduler-steps": case(
        ds(scheduler=DECAY), ds(scheduler={"type": "WarmupLR", "params": {"warmup_num_steps": 10}})
    ),
    "deepspeed-pipeline": case(
        (ds(**zero(2)), mg("--pipeline-model-parallel-size 2")),
        (ds(**zero(1)), mg("--pipeline-model-parallel-size 2")),
    ),
    "deepspeed-bucket": case(
        ds(**zero(2)), ds(**zero(2, reduce_bucket_size=1_000_000)), parameters=1_000_000
    ),
    "deepspeed-removed": case(ds(elasticity={"enabled": False}), ds(data_efficiency={"enabled": False})),
    "deepspeed-zeropp": case(
        ds(**zero(2, zero_quantized_gradients=True)), ds(**zero(3, zero_quantized_gradients=True))
    ),
    "deepspeed-no-zero": case((BARE, tr()), BARE),
    "deepspeed-gather-on-save": case((ds(**zero(3)), tr()), (ds(**zero(3)), tr(save_strategy="no"))),
    "deepspeed-nvme-stage": case(
        ds(**zero(2, offload_optimizer=DISK)), ds(**zero(3, offload_optimizer=DISK))
    ),
    "deepspeed-torch-adam": case(
        ds(**TORCH_ADAM, **zero(2, offload_optimizer=CPU)), ds(**TORCH_ADAM, **zero(2))
    ),
    "deepspeed-hpz-ranks": case(
        ds(**zero(3, zero_hpz_partition_size=6)), ds(**zero(3, zero_hpz_partition_size=8)), ranks=16
    ),
    "deepspeed-least-scale": case(
        ds(fp16={"enabled": True, "min_loss_scale": 1024, "initial_scale_power": 8}),
        ds(fp16={"enabled": True, "min_loss_scale": 256, "initial_scale_power": 8}),
    ),
}
ACCELERATE = {
    "accelerate-deepspeed-twice": case(
        (ds(), acc(mixed_precision="bf16", deepspeed_config=FILE)), (ds(), acc(deepspeed_config=FILE))
    ),
    "accelerate-other-launcher": case((ds(), acc("FSDP")), (ds(), acc(deepspeed_config=FILE))),
    "accelerate-zero3-init": case(
        acc(deepspeed_config={"zero_stage": 2, "zero3_init_flag": True}),
        acc(deepspeed_config={"zero_stage": 3, "zero3_init_flag": True}),
    ),
    "accelerate-deepspeed-precision": case(
        (ds(fp16={"enabled": True}), acc(mixed_precision="bf16", deepspeed_config=FILE)),
        (ds(fp16={"enabled": True}), acc(deepspeed_config=FILE)),
    ),
    "accelerate-section-ignored": case(
        acc("MULTI_GPU", fsdp_config={"fsdp_version": 2}), acc("FSDP", fsdp_config={"fsdp_version": 2})
    ),
    "accelerate-unknown-key": case(acc("FSDP", mixed_precison="bf16"), acc("FSDP", mixed_precision="bf16")),
    "accelerate-newer-key": case(acc("FSDP", of_another_release=1), acc("FSDP", fp16=False)),
    "accelerate-section-key": case(
        fsdp(sharding_stratgey="FULL_SHARD"), fsdp(sharding_strategy="FULL_SHARD", my_own=1)
    ),
    "accelerate-value": case(fsdp(version=3), fsdp(version=2)),
    "fsdp2-old-options": case(fsdp(2, use_orig_params=True), fsdp(1, use_orig_params=True)),
    "fsdp2-reshard": case(fsdp(2, reshard_after_forward="FULL_SHARD"), fsdp(2, reshard_after_forward=True)),
    "fsdp-efficient-loading": case(
        fsdp(cpu_ram_efficient_loading=True, sync_module_states=False),
        fsdp(cpu_ram_efficient_loading=True, sync_module_states=True),
    ),
    "fsdp-wrapping": case(
        fsdp(auto_wrap_policy="TRANSFORMER_BASED_WRAP", min_num_params=1000),
        fsdp(auto_wrap_policy="SIZE_BASED_WRAP", min_num_params=1000),
    ),
    "accelerate-processes": case(
        acc("MULTI_GPU", num_machines=2, num_processes=3, main_process_ip="node0"),
        acc("MULTI_GPU", main_process_ip="node0", **TWO),
    ),
    "accelerate-rendezvous": case(
        acc("FSDP", main_process_port=29500, **TWO), acc("FSDP", main_process_ip="node0", **TWO)
    ),
    "accelerate-local-address": case(
        acc("MULTI_GPU", main_process_ip="127.0.0.1", **TWO),
        acc("MULTI_CPU", main_process_ip="127.0.0.1", main_process_port=1, mpirun_config={"a": 1}, **TWO),
    ),
    "accelerate-one-process": case(acc("NO", num_processes=8), acc("NO", num_processes=1)),
    "accelerate-machine-rank": case(
        acc("MULTI_GPU", machine_rank=2, main_process_ip="node0", **TWO),
        acc("MULTI_GPU", machine_rank=1, main_process_ip="node0", **TWO),
    ),
    "accelerate-few-devices": case(
        acc("MULTI_GPU", gpu_ids="0,1", num_processes=4), acc("MULTI_GPU", gpu_ids="0,1", num_processes=2)
    ),
    "accelerate-idle-devices": case(
        acc("MULTI_GPU", gpu_ids="0,1,2,3", num_processes=2),
        acc("MULTI_GPU", gpu_ids="0,1,2,3,4,5,6,7", main_process_ip="node0", **TWO),
    ),
    "accelerate-cpu-fp16": case(
        acc("NO", use_cpu=True, mixed_precision="fp16"), acc("NO", use_cpu=True, mixed_precision="bf16")
    ),
    "fsdp-prefetch": case(fsdp(backward_prefetch="BACKWARD"), fsdp(backward_prefetch="backward_pre")),
}
TRAINER = {
    "trainer-deepspeed-batch": case(
        (ds(train_micro_batch_size_per_gpu=2), tr()), (ds(train_micro_batch_size_per_gpu="auto"), tr())
    ),
    "trainer-deepspeed-accumulation": case(
        (ds(gradient_accumulation_steps=2), tr(gradient_accumulation_steps=4)),
        (ds(gradient_accumulation_steps=4), tr(gradient_accumulation_steps=4)),
    ),
    "trainer-deepspeed-clipping": case(
        (ds(gradient_clipping=0.5), tr(max_grad_norm=1.0)), (ds(gradient_clipping=1), tr(max_grad_norm=1.0))
    ),
    "trainer-deepspeed-hyperparameters": case(
        (ds(**ADAM), tr(learning_rate=2e-5)), (ds(**ADAM), tr(learning_rate=1e-4))
    ),
    "trainer-deepspeed-precision": case(
        (ds(bf16={"enabled": True}), tr(bf16=False)), (ds(bf16={"enabled": "auto"}), tr(bf16=False))
    ),
    "trainer-optimizer-twice": case(
        (ds(**ADAM), tr(optim="adafactor", **RATE)), (ds(**ADAM), tr(optim="adamw_torch", **RATE))
    ),
    "trainer-fsdp-deepspeed": case((ds(), tr(fsdp="full_shard")), (ds(), tr(fsdp=""))),
    "trainer-unknown-key": case(tr(save_stratgy="no"), tr(save_strategy="no", model_name_or_path="x")),
    "trainer-section-key": case(
        tr(fsdp="full_shard", fsdp_config={"auto_wrap_polcy": "NO_WRAP"}),
        tr(fsdp="full_shard", fsdp_config={"fsdp_auto_wrap_policy": "NO_WRAP"}),
    ),
    "trainer-value": case(
        tr(lr_scheduler_type="cosin"), tr(lr_scheduler_type="cosine", learning_rate="2e-5")
    ),
    "trainer-gone": case(tr(evaluation_strategy="no"), tr(evaluation_strategy="no", adapter="lora")),
    "trainer-best-steps": case(
        tr(load_best_model_at_end=True, eval_strategy="steps", eval_steps=300, save_steps=500),
        tr(load_best_model_at_end=True, eval_strategy="steps", eval_steps=250, save_steps=500),
    ),
    "trainer-no-workers": case(
        tr(dataloader_prefetch_factor=2), tr(dataloader_prefetch_factor=2, dataloader_num_workers=1)
    ),
    "trainer-constant-warmup": case(
        tr(lr_scheduler_type="constant", warmup_steps=10),
        tr(lr_scheduler_type="constant_with_warmup", warmup_steps=10),
    ),
    "trainer-two-warmups": case(
        tr(warmup_ratio=0.1, warmup_steps=10, model_name_or_path="x"),
        tr(warmup_ratio=0.1, warmup_steps=0, model_name_or_path="x"),
    ),
    "trainer-two-precisions": case(tr(fp16=True, bf16=True), tr(fp16=False, bf16=True)),
    "trainer-accelerate-precision": case(
        (acc("MULTI_GPU", mixed_precision="fp16"), tr(bf16=True)),
        (acc("MULTI_GPU", mixed_precision="bf16"), tr(bf16=True)),
    ),
    "trainer-fsdp-checkpointing": case(
        (fsdp(activation_checkpointing=True), tr(gradient_checkpointing=True)),
        (fsdp(activation_checkpointing=True), tr(gradient_checkpointing=False)),
    ),
    "trainer-fsdp-save-only-model": case(
        (fsdp(state_dict_type="SHARDED_STATE_DICT"), tr(save_only_model=True)),
        (fsdp(state_dict_type="FULL_STATE_DICT"), tr(save_only_model=True)),
    ),
    "trainer-best-model": case((ds(), tr(**BEST)), tr(**BEST)),
    "trainer-unused-parameters": case(
        tr(ddp_find_unused_parameters=True, **REENTRANT), tr(ddp_find_unused_parameters=False, **REENTRANT)
    ),
    "trainer-cache": case(tr(gradient_checkpointing=True, use_cache=True), tr(use_cache=True)),
    "trainer-find-batch": case(
        (ds(**zero(3)), tr(auto_find_batch_size=True, save_strategy="no")),
        (ds(**zero(2)), tr(auto_find_batch_size=True)),
    ),
    "fsdp2-offload-clipping": case(
        (fsdp(2, offload_params=True), tr()), (fsdp(2, offload_params=True), tr(max_grad_norm=0))
    ),
}
MEGATRON = {
    "megatron-sequence-parallel": case(
        mg("--sequence-parallel"), mg("--sequence-parallel --tensor-model-parallel-size 2")
    ),
    "megatron-optimizer-alone": case(
        mg("--use-distributed-optimizer --overlap-grad-reduce --tensor-model-parallel-size 8"),
        mg("--use-distributed-optimizer --overlap-grad-reduce --tensor-model-parallel-size 4"),
        ranks=8,
    ),
    "megatron-layers": case(
        mg("--pipeline-model-parallel-size 5"),
        mg("--pipeline-model-parallel-size 5 --decoder-first-pipeline-num-layers 4"),
    ),
    "megatron-virtual-layers": case(
        mg("--pipeline-model-parallel-size 4 --num-layers-per-virtual-pipeline-stage 4"),
        mg("--pipeline-model-parallel-size 4 --num-layers-per-virtual-pipeline-stage 3"),
    ),
    "megatron-virtual-pipeline": case(
        mg("--num-layers-per-virtual-pipeline-stage 2"), mg("--num-virtual-stages-per-pipeline-rank 1")
    ),
    "megatron-batch": case(
        mg("--global-batch-size 12"), mg("--global-batch-size 12 --tensor-model-parallel-size 2"), ranks=8
    ),
    "megatron-ranks": case(
        mg("--tensor-model-parallel-size 3"), mg("--tensor-model-parallel-size 4"), ranks=8
    ),
    "megatron-interleaved-batch": case(
        mg("--pipeline-model-parallel-size 4 --num-virtual-stages-per-pipeline-rank 2 --global-batch-size 6"),
        mg("--pipeline-model-parallel-size 4 --num-virtual-stages-per-pipeline-rank 2 --global-batch-size 8"),
        ranks=4,
    ),
    "megatron-recompute": case(
        mg("--recompute-granularity selective --recompute-num-layers 1"),
        mg("--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"),
    ),
    "megatron-recompute-off": case(mg("--recompute-method uniform"), mg("--recompute-activations")),
    "megatron-overlap-gather": case(
        mg("--overlap-param-gather --use-distributed-optimizer"),
        mg("--overlap-param-gather --use-distributed-optimizer --overlap-grad-reduce"),
    ),
    "megatron-connections": case(
        mg("--tensor-model-parallel-size 2", "export CUDA_DEVICE_MAX_CONNECTIONS=8"),
        mg("--tensor-model-parallel-size 2", "export CUDA_DEVICE_MAX_CONNECTIONS=1"),
    ),
    "megatron-two-precisions": case(mg("--fp16 --bf16"), mg("--bf16")),
    "megatron-heads": case(
        mg("--num-attention-heads 12 --tensor-model-parallel-size 8"),
        mg("--num-attention-heads 16 --tensor-model-parallel-size 8"),
    ),
    "megatron-experts": case(
        mg("--num-experts 9 --expert-model-parallel-size 2"),
        mg("--num-experts 8 --expert-model-parallel-size 2"),
    ),
    "megatron-moe-sequence": case(
        mg(f"{MOE} --tensor-model-parallel-size 2"),
        mg(f"{MOE} --tensor-model-parallel-size 2 --sequence-parallel"),
    ),
    "megatron-context-length": case(
        mg("--seq-length 4100 --context-parallel-size 4"), mg("--seq-length 4096 --context-parallel-size 4")
    ),
    "megatron-torch-fsdp2": case(
        mg("--use-torch-fsdp2 --untie-embeddings-and-output-weights"),
        mg("--use-torch-fsdp2 --untie-embeddings-and-output-weights --no-gradient-accumulation-fusion"),
    ),
    "megatron-positions": case(
        mg("--seq-length 4096 --max-position-embeddings 2048"),
        mg("--seq-length 4096 --max-position-embeddings 4096"),
    ),
    "megatron-batch-schedule": case(
        mg("--step-batch-size-schedule 0:8 --global-batch-size 8"), mg("--step-batch-size-schedule 0:8")
    ),
    "megatron-tensor-overlap": case(
        mg("--tp-comm-overlap --tensor-model-parallel-size 2"),
        mg("--tp-comm-overlap --tensor-model-parallel-size 2 --sequence-parallel"),
    ),
    "megatron-query-groups": case(
        mg(f"{GROUPED} --num-query-groups 6 --tensor-model-parallel-size 4"),
        mg(f"{GROUPED} --num-query-groups 8 --tensor-model-parallel-size 4"),
    ),
    "megatron-few-query-groups": case(
        mg(f"{GROUPED} --num-query-groups 2 --tensor-model-parallel-size 4"),
        mg(f"{GROUPED} --num-query-groups 4 --tensor-model-parallel-size 4"),
    ),
    "megatron-query-groups-off": case(
        mg("--num-attention-heads 16 --num-query-groups 4"),
        mg("--num-attention-heads 16 --num-query-groups 4 --group-query-attention"),
    ),
    "megatron-unknown-option": case(
        mg("--tensor-model-parallel-size 2 --sequence-paralel"),
        mg("--tensor-model-parallel-size 2 --sequence-paral --my-own 1"),  # abbreviated; another program's
    ),
    "megatron-value": case(mg("--lr-decay-style cosin"), mg("--lr-decay-style cosine --lr 1e-4")),
    "megatron-two-lengths": case(
        mg("--train-samples 800 --train-iters 100"), mg("--train-iters 100 --lr-decay-iters 100")
    ),
    "megatron-distributed-activations": case(
        mg(f"--distribute-saved-activations {RECOMPUTED} --tensor-model-parallel-size 2 --sequence-parallel"),
        mg(f"--distribute-saved-activations {RECOMPUTED} --tensor-model-parallel-size 2"),
    ),
    "megatron-grouped-gemm": case(
        mg(f"{DENSE} --moe-grouped-gemm"), mg(f"{DENSE} --moe-grouped-gemm --num-experts 8")
    ),
}
TORCHTITAN = {
    "torchtitan-degrees": case(
        tt(parallelism={"data_parallel_shard_degree": 2} | mesh(tensor=3)),
        tt(parallelism={"data_parallel_shard_degree": 2} | mesh(tensor=4)),
        ranks=8,
    ),
    "torchtitan-async-tensor": case(tt(parallelism=ASYNC), tt(parallelism=ASYNC, compile=COMPILED)),
    "torchtitan-float8-eager": case(
        tt(model={"converters": ["float8"]}), tt(model={"converters": ["float8"]}, compile=COMPILED)
    ),
    "torchtitan-replicate": case(tt(parallelism=replicas(1)), tt(parallelism=replicas(2))),
    "torchtitan-step-in-backward": case(
        tt(optimizer=EARLY, parallelism=mesh(expert=2)), tt(optimizer=EARLY, parallelism=mesh(tensor=2))
    ),
    "torchtitan-unclipped": case(
        tt(optimizer=EARLY, training={"max_norm": 1.0}), tt(optimizer=EARLY, training={"max_norm": 0})
    ),
    "torchtitan-microbatches": case(
        tt(training={"local_batch_size": 2}, parallelism=mesh(pipeline=4)),
        tt(training={"local_batch_size": 8}, parallelism=mesh(pipeline=4)),
    ),
    "torchtitan-batch": case(
        tt(training={"local_batch_size": 8, "global_batch_size": 12}),
        tt(training={"local_batch_size": 8, "global_batch_size": 16}),
        ranks=2,
    ),
    "torchtitan-budget-eager": case(
        tt(activation_checkpoint={"mode": "memory_budget"}),
        tt(activation_checkpoint={"mode": "memory_budget"}, compile=COMPILED),
    ),
    "torchtitan-sequence": case(
        tt(training={"seq_len": 8200}, parallelism=mesh(context=4, tensor=2)),
        tt(training={"seq_len": 8192}, parallelism=mesh(context=4, tensor=2)),
    ),
    "torchtitan-selective-option": case(
        tt(activation_checkpoint={"mode": "selective", "selective_ac_option": "layer"}),
        tt(activation_checkpoint={"mode": "selective", "selective_ac_option": "2"}),
    ),
    "torchtitan-value": case(
        tt(activation_checkpoint={"mode": "always"}), tt(activation_checkpoint={"mode": "full"})
    ),
    "torchtitan-no-workers": case(
        tt(**{"training.dataloader": {"prefetch_factor": 2}}),
        tt(**{"training.dataloader": {"prefetch_factor": 2, "num_workers": 1}}),
    ),
    "torchtitan-unknown-key": case(
        tt(training={"local_batch_sizes": 8}), tt(training={"local_batch_size": 8, "my_own": 1})
    ),
}
OPENFOLD = {
    "openfold-seed": case(of("--gpus 4"), of("--gpus 4 --seed 1")),
    "openfold-fp16-deepspeed": case(
        (of(f"{DS} --precision 16"), SHARDED), (of(f"{DS} --precision bf16"), SHARDED)
    ),
    "openfold-accumulation": case(of("--accumulate_grad_batches 4"), of("--accumulate_grad_batches 1")),
    "openfold-preset": case(of("", "finetune"), of("", "finetuning")),
    "openfold-unknown-key": case(changed(use_flash_attention=True), changed(use_flash=True)),
    "openfold-two-kernels": case(
        changed(use_flash=True, use_lma=True), changed(use_flash=True, use_lma=False)
    ),
    "openfold-chunk-training": case(
        changed(chunk_size=4), changed(dict.fromkeys(TUNED, False), chunk_size=4)
    ),
    "openfold-blocks-per-ckpt": case(changed(blocks_per_ckpt=4), changed(blocks_per_ckpt=2)),
    "openfold-extra-ckpt": case(
        changed(blocks_per_ckpt=None),
        changed({"model.extra_msa.extra_msa_stack.ckpt": False}, blocks_per_ckpt=None),
    ),
    "openfold-deepspeed-accumulation": case((of(DS), ds(gradient_accumulation_steps=1)), (of(DS), SHARDED)),
    "openfold-deepspeed-stage3": case((of(DS), ds(**zero(3))), (of(DS), ds(**zero(2)))),
}
GATHERED = {"stage3_gather_16bit_weights_on_model_save": True}
FRONT_ENDS = {
    "axolotl-bits-without-adapter": case(ax(load_in_8bit=True), ax(load_in_8bit=True, adapter="lora")),
    "axolotl-qlora-bits": case(ax(adapter="qlora"), ax(adapter="qlora", load_in_4bit=True)),
    "axolotl-packing-attention": case(
        ax(sample_packing=True), ax(sample_packing=True, attn_implementation="flash_attention_2")
    ),
    "llamafactory-quantized-full": case(
        lf(quantization_bit=4, finetuning_type="full"), lf(quantization_bit=4, finetuning_type="lora")
    ),
    "llamafactory-pure-bf16-zero3": case(
        (lf(pure_bf16=True, deepspeed="ds.json"), ds(**zero(3, **GATHERED))),
        (lf(pure_bf16=True, deepspeed="ds.json"), ds(**zero(2))),
    ),
    "lightning-fsdp-norm": case(
        li(strategy="fsdp", gradient_clip_val=1.0),
        li(strategy="fsdp", gradient_clip_val=1.0, gradient_clip_algorithm="value"),
    ),
    "lightning-deepspeed-value": case(
        li(strategy="deepspeed_stage_2", gradient_clip_val=1.0, gradient_clip_algorithm="value"),
        li(strategy="deepspeed_stage_2", gradient_clip_val=1.0),
    ),
}
CASES: Mapping[str, Case] = DEEPSPEED | ACCELERATE | TRAINER | MEGATRON | TORCHTITAN | OPENFOLD | FRONT_ENDS


def findings(files: tuple[File, ...], c: Case, folder: Path, *, lang: str = "en") -> tuple[Finding, ...]:
    for name, content in files:
        (folder / name).write_text(content)
    paths = [folder / name for name, _ in files]
    return check(read(paths, ranks=c.ranks, parameters=c.parameters), lang=lang)


def test_every_rule_has_texts_and_a_case() -> None:
    assert set(CHECKS) == set(texts()) == set(CASES)
    assert len(CHECKS) >= 30


@pytest.mark.parametrize("rule", CASES)
def test_a_bad_configuration_triggers_its_rule_and_no_other(rule: str, tmp_path: Path) -> None:
    found = findings(CASES[rule].bad, CASES[rule], tmp_path)
    assert {f.rule for f in found} == {rule}
    assert "{" not in "".join(f.says + f.do for f in found)
    assert len(found) == 1


@pytest.mark.parametrize("rule", CASES)
def test_the_good_configuration_of_each_rule_triggers_nothing(rule: str, tmp_path: Path) -> None:
    assert findings(CASES[rule].good, CASES[rule], tmp_path) == ()


@pytest.mark.parametrize("rule", CASES)
def test_rule_texts_are_complete_in_both_languages_and_have_links(rule: str) -> None:
    text = texts()[rule]
    assert set(text) == {"severity", "links", "en", "ja"}
    Severity(text["severity"])
    names = [[n for _, n, _, _ in string.Formatter().parse(t) if n] for t in (*text["en"], *text["ja"])]
    assert len(names) == 4  # a finding and an advice in each language
    assert set(names[0]) == set(names[2])
    assert set(names[1]) == set(names[3])
    assert text["links"]
    assert all(link.startswith("https://") for link in text["links"])
    assert all(t == t.strip() and t[-1] in ".。?" for t in (*text["en"], *text["ja"]))


def test_findings_are_sorted_by_severity_and_in_the_requested_language(tmp_path: Path) -> None:
    bad = ds(fp16={"enabled": True}, bf16={"enabled": True}, **zero(2, offload_param=CPU))
    (tmp_path / "ds.json").write_text(bad[1])
    setup = read([tmp_path / "ds.json"], parameters=1000)
    found = check(setup, lang="ja")
    assert [f.severity for f in found] == [Severity.ERROR, Severity.WARNING, Severity.NOTE]
    assert "両方" in found[0].says


FSDP2 = "--use-torch-fsdp2 --untie-embeddings-and-output-weights --no-gradient-accumulation-fusion"
OTHERS: list[tuple[str, File, str]] = [
    ("accelerate-rendezvous", acc("MULTI_CPU", **TWO), "main_process_ip and main_process_port"),
    (
        "accelerate-rendezvous",
        acc("NO", main_process_ip="node0", num_machines=2, num_processes=2),
        "main_process_port",
    ),
    (
        "accelerate-rendezvous",
        acc(deepspeed_config={"deepspeed_multinode_launcher": "standard"}, **TWO),
        "main_process_ip",
    ),
    ("accelerate-machine-rank", acc("MULTI_GPU", machine_rank=1, num_machines=1), "machine_rank 1"),
    ("accelerate-few-devices", acc("MULTI_GPU", gpu_ids=0, num_processes=2), "gpu_ids 0"),
    (
        "fsdp-wrapping",
        fsdp(auto_wrap_policy="NO_WRAP", transformer_layer_cls_to_wrap="Block"),
        "fsdp_transformer_layer_cls_to_wrap",
    ),
    ("fsdp-wrapping", fsdp(auto_wrap_policy="NO_WRAP", min_num_params=100), "fsdp_min_num_params"),
    ("fsdp-prefetch", fsdp(backward_prefetch=True), "fsdp_backward_prefetch True"),
    ("deepspeed-nvme-stage", ds(**zero(1, offload_optimizer=DISK)), "the stage is 1"),
    ("deepspeed-least-scale", ds(fp16={"enabled": True, "min_loss_scale": 100000}), "65536"),
    ("megatron-experts", mg(f"{DENSE} --expert-model-parallel-size 2"), "no experts"),
    (
        "megatron-experts",
        mg(f"{DENSE} --num-experts 0 --expert-model-parallel-size 2"),
        "no experts",
    ),
    ("megatron-experts", mg("--num-experts 6 --expert-model-parallel-size 4"), "with 6 experts"),
    (
        "megatron-moe-sequence",
        mg("--num-experts 8 --tensor-model-parallel-size 2 --nproc_per_node 8 --global-batch-size 8"),
        "8 experts",
    ),
    (
        "megatron-query-groups-off",
        mg("--num-attention-heads 24 --num-query-groups 6 --tensor-model-parallel-size 4"),
        "all 24 heads",
    ),
    ("megatron-distributed-activations", mg(f"--distribute-saved-activations {RECOMPUTED}"), "-size 1"),
    (
        "megatron-distributed-activations",
        mg("--distribute-saved-activations --tensor-model-parallel-size 2"),
        "no --recompute-granularity full",
    ),
    (
        "deepspeed-bf16-loss-scale",
        ds(fp16={"enabled": False, "loss_scale": 0}, bf16={"enabled": True, "loss_scale": 0}),
        "loss_scale",
    ),
    ("deepspeed-unknown-key", ds(gradient_acumulation_steps=4), "gradient_acumulation_steps"),
    ("deepspeed-unknown-key", ("ds.json", ZERO_BY_ANOTHER_NAME), "zero_optimisation"),
    ("deepspeed-unknown-key", ds(optimizer={"type": "AdamW", "parms": {}}), "optimizer.parms"),
    (
        "deepspeed-section-key",
        ds(fp16={"enabled": True, "inital_scale_power": 8}),
        "fp16.inital_scale_power",
    ),
    ("deepspeed-section-key", ds(**zero(2, offload_optimizer=CPU | {"pin_memry": True})), "pin_memry"),
    ("deepspeed-text-for-number", ds(**zero(2, reduce_bucket_size="5e8")), "5e8"),
    ("deepspeed-text-for-number", ds(gradient_clipping="-1"), "-1"),
    ("deepspeed-value", ds(**zero(2, reduce_bucket_size="0")), "integer > 0"),
    ("deepspeed-value", ds(activation_checkpointing="1"), "table"),
    ("deepspeed-value", ds(**zero(3, offload_param={"device": "gpu"})), "none, cpu, nvme"),
    ("deepspeed-value", ds(**zero(2, reduce_bucket_size=0)), "integer > 0"),
    ("deepspeed-value", ds(**zero(2, overlap_comm="ture")), "true, false"),
    ("deepspeed-value", ds(fp16=True), "table"),
    ("deepspeed-value", ds(wall_clock_breakdown="false"), "wall_clock_breakdown is false"),
    ("deepspeed-value", ds(train_batch_size=2.5), "2.5"),
    ("accelerate-unknown-key", acc(zero_stag=2), "zero_stag"),
    ("accelerate-value", acc("MULTI_GPU", mixed_precision="fp32"), "no, fp16, bf16, fp8"),
    ("accelerate-value", acc("MULTIGPU"), "distributed_type is MULTIGPU"),
    ("accelerate-value", fsdp(auto_wrap_policy="LAYER_WRAP"), "LAYER_WRAP"),
    ("accelerate-value", fsdp(offload_params="cpu"), "true, false"),
    ("accelerate-value", acc(deepspeed_config={"zero_stage": 4}), "zero_stage is 4"),
    ("trainer-value", tr(max_steps="many"), "integer"),
    ("trainer-value", ("train.sh", "run.py --output_dir x --fp16 --save_strategy never"), "never"),
    ("trainer-best-steps", tr(load_best_model_at_end=True, save_strategy="epoch"), "evaluation is by no"),
    (
        "trainer-best-steps",
        tr(load_best_model_at_end=True, eval_strategy="steps", eval_steps=0.1),
        "every 500",
    ),
    (
        "trainer-best-steps",
        (
            "train.sh",
            f"run.py --output_dir x --load_best_model_at_end {EVERY_LOG} --logging_steps 300",
        ),
        "every 300",
    ),
    ("trainer-no-workers", tr(dataloader_persistent_workers=True), "dataloader_persistent_workers"),
    ("megatron-value", mg("--seq-length 4k"), "--seq-length is 4k"),
    ("torchtitan-value", tt(training={"dtype": "fp16"}), "bfloat16, float32, float16"),
    ("torchtitan-value", tt(parallelism={"pipeline_parallel_schedule": "1F2B"}), "Interleaved1F1B"),
    ("torchtitan-value", tt(training={"steps": "100"}), "integer"),
    ("torchtitan-sequence", tt(training={"seq_len": 4098}, parallelism=mesh(tensor=4)), "4098"),
    ("torchtitan-unknown-key", tt(traning={"seq_len": 8}), "traning"),
    ("torchtitan-unknown-key", tt(optimizer={"max_norm": 1.0}), "optimizer.max_norm"),
    (
        "torchtitan-unknown-key",
        ("job.toml", "max_norm = 1.0\n[job]\n[model]\n"),
        "max_norm is not a setting",
    ),
    ("torchtitan-unknown-key", tt(**{"quantize.linear.float8": {"filter_fqn": []}}), "filter_fqn"),
    ("trainer-value", tr(learning_rate="fast"), "accepts: number"),
    ("deepspeed-value", ds(**zero(3, offload_optimizer=CPU | {"ratio": 2})), "number >= 0 <= 1"),
    ("torchtitan-value", ("job.toml", "[job]\n[model.converters]\nfirst = 1\n"), "accepts: list"),
    ("torchtitan-degrees", tt(parallelism=mesh(tensor=0)), "split any number of processes"),
    ("torchtitan-step-in-backward", tt(optimizer=EARLY, parallelism=mesh(pipeline=2)), "with pipeline par"),
    (
        "megatron-batch",
        ("train.sh", "x --num-layers 8 --micro-batch-size 2 --global-batch-size 3\n"),
        "on any",
    ),
    ("megatron-connections", mg(FSDP2, "export CUDA_DEVICE_MAX_CONNECTIONS=1"), "FSDP's gathers wait"),
    ("megatron-recompute", mg("--recompute-granularity full"), "neither method nor number of layers"),
    ("megatron-overlap-gather", mg("--overlap-param-gather"), "-optimizer and --overlap-grad-reduce"),
    (
        "openfold-blocks-per-ckpt",
        changed({"model.template.enabled": False}, blocks_per_ckpt=49),
        "but the Evoformer stack",
    ),
]


@pytest.mark.parametrize(("rule", "file", "says"), OTHERS)
def test_other_configurations_trigger_the_same_rule(rule: str, file: File, says: str, tmp_path: Path) -> None:
    found = findings((file,), case(file, file), tmp_path)
    assert [f.rule for f in found] == [rule]
    assert says in found[0].says


def test_a_key_in_the_wrong_table_gets_a_suggestion_of_the_right_one(tmp_path: Path) -> None:
    file = tt(optimizer={"max_norm": 1.0})
    assert findings((file,), case(file, file), tmp_path)[0].do == "Did you mean training.max_norm?"


def test_different_precisions_in_trainer_and_deepspeed_files_are_an_error(tmp_path: Path) -> None:
    """transformers raises ValueError for such files."""
    for one, other in (("bf16", "fp16"), ("fp16", "bf16")):
        both = case((ds(**{one: {"enabled": True}}), tr(**{other: True})), ds())
        assert [f.rule for f in findings(both.bad, both, tmp_path)] == ["trainer-deepspeed-precision"]


def test_the_trainers_precision_replaces_that_of_accelerates_deepspeed_section(tmp_path: Path) -> None:
    """DeepSpeed then trains in the Trainer's precision, so its settings contradict neither file."""
    file = acc(mixed_precision="bf16", deepspeed_config={"zero_stage": 2})
    both = case((file, tr(fp16=True)), ds())
    assert [f.rule for f in findings(both.bad, both, tmp_path)] == ["trainer-accelerate-precision"]


# --- Japanese

PAIRS = (
    (ds(bf16={"enabled": True}), tr(fp16=True)),
    (fsdp(2, offload_params=True), tr(max_grad_norm=0.5)),
)
# Words in findings that are no names of settings: libraries, commands and values of JSON and YAML.
NAMES = {"accelerate", "launch", "memfit", "plan", "torch", "torchtitan", "transformers", *PRESETS}
NAMES |= {"null", "true", "false", "all", "lora", "qlora", "norm", "value"}


def setting_names() -> set[str]:
    """Names and enumerated values of the libraries' settings."""
    tables = [
        library_settings(library)
        for library in ("accelerate", "deepspeed", "megatron", "torchtitan", "trainer")
    ]
    specs = [(key, spec) for table in tables for keys in table.now.values() for key, spec in keys.items()]
    tables_of_reasons = [option_reasons(name) for name in ("axolotl", "lightning", "llamafactory")]
    names = {name for table in tables_of_reasons for name in {*table.carried, *table.reasons}}
    options = {part for name in names for part in name.split(".")}
    return {*options, *(key for key, _ in specs), *(str(value) for _, spec in specs for value in spec.values)}


def test_japanese_findings_contain_no_english_but_names_and_use_every_phrase(tmp_path: Path) -> None:
    cases = [*CASES.values(), *(case(file, file) for _, file, _ in OTHERS), *(case(p, p) for p in PAIRS)]
    names, rendered = setting_names() | NAMES, ""
    for index, c in enumerate(cases):
        (tmp_path / str(index)).mkdir()
        found = findings(c.bad, c, tmp_path / str(index), lang="ja")
        text = " ".join(f"{f.says} {f.do}" for f in found)
        unquoted = re.sub(r"「[^」]*」|\"[^\"]*\"", " ", text)
        # A word with any of these signs or a digit is an option, a path, a number or code.
        words = re.findall(r"(?<![\w./*=-])[a-z]{2,}(?![\w./*=-])", unquoted, re.ASCII)
        in_files = set(re.findall("[a-z]+", " ".join(content for _, content in c.bad)))
        assert set(words) <= names | in_files, text
        rendered += text
    for name, languages in phrases.texts().items():
        pattern = ".+".join(map(re.escape, re.split(r"\{\w+\}", languages["ja"])))
        assert re.search(pattern, rendered), f"no configuration here has the phrase {name}"
        assert re.findall(r"\{\w+\}", languages["ja"]) == re.findall(r"\{\w+\}", languages["en"])


def test_rules_contain_no_english_phrases() -> None:
    """They would appear in findings of all languages; phrases.toml is the place for them."""
    for path in sorted(Path(phrases.__file__).parent.glob("rules_*.py")):
        nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
        docstrings = {id(node.value) for node in nodes if isinstance(node, ast.Expr)}
        for node in nodes:
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
                without_names = re.sub(r"--[\w-]+ \w+|[\w.-]*[._-][\w.-]*", "", node.value)
                assert " " not in node.value or not re.search("[a-z]{2}", without_names), (path, node.value)
