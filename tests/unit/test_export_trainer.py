"""TrainingArguments exported from a plan, read by transformers itself."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
from test_export import handover

from memfit.cli import main
from memfit.export.targets import bundle
from memfit.export.write import write
from memfit.lint import to_plan
from memfit.lint.parse import read
from memfit.techniques.plan_file import plan_text
from memfit.techniques.registry import make_use
from memfit.types.errors import UserError
from memfit.types.plan import Plan

BESIDE = {"bucket_view": False}  # the Trainer's gradients are not views of its buckets


def plan(ranks: int = 1, **uses: dict[str, Any]) -> Plan:
    named = {name.replace("_", "-"): knobs for name, knobs in uses.items()}
    return Plan(uses=tuple(make_use(n, k) for n, k in named.items()), ranks=ranks)


def loaded(folder: Path, given: Plan, engine: str = "native") -> Any:
    """Arguments as read by the parser that a training script uses."""
    from transformers import HfArgumentParser, TrainingArguments

    write(folder, bundle("trainer", handover(given, engine)))
    path = folder / "training_args.json"
    raw = {**json.loads(path.read_text()), "use_cpu": True}  # it refuses bf16 where no device has it
    path.write_text(json.dumps(raw))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # raised by 5.2, which renamed gradient_checkpointing
        return HfArgumentParser(TrainingArguments).parse_json_file(str(path))[0]  # type: ignore[arg-type]


def test_single_process_techniques_become_training_arguments(tmp_path: Path) -> None:
    args = loaded(
        tmp_path / "out",
        plan(bf16_autocast={}, activation_checkpointing={}, gradient_accumulation={"micro_batches": 4}),
    )
    assert (args.bf16, args.fp16, args.gradient_checkpointing) == (True, False, True)
    assert (args.per_device_train_batch_size, args.gradient_accumulation_steps) == (2, 4)
    assert args.optim == "adamw_torch"
    assert args.gradient_checkpointing_kwargs == {"use_reentrant": False}


@pytest.mark.parametrize(
    ("technique", "name"),
    [("adamw-fused", "adamw_torch_fused"), ("sgd", "sgd"), ("adafactor", "adafactor")],
)
def test_an_optimizer_technique_becomes_the_optim_argument(tmp_path: Path, technique: str, name: str) -> None:
    args = loaded(tmp_path / "out", plan(**{technique: {}}))
    assert args.optim == name
    assert args.optim_args == ("momentum=0.9" if name == "sgd" else None)


def test_ddp_bucket_size_and_batch_per_rank_become_training_arguments(tmp_path: Path) -> None:
    args = loaded(tmp_path / "out", plan(2, ddp={"bucket_mib": 7, **BESIDE}))
    assert args.ddp_bucket_cap_mb == 7
    assert args.per_device_train_batch_size == 4


def test_fsdp2_settings_become_fsdp_plugin_arguments(tmp_path: Path) -> None:
    given = plan(
        4,
        fsdp2={"precision": "bf16", "reshard": False, "offload": True},
        activation_checkpointing={},
        gradient_accumulation={},
    )
    args = loaded(tmp_path / "out", given)
    told = args.fsdp_plugin_args
    assert (args.bf16, args.gradient_checkpointing, args.fsdp) == (True, False, True)
    assert told["fsdp_version"] == 2
    assert told["reshard_after_forward"] is False
    assert told["cpu_offload"] is True
    assert told["activation_checkpointing"] is True
    assert args.accelerator_config.gradient_accumulation_kwargs == {"sync_each_batch": True}
    assert args.per_device_train_batch_size == 1


def test_the_deepspeed_file_and_the_training_arguments_agree(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("deepspeed")
    from transformers.integrations.deepspeed import HfTrainerDeepSpeedConfig

    folder = tmp_path / "out"
    given = plan(4, zero={"stage": 2, "precision": "bf16"}, gradient_accumulation={"micro_batches": 2})
    files = bundle("trainer", handover(given, "deepspeed"))
    write(folder, files)
    assert files["deepspeed.json"] == handover(given, "deepspeed").config.files["deepspeed.json"]
    monkeypatch.chdir(folder)
    raw = json.loads(Path("training_args.json").read_text())
    assert raw.pop("deepspeed") == "deepspeed.json"
    Path("training_args.json").write_text(json.dumps(raw))
    args = loaded_as_is(folder)
    config = HfTrainerDeepSpeedConfig("deepspeed.json")
    monkeypatch.setattr(type(args), "world_size", property(lambda self: 4))
    config.trainer_config_process(args)
    config.trainer_config_finalize(args, None, 100)  # raises ValueError naming what differs
    assert config.config["train_micro_batch_size_per_gpu"] == args.per_device_train_batch_size == 1


def loaded_as_is(folder: Path) -> Any:
    from transformers import HfArgumentParser, TrainingArguments

    raw = {**json.loads((folder / "training_args.json").read_text()), "use_cpu": True}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return HfArgumentParser(TrainingArguments).parse_dict(raw)[0]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (plan(2, fsdp2={"prefetch": 2}), "no setting for prefetch"),
        (plan(2, tensor_parallel={}), "tensor-parallel is not supported"),
        (plan(activation_checkpointing={"every": 2}), "every must be 1"),
        (plan(2, ddp={}), "bucket_view must be false"),
        (plan(2, zero={}), "--engine deepspeed"),
        (
            plan(gradient_accumulation={"micro_batches": 3}),
            "a batch of 8 samples cannot be split equally over 3 micro-batches",
        ),
    ],
)
def test_plans_that_training_arguments_cannot_express_are_refused(given: Plan, said: str) -> None:
    with pytest.raises(UserError, match=said):
        bundle("trainer", handover(given))


@pytest.mark.parametrize(
    ("given", "engine"),
    [
        (plan(), "native"),
        (plan(bf16_autocast={}, activation_checkpointing={}), "native"),
        (plan(fp16_autocast={}, gradient_accumulation={"micro_batches": 2}), "native"),
        (plan(gradient_accumulation={"micro_batches": 4}, adamw_fused={}), "native"),
        (plan(4, fsdp2={"precision": "bf16", "reshard": False}), "native"),
        (plan(4, zero={"stage": 3, "precision": "bf16", "offload": "parameters"}), "deepspeed"),
        (
            plan(4, zero={"stage": 2, "reduce_bucket_elements": 1000}, activation_checkpointing={}),
            "deepspeed",
        ),
    ],
)
def test_exported_training_arguments_read_back_as_the_same_plan(
    tmp_path: Path, given: Plan, engine: str
) -> None:
    write(tmp_path / "out", bundle("trainer", handover(given, engine)))
    carried = to_plan.convert(read([tmp_path / "out" / "training_args.json"], ranks=given.ranks))
    assert carried.plan == given
    assert carried.batch == 8


def test_the_export_command_writes_training_arguments(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "plan.yaml").write_text(plan_text(plan(bf16_autocast={})))
    job = f"{Path(__file__).with_name('tiny.py')}:words"
    out = str(tmp_path / "out")
    assert main(["export", job, "--plan", str(tmp_path / "plan.yaml"), "--to", "trainer", "--out", out]) == 0
    assert json.loads((tmp_path / "out" / "training_args.json").read_text())["bf16"] is True


@pytest.mark.parametrize("target", ["trainer", "torchtitan", "openfold"])
def test_checkpoints_of_memfits_worker_are_refused_for_other_programs(
    target: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    words = ["export", "char-lm", "--to", target, "--out", str(out), "--save", str(tmp_path / "kept")]
    assert main(words) == 2
    assert f"--save cannot be used with --to {target}" in capsys.readouterr().err
    assert not out.exists()
