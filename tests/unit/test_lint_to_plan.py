"""Configurations of other libraries as memfit plans, and options that no memfit plan can express."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from test_lint_rules import CASES, FILE, File, acc, ds, fsdp, mesh, mg, tr, tt, zero

from memfit.engines import accelerate, deepspeed, megatron
from memfit.engines.base import Engine
from memfit.lint.check import check
from memfit.lint.clipping import clipping_setting
from memfit.lint.draft import Conversion
from memfit.lint.neighbours import neighbours
from memfit.lint.parse import Setup, read
from memfit.lint.to_plan import convert
from memfit.techniques.rank_mesh import layout
from memfit.techniques.registry import conflict, make_use
from memfit.types.errors import UserError
from memfit.types.job import JobRef
from memfit.types.launch import RunSpec
from memfit.types.plan import Plan, Use

BF16, AUTO = {"bf16": {"enabled": True}}, {"bf16": {"enabled": "auto"}}
V2 = {"fsdp_version": 2}


def carried(folder: Path, *files: File, ranks: int | None = None) -> Conversion:
    for name, text in files:
        (folder / name).write_text(text)
    return convert(read([folder / name for name, _ in files], ranks=ranks))


def names(found: Conversion) -> set[str]:
    return {u.technique for u in found.plan.uses}


def knobs(found: Conversion, technique: str) -> Mapping[str, Any]:
    used = found.plan.get(technique)
    assert used is not None, found
    return used.settings


def left(found: Conversion) -> set[str]:
    return {o.option for o in found.left_out}


def test_a_deepspeed_file_becomes_a_zero_plan_with_unsupported_options_left_out(tmp_path: Path) -> None:
    section = zero(2, overlap_comm=True, offload_optimizer={"device": "cpu"}, zero_quantized_weights=True)
    file = ds(gradient_accumulation_steps=4, optimizer={"type": "AdamW"}, **BF16, **section)
    found = carried(tmp_path, file, ranks=2)
    assert (found.engine, found.plan.ranks, found.micro_batch, found.batch) == ("deepspeed", 2, 4, 32)
    assert names(found) == {"zero", "gradient-accumulation"}  # AdamW runs on the host
    assert knobs(found, "zero") == {
        "stage": 2,
        "precision": "bf16",
        "overlap": True,
        "offload": "optimizer",
        "nvme": "none",
        "sub_group_elements": 100_000_000,
        "persist_elements": 100_000,
        "reduce_bucket_elements": 500_000_000,
        "prefetch_elements": 50_000_000,
        "live_elements": 1_000_000_000,
        "memory_efficient_linear": True,
    }
    assert left(found) == {"zero_optimization.zero_quantized_weights"}


def test_deepspeed_stage_3_settings_are_kept_and_auto_values_are_left_out(tmp_path: Path) -> None:
    section = zero(
        3,
        offload_param={"device": "nvme"},
        stage3_prefetch_bucket_size=7,
        reduce_bucket_size="auto",
        stage3_param_persistence_threshold=0,
    )
    found = carried(
        tmp_path, ds(fp16={"enabled": "auto"}, sparse_attention={"mode": "fixed"}, **section), ranks=4
    )
    assert knobs(found, "zero")["offload"] == "parameters"
    assert knobs(found, "zero")["prefetch_elements"] == 7
    assert knobs(found, "zero")["persist_elements"] == 1
    assert left(found) == {
        "offload_param to nvme",
        "zero_optimization.reduce_bucket_size auto",
        "fp16.enabled auto",
        "sparse_attention",
    }


def test_optimizer_state_on_nvme_is_kept_at_stage_3_only(tmp_path: Path) -> None:
    away = {"device": "nvme", "nvme_path": "/disk"}
    found = carried(tmp_path, ds(**zero(3, offload_optimizer=away, sub_group_size=2e8)), ranks=4)
    assert (knobs(found, "zero")["offload"], knobs(found, "zero")["nvme"]) == ("optimizer", "optimizer")
    assert knobs(found, "zero")["sub_group_elements"] == 200_000_000
    assert left(found) == set()
    found = carried(tmp_path, ds(**zero(2, offload_optimizer=away)), ranks=4)
    assert knobs(found, "zero")["nvme"] == "none"
    assert left(found) == {"offload_optimizer to nvme"}


@pytest.mark.parametrize(
    ("keys", "micro", "batch", "steps"),
    [
        ({"train_batch_size": 64, "train_micro_batch_size_per_gpu": 4}, 4, 64, 8),
        (
            {
                "train_batch_size": 64,
                "gradient_accumulation_steps": 2,
                "train_micro_batch_size_per_gpu": None,
            },
            16,
            64,
            2,
        ),
        ({"train_batch_size": 64, "train_micro_batch_size_per_gpu": None}, 32, 64, None),
        ({"train_micro_batch_size_per_gpu": "auto"}, None, None, None),
    ],
)
def test_missing_deepspeed_batch_settings_are_derived_from_those_given(
    keys: dict[str, Any], micro: int | None, batch: int | None, steps: int | None, tmp_path: Path
) -> None:
    found = carried(tmp_path, ds(**keys), ranks=2)
    assert (found.micro_batch, found.batch) == (micro, batch)
    used = found.plan.get("gradient-accumulation")
    assert (used.settings["micro_batches"] if used is not None else None) == steps


def test_trainer_arguments_fill_in_auto_values_of_deepspeed(tmp_path: Path) -> None:
    auto = {"train_micro_batch_size_per_gpu": "auto", "gradient_accumulation_steps": "auto"}
    args = tr(bf16=True, gradient_accumulation_steps=2, gradient_checkpointing=True, optim="adamw_8bit")
    found = carried(tmp_path, ds(bf16={"enabled": "auto"}, **auto, **zero(1)), args, ranks=2)
    assert (found.engine, found.micro_batch, found.batch) == ("accelerate", 4, 16)
    assert names(found) == {"zero", "gradient-accumulation", "activation-checkpointing", "adamw-8bit"}
    assert knobs(found, "zero")["precision"] == "bf16"


def test_optimizer_state_that_is_offloaded_in_part_is_listed(tmp_path: Path) -> None:
    away = {"device": "cpu", "ratio": 0.1}
    found = carried(tmp_path, ds(**zero(3, offload_optimizer=away)), ranks=4)
    assert left(found) == {"offload_optimizer.ratio 0.1"}
    assert left(carried(tmp_path, ds(**zero(3, offload_optimizer=away | {"ratio": 1.0})), ranks=4)) == set()


def test_fsdp_without_wrapping_is_listed(tmp_path: Path) -> None:
    assert left(carried(tmp_path, fsdp(2, auto_wrap_policy="NO_WRAP"))) == {"auto_wrap_policy NO_WRAP"}


def test_accelerate_fsdp_of_both_versions_becomes_fsdp2(tmp_path: Path) -> None:
    new = carried(tmp_path, fsdp(2, reshard_after_forward=False, offload_params=True))
    assert (new.engine, new.plan.ranks, new.left_out) == ("accelerate", 8, ())
    assert knobs(new, "fsdp2")["reshard"] is False
    assert knobs(new, "fsdp2")["offload"] is True
    old = carried(tmp_path, fsdp(1, sharding_strategy="SHARD_GRAD_OP", activation_checkpointing=True))
    assert knobs(old, "fsdp2")["reshard"] is False
    assert names(old) == {"fsdp2", "activation-checkpointing"}
    assert left(old) == {"fsdp_version 1"}
    assert names(carried(tmp_path, fsdp(1, sharding_strategy="NO_SHARD"))) == {"ddp"}


def test_accelerate_parallelism_config_becomes_tensor_parallel_and_replicated_fsdp2(tmp_path: Path) -> None:
    mesh_of = {"parallelism_config_tp_size": 2, "parallelism_config_dp_replicate_size": 2}
    section = {"fsdp_version": 2}
    file = acc(
        "FSDP", num_processes=8, mixed_precision="bf16", fsdp_config=section, parallelism_config=mesh_of
    )
    found = carried(tmp_path, file, tr(gradient_accumulation_steps=2, bf16=True))
    assert knobs(found, "tensor-parallel")["degree"] == 2
    assert (knobs(found, "fsdp2")["replicas"], knobs(found, "fsdp2")["precision"]) == (2, "bf16")
    assert found.batch == 4 * 4 * 2


def test_trainer_arguments_alone_become_a_plan(tmp_path: Path) -> None:
    args = tr(fsdp="shard_grad_op offload", fp16=True, optim="lomo", torch_compile=True)
    found = carried(tmp_path, args, ranks=2)
    assert (knobs(found, "fsdp2")["reshard"], knobs(found, "fsdp2")["offload"]) == (False, True)
    assert left(found) == {"mixed precision fp16", "optim lomo"}
    assert "compile" in names(found)
    assert names(carried(tmp_path, tr(bf16=True))) == {"adamw-fused", "bf16-autocast"}
    assert names(carried(tmp_path, tr(optim="sgd"), acc("MULTI_GPU", num_processes=2))) == {"ddp", "sgd"}


@pytest.mark.parametrize(
    ("files", "technique", "expected"),
    [
        ((acc("MULTI_GPU", num_processes=2, mixed_precision="bf16"), tr()), "bf16-autocast", None),
        ((acc("MULTI_GPU", num_processes=2, mixed_precision="no"), tr(bf16=True)), "bf16-autocast", None),
        ((fsdp(2), tr(bf16=True)), "fsdp2", "bf16"),
        ((acc("FSDP", num_processes=2, mixed_precision="bf16", fsdp_config=V2), tr()), "fsdp2", "bf16"),
        (
            (acc("FSDP", num_processes=2, mixed_precision="bf16", fsdp_config=V2), tr(bf16=False)),
            "fsdp2",
            "bf16",
        ),
        ((acc("FSDP", num_processes=2, mixed_precision="no", fsdp_config=V2), tr()), "fsdp2", "as-is"),
        ((acc(num_processes=2, deepspeed_config={"zero_stage": 2}), tr(bf16=True)), "zero", "bf16"),
        ((acc(num_processes=2, deepspeed_config=FILE), ds(**zero(2)), tr(bf16=True)), "zero", "bf16"),
        ((acc(num_processes=2, deepspeed_config=FILE), ds(**zero(2)), tr()), "zero", "fp32"),
        (
            (acc("MULTI_GPU", num_processes=2, mixed_precision="bf16"), ds(**AUTO, **zero(2)), tr()),
            "zero",
            "fp32",
        ),
    ],
)
def test_the_trainers_precision_takes_precedence_over_accelerates_only_if_it_is_on(
    files: tuple[File, ...], technique: str, expected: str | None, tmp_path: Path
) -> None:
    assert knobs(carried(tmp_path, *files), technique).get("precision") == expected


def test_trainer_settings_of_gradient_buckets_and_synchronisation_are_kept(tmp_path: Path) -> None:
    once = tr(gradient_accumulation_steps=2, ddp_bucket_cap_mb=7)
    assert knobs(carried(tmp_path, once, ranks=2), "ddp") == {
        "bucket_mib": 7,
        "bucket_view": False,
        "sync": "last",
    }
    told = {"gradient_accumulation_kwargs": {"sync_each_batch": True}}
    each = tr(gradient_accumulation_steps=2, fsdp=True, accelerator_config=told)
    assert knobs(carried(tmp_path, each, ranks=2), "fsdp2")["sync"] == "every"


def test_megatron_arguments_become_a_plan_of_one_data_parallel_replica(tmp_path: Path) -> None:
    flags = "--bf16 --global-batch-size 32 --tensor-model-parallel-size 2 --sequence-parallel"
    pipe = "--pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 3"
    full = "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"
    found = carried(tmp_path, mg(f"{flags} {pipe} {full} --fp8-format hybrid"), ranks=8)
    assert (found.engine, found.micro_batch, found.batch) == ("megatron", 1, 16)  # of one of the two replicas
    assert (found.plan.ranks, layout(found.plan).data, conflict(found.plan)) == (4, 1, None)
    assert knobs(found, "tensor-parallel")["sequence"] is True
    wanted = {"stages": 2, "virtual": 4, "schedule": "interleaved", "micro_batches": 16}
    assert knobs(found, "pipeline") == knobs(found, "pipeline") | wanted
    assert "activation-checkpointing" in names(found)
    assert left(found) >= {"--fp8-format", "gradients in fp32", "2 data-parallel replicas"}


def test_megatron_distributed_optimizer_becomes_zero_stage_1(tmp_path: Path) -> None:
    found = carried(tmp_path, mg("--bf16 --use-distributed-optimizer --recompute-activations"), ranks=8)
    assert (knobs(found, "zero")["stage"], knobs(found, "zero")["precision"]) == (1, "bf16")
    assert left(found) == {"gradients in fp32", "gradients reduced in place", "selective recomputation"}
    alone = carried(tmp_path, mg("--tensor-model-parallel-size 4"))
    assert alone.plan.ranks == 4
    assert left(alone) == {"data-parallel ranks"}


def test_script_values_known_only_at_run_time_are_left_out_instead_of_defaults(tmp_path: Path) -> None:
    flags = "--output_dir $OUT --per_device_train_batch_size $SAMPLES --optim $OPTIMIZER --bf16 $BF16"
    trainer = carried(tmp_path, ("trainer.sh", f"run.py {flags}\n"), ranks=2)
    assert names(trainer) == {"ddp"}
    assert (trainer.micro_batch, trainer.batch) == (None, None)
    assert left(trainer) == {"per_device_train_batch_size $SAMPLES", "optim $OPTIMIZER", "bf16 $BF16"}
    steps = carried(
        tmp_path, ("trainer.sh", "run.py --output_dir o --gradient_accumulation_steps $STEPS\n"), ranks=2
    )
    assert (steps.micro_batch, steps.batch) == (8, None)
    flags = "--tensor-model-parallel-size $TENSOR --global-batch-size $BATCH --save $OUT"
    branch = 'if [ -n "$ALL" ]; then\n  ARGS="--recompute-granularity full"\nfi'
    megatron = carried(tmp_path, mg(flags, branch), ranks=2)
    assert (megatron.micro_batch, megatron.batch) == (1, None)
    assert left(megatron) >= {
        "tensor-model-parallel-size $TENSOR",
        "global-batch-size $BATCH",
        "recompute-granularity full",
    }
    assert not any("$OUT" in option for option in left(megatron))


@pytest.mark.parametrize(
    ("before", "limit", "explicit"),
    [
        ("CLIP=0.5", 0.5, True),
        ("CLIP=${2:-0.5}", 0.5, True),
        ("", None, False),
        ('if [ "$1" ]; then CLIP=0.5; else CLIP=1.0; fi', None, False),
    ],
)
def test_a_clipping_norm_in_a_variable_is_resolved_or_left_out(
    before: str, limit: float | None, explicit: bool, tmp_path: Path
) -> None:
    found = carried(tmp_path, mg("--clip-grad $CLIP", before))
    clipping = clipping_setting(read([tmp_path / "train.sh"]))
    assert (clipping.limit, clipping.explicit) == (limit, explicit)
    assert ("clip-grad $CLIP" in left(found)) is (limit is None)


@pytest.mark.parametrize(
    ("table", "name", "technique"),
    [
        ("training", "data_parallel_shard", "fsdp2"),
        ("training", "data_parallel_replicate", "ddp"),
        ("training", "tensor_parallel", "tensor-parallel"),
        ("experimental", "context_parallel", "context-parallel"),
        ("experimental", "pipeline_parallel", "pipeline"),
    ],
)
def test_torchtitan_degrees_in_the_tables_of_older_releases_are_in_the_plan(
    table: str, name: str, technique: str, tmp_path: Path
) -> None:
    found = carried(tmp_path, tt(**{table: {f"{name}_degree": 2}}))
    assert found.plan.ranks == 2
    assert technique in names(found)


@pytest.mark.parametrize(
    "file",
    [
        tt(parallelism={"data_parallel_shard_degree": 10**17}),
        ("train.sh", "torchrun --nproc-per-node -8 pretrain_gpt.py --num-layers 24 --micro-batch-size 1\n"),
    ],
)
def test_an_impossible_number_of_processes_is_refused(file: File, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"the set-up has -?\d+ processes; allowed: 1 to 1,048,576"):
        carried(tmp_path, file)


@pytest.mark.parametrize(
    ("file", "said"),
    [
        (tr(per_device_train_batch_size=0), "per_device_train_batch_size 0"),
        (tt(training={"local_batch_size": -4}), "training.local_batch_size -4"),
        (("a.yaml", "base_model: x\nmicro_batch_size: -4\nsequence_len: 64\n"), "micro_batch_size -4"),
        (("a.yaml", "base_model: x\nmicro_batch_size: 4\nsequence_len: .nan\n"), "sequence_len nan"),
        (("train.sh", "x --num-layers 2 --seq-length 8 --micro-batch-size 0\n"), "micro_batch_size 0"),
    ],
)
def test_a_size_below_1_is_left_out_and_not_carried_over(file: File, said: str, tmp_path: Path) -> None:
    found = carried(tmp_path, file)
    assert said in left(found)
    assert said.partition(" ")[0] not in found.carried


def test_torchtitan_pipelines_of_older_releases_have_a_number_of_micro_batches(tmp_path: Path) -> None:
    table = {"pipeline_parallel_degree": 2, "pipeline_parallel_schedule": "interleaved_1f1b"}
    found = carried(tmp_path, tt(training={"batch_size": 16}, experimental=table))
    assert knobs(found, "pipeline")["schedule"] == "interleaved"
    assert knobs(found, "pipeline")["micro_batches"] == 4  # by default one for each of the four stages
    table |= {"pipeline_parallel_microbatches": 8}
    found = carried(tmp_path, tt(training={"batch_size": 16}, experimental=table))
    assert knobs(found, "pipeline")["micro_batches"] == 8


def test_torchtitan_settings_become_a_plan_with_unknown_converters_left_out(tmp_path: Path) -> None:
    tables = {
        "training": {"local_batch_size": 4, "global_batch_size": 32},
        "parallelism": {"data_parallel_shard_degree": -1} | mesh(tensor=2),
        "activation_checkpoint": {"mode": "full"},
        "optimizer": {"implementation": "for-loop"},
        "model": {"converters": ["float8"]},
    }
    found = carried(tmp_path, tt(**tables), ranks=8)
    assert (found.engine, found.plan.ranks, found.micro_batch, found.batch) == ("native", 8, 4, 32)
    assert names(found) == {
        "fsdp2",
        "tensor-parallel",
        "activation-checkpointing",
        "adamw-single",
        "gradient-accumulation",
    }
    assert knobs(found, "gradient-accumulation")["micro_batches"] == 2
    assert left(found) == {"converter float8"}


def test_torchtitan_float8_converter_becomes_float8_linear(tmp_path: Path) -> None:
    own = {"recipe_name": "rowwise", "enable_fsdp_float8_all_gather": True}
    tables = {"model": {"converters": ["quantize.linear.float8", "quantize.grouped_mm.mx"]}}
    found = carried(tmp_path, tt(**tables, **{"quantize.linear.float8": own}), ranks=2)
    assert knobs(found, "float8-linear") == {"scaling": "rowwise"}
    assert left(found) == {"enable_fsdp_float8_all_gather", "converter quantize.grouped_mm.mx"}


def test_torchtitan_pipeline_plan_keeps_gathered_parameters_and_reduces_gradients_last(
    tmp_path: Path,
) -> None:
    tables = {
        "training": {"local_batch_size": 8},
        "activation_checkpoint": {"mode": "none"},
        "parallelism": {"data_parallel_shard_degree": 2, "pipeline_parallel_schedule": "Interleaved1F1B"}
        | mesh(pipeline=2),
    }
    found = carried(tmp_path, tt(**tables))
    assert found.plan.ranks == 4
    assert (knobs(found, "pipeline")["micro_batches"], knobs(found, "pipeline")["virtual"]) == (8, 2)
    assert (knobs(found, "fsdp2")["reshard"], knobs(found, "fsdp2")["sync"]) == (False, "last")
    odd = tables | {"parallelism": {"pipeline_parallel_schedule": "Mine"} | mesh(pipeline=2)}
    assert "pipeline_parallel_schedule mine" in left(carried(tmp_path, tt(**odd)))


def test_conflicting_options_are_left_out_with_the_reason(tmp_path: Path) -> None:
    found = carried(tmp_path, tt(parallelism=mesh(tensor=2), compile={"enable": True}), ranks=2)
    assert [o.reason for o in found.left_out if o.option == "compile.enable"] == [
        "in memfit compile cannot be combined with tensor-parallel"
    ]
    assert conflict(found.plan) is None


def written(engine: Engine, plan: Plan) -> File:
    """The file that ``memfit run --engine`` gives to the library."""
    spec = RunSpec(
        name="x",
        role="baseline",
        job=JobRef(spec="protein-lm"),
        plan=plan,
        engine=engine.name,
        seed=0,
        steps=1,
        batch_size=32,
        sizes={"num-layers": "8"},
    )
    assert engine.files is not None
    ((name, text),) = engine.files(spec).items()
    return name, text


ACCUMULATED = make_use("gradient-accumulation", {"micro_batches": 2})
BUCKET = {"reduce_bucket_elements": 1000}
BESIDE = make_use("ddp", {"bucket_view": False})
FULL = make_use("activation-checkpointing", {"every": 1})
PIPELINE = {"stages": 2, "virtual": 2, "schedule": "interleaved", "micro_batches": 4}


@pytest.mark.parametrize(
    ("engine", "uses"),
    [
        (deepspeed.ENGINE, (ACCUMULATED, make_use("zero", {"stage": 1, "precision": "bf16"} | BUCKET))),
        (deepspeed.ENGINE, (make_use("zero", {"stage": 2, "offload": "optimizer", "overlap": True}),)),
        (deepspeed.ENGINE, (make_use("zero", {"stage": 3, "offload": "parameters", "live_elements": 9}),)),
        (deepspeed.ENGINE, (make_use("zero", {"stage": 3, "memory_efficient_linear": False}),)),
        (deepspeed.ENGINE, (make_use("zero", {"stage": 0}),)),
        (accelerate.ENGINE, (BESIDE,)),
        (accelerate.ENGINE, (BESIDE, make_use("bf16-autocast", {}))),
        (accelerate.ENGINE, (make_use("fsdp2", {"reshard": False, "precision": "bf16", "offload": True}),)),
        (megatron.ENGINE, (FULL, ACCUMULATED, make_use("zero", {"stage": 1, "overlap": True} | BUCKET))),
        (megatron.ENGINE, (make_use("pipeline", PIPELINE), make_use("ddp", {}))),
        (megatron.ENGINE, (make_use("context-parallel", {"degree": 4}),)),
    ],
)
def test_files_written_for_an_engine_read_back_as_the_same_plan(
    engine: Engine, uses: tuple[Use, ...], tmp_path: Path
) -> None:
    plan = Plan(ranks=4, uses=uses)
    file = written(engine, plan)
    found = carried(tmp_path, file, ranks=4)
    assert (found.plan, found.engine) == (plan, engine.name)
    assert left(found) <= {"gradients reduced in place"}
    assert check(read([tmp_path / file[0]], ranks=4)) == ()


def test_neighbouring_plans_keep_the_rank_count_and_have_no_conflict() -> None:
    plan = Plan(ranks=2, uses=(make_use("zero", {"stage": 2}),))
    found = neighbours(plan, parameters=1000)
    assert plan not in found
    assert all(p.ranks == 2 and conflict(p) is None for p in found)
    buckets = [int(p.uses[0].settings.get("reduce_bucket_elements", 0)) for p in found if len(p.uses) == 1]
    assert 1000 in buckets
    assert len(neighbours(Plan(ranks=2, uses=(make_use("fsdp2", {"reshard": False}),)))) >= 3


ODD = (None, True, False, "", "auto", "x", -1, 0, 1.5, 10**30, [], [1], {}, {"a": 1}, "nan", "$X")


def variants(data: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Copies of the data with one value replaced by something unexpected."""
    for key, value in data.items():
        yield from ({**data, key: odd} for odd in ODD)
        if isinstance(value, dict):
            yield from ({**data, key: inner} for inner in variants(value))


@pytest.mark.parametrize("rule", CASES)
def test_of_unexpected_option_values_only_impossible_numbers_of_processes_are_refused(
    rule: str, tmp_path: Path
) -> None:
    for name, text in CASES[rule].bad:
        (tmp_path / name).write_text(text)
    setup = read([tmp_path / name for name, _ in CASES[rule].bad], ranks=CASES[rule].ranks)
    for kind in dataclasses.fields(Setup)[:5]:
        options = getattr(setup, kind.name)
        for data in variants(options.data) if options is not None else ():
            odd = dataclasses.replace(setup, **{kind.name: dataclasses.replace(options, data=data)})
            check(odd)
            try:
                ranks = convert(odd).plan.ranks
            except UserError as error:
                ranks = 1 if str(error).startswith("the set-up has ") else 0
            assert ranks >= 1
