"""Valid configurations that resemble a known misconfiguration; each once caused a false alarm."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from test_lint_rules import CPU, DECAY, FILE, File, acc, ds, fsdp, mesh, mg, tr, tt, zero

from memfit.lint.check import check
from memfit.lint.parse import read

SWIFT = (
    "megatron sft --num_layers 8 --micro_batch_size 1 --overlap_param_gather true --overlap_grad_reduce true"
)
PART = ("part.sh", "python train.py --micro-batch-size 1 --expert-model-parallel-size 2 --moe-grouped-gemm")
UNEVEN = "--pipeline-model-parallel-size 16 --deepspeed"
NAMED = {"gather_16bit_weights_on_model_save": True}
STEPS = {"scheduler": DECAY | {"params": {"total_num_steps": "auto"}}}


@pytest.mark.parametrize(
    ("files", "ranks"),
    [
        ((ds(**zero(3, **NAMED)), tr()), None),  # DeepSpeed takes fields by their own names too
        ((ds(), tr(fsdp="${FSDP}")), None),  # a template
        ((ds(train_batch_size="auto", gradient_accumulation_steps="auto"), tr()), None),
        ((ds(**STEPS), tr()), None),
        ((ds(train_batch_size=8, tensor_parallel={"autotp_size": 4}),), 8),  # some ranks share their samples
        ((ds(**zero(2, offload_param={"device": "none"}, offload_optimizer=CPU)),), None),
        ((ds(my_trainer_reads_this=1, **zero(2)),), None),
        ((("swift.sh", SWIFT),), None),  # its defaults are not Megatron-LM's
        ((mg(UNEVEN),), None),  # DeepSpeed cuts pipelines as it likes
        ((mg("--use-distributed-optimizer --overlap-grad-reduce"),), 1),  # for debugging
        ((mg("--global-batch-size 12 --tensor-model-parallel-size $TP"),), 8),  # known only at run time
        ((mg("--global-batch-size 12 --rampup-batch-size 4 4 100"),), 8),
        ((mg("--tensor-model-parallel-size 2", "export CUDA_DEVICE_MAX_CONNECTIONS=32"),), None),
        ((acc("DEEPSPEED", deepspeed_config=FILE | {"zero3_init_flag": True}), ds(**zero(3))), None),
        ((fsdp(2, backward_prefetch="NO_PREFETCH", sync_module_states=False),), None),  # requests nothing
        ((tt(parallelism=mesh(tensor=4)),), 8),  # the remaining ranks shard
        ((tt(training={"local_batch_size": 1}, parallelism={}),), None),
        ((acc(num_machines=2, num_processes=16, machine_rank=3),), None),  # pdsh reads a hostfile
        ((acc("MULTI_GPU", compute_environment="AMAZON_SAGEMAKER", num_machines=2, num_processes=16),), None),
        ((acc("MULTI_GPU", gpu_ids="all", num_processes=4),), None),
        ((acc("NO", use_cpu=True, gpu_ids="0", num_processes=4),), None),
        ((fsdp(backward_prefetch=None, transformer_layer_cls_to_wrap="Block"),), None),  # no policy is given
        ((ds(**zero(3, offload_param=CPU)),), None),  # alone: the state stays on the device, which works
        ((ds(fp16={"enabled": True, "loss_scale": 128, "min_loss_scale": 1e6}),), None),  # a static scale
        ((ds(fp16={"enabled": False, "min_loss_scale": 1e6}),), None),
        ((ds(**zero(3, zero_hpz_partition_size=16)),), 6),  # one group of all ranks
        ((mg("--num-attention-heads 8 --num-query-groups 8"),), None),  # the same as without the switch
        ((mg("--num-attention-heads 8 --num-query-groups 1 --multi-latent-attention"),), None),
        ((mg("--train-samples 8 --train-iters 8 --skip-train"),), None),
        ((mg("--expert-model-parallel-size 2 --moe-grouped-gemm --num-experts $EXPERTS"),), None),
        ((PART,), None),  # the network is described elsewhere
        ((tt(training={"seq_len": 4099}, parallelism={}),), None),
        ((tt(model={"name": "flux"}, training={"seq_len": 9}, parallelism=mesh(context=2)),), None),
        ((tt(activation_checkpoint={"mode": "full", "selective_ac_option": "layer"}),), None),
        ((ds(**zero(2, reduce_bucket_size="500000000", overlap_comm="true")),), None),  # pydantic parses them
        ((ds(**zero(2, reduce_bucket_size=5e8), gradient_clipping=1),), None),
        ((ds(**zero([1, 2])),), None),  # stages that the autotuner tries
        ((acc(False, mixed_precision=False, num_processes=1),), None),  # as YAML reads "no"
        ((acc("MULTI_GPU", mixed_precision="BF16"),), None),
        (
            (
                (
                    "flow.yaml",
                    "fp16: {fp16: true}\ntrain_batch_size: [4]\nmy_layers: 2\nmy_heads: 4\nmy_rate: 1\n",
                ),
            ),
            None,
        ),
        ((tr(load_best_model_at_end=True, save_strategy="best"),), None),
        ((tr(load_best_model_at_end=True, eval_strategy="steps", eval_steps=0.1, save_steps=0.2),), None),
        ((tr(load_best_model_at_end=True, eval_strategy="$WHEN"),), None),
        ((("vocab.json", json.dumps({"optim": 8311, "fp16": 5} | dict.fromkeys("abcdefgh", 1))),), None),
        ((mg("--attention-backend flash --tensor-model-parallel-size $TP"),), None),
        ((tt(parallelism={"pipeline_parallel_schedule": "interleaved1f1b"}),), None),
        ((tt(encoder={"my_own": 1}, training={"batch_size": 8, "tensor_parallel_degree": 2}),), None),
        ((acc("NO", num_processes=16, num_machines="${NODES}"),), None),  # known only at run time
        ((acc("MULTI_GPU", gpu_ids="0,1", num_processes=4, num_machines="${NODES}"),), None),
        ((ds(**zero(2), pipeline={"stages": 2}), mg("--pipeline-model-parallel-size $PP")), None),
        ((tt(parallelism={"pipeline_parallel_degree": "${PP}", "data_parallel_shard_degree": 1}),), 8),
        (
            (
                tt(
                    training={"local_batch_size": 4, "global_batch_size": 8},
                    parallelism={"pipeline_parallel_degree": "${PP}"},
                ),
            ),
            8,
        ),
    ],
)
def test_valid_configurations_have_no_findings(
    files: tuple[File, ...], ranks: int | None, tmp_path: Path
) -> None:
    for name, text in files:
        (tmp_path / name).write_text(text)
    assert check(read([tmp_path / name for name, _ in files], ranks=ranks)) == ()


def test_a_bucket_whose_size_is_known_only_at_run_time_is_no_finding(tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    path.write_text(ds(**zero(2, reduce_bucket_size="${BUCKET}"))[1])
    assert check(read([path], parameters=1_000_000)) == ()
