"""What looks like a known misconfiguration and is none: each was a false alarm once."""

from __future__ import annotations

from pathlib import Path

import pytest
from test_configs_rules import CPU, DECAY, FILE, File, acc, ds, fsdp, mesh, mg, tr, tt, zero

from memfit.configs.lint import check
from memfit.configs.read import read

SWIFT = (
    "megatron sft --num_layers 8 --micro_batch_size 1 --overlap_param_gather true --overlap_grad_reduce true"
)
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
        ((ds(train_batch_size=8, tensor_parallel={"autotp_size": 4}),), 8),  # not all ranks see other samples
        ((ds(**zero(2, offload_param={"device": "none"}, offload_optimizer=CPU)),), None),
        ((ds(my_trainer_reads_this=1, **zero(2, of_a_newer_version=1)),), None),
        ((("swift.sh", SWIFT),), None),  # whose defaults are not Megatron-LM's
        ((mg(UNEVEN),), None),  # DeepSpeed cuts pipelines as it likes
        ((mg("--use-distributed-optimizer --overlap-grad-reduce"),), 1),  # for debugging
        ((mg("--global-batch-size 12 --tensor-model-parallel-size $TP"),), 8),  # known when it runs
        ((mg("--global-batch-size 12 --rampup-batch-size 4 4 100"),), 8),
        ((mg("--tensor-model-parallel-size 2", "export CUDA_DEVICE_MAX_CONNECTIONS=32"),), None),
        ((acc("DEEPSPEED", deepspeed_config=FILE | {"zero3_init_flag": True}), ds(**zero(3))), None),
        ((fsdp(2, backward_prefetch="NO_PREFETCH", sync_module_states=False),), None),  # asks for nothing
        ((tt(parallelism=mesh(tensor=4)),), 8),  # what is left is sharded
        ((tt(training={"local_batch_size": 1}, parallelism={}),), None),
    ],
)
def test_nothing_is_said(files: tuple[File, ...], ranks: int | None, tmp_path: Path) -> None:
    for name, text in files:
        (tmp_path / name).write_text(text)
    assert check(read([tmp_path / name for name, _ in files], ranks=ranks)) == ()
