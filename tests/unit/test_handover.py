"""An export trains the plan and keeps the other settings of the user's own configuration."""

from __future__ import annotations

import dataclasses
import json
import tomllib
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import yaml
from test_export import DDP, FSDP, TINY, ZERO, handover

from memfit.api import conform
from memfit.cli import main
from memfit.conformance.monitor import Monitor
from memfit.engines.registry import ENGINES, render
from memfit.export.script_steps import check_acknowledged, script_steps
from memfit.export.targets import bundle
from memfit.export.user_settings import toml_text
from memfit.jobs.registry import load
from memfit.lint import to_plan
from memfit.lint.clipping import clipping_setting
from memfit.lint.launch_script import option_values
from memfit.lint.parse import read
from memfit.techniques.plan_file import plan_text
from memfit.techniques.registry import TECHNIQUES, make_use
from memfit.types.conformance import NotConforming
from memfit.types.errors import UserError
from memfit.types.job import JobRef
from memfit.types.launch import RunSpec
from memfit.types.plan import Plan

DEEPSPEED = """{
  // of our cluster
  "train_batch_size": 8, "train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": 1,
  "gradient_clipping": 0.25,
  "zero_optimization": {"stage": 2, "round_robin_gradients": true},
  "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 10}},
  "tensorboard": {"enabled": true, "output_path": "runs"}, "steps_per_print": 100
}
"""
TRAINER = {
    "output_dir": "mine",
    "learning_rate": 3e-5,
    "lr_scheduler_type": "cosine",
    "max_grad_norm": 0.3,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "bf16": True,
    "report_to": "wandb",
}
AUTO = {
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "bf16": {"enabled": "auto"},
    "zero_optimization": {"stage": 2},
    "optimizer": {"type": "AdamW", "params": {"lr": "auto"}},
}
ACCELERATE = """\
compute_environment: LOCAL_MACHINE
distributed_type: FSDP
mixed_precision: bf16
num_machines: 1
num_processes: 2
fsdp_config:
  fsdp_version: 2
  fsdp_transformer_layer_cls_to_wrap: Block
  fsdp_reshard_after_forward: true
  fsdp_state_dict_type: FULL_STATE_DICT
"""
TITAN = """\
[metrics]
log_freq = 10
[model]
name = "llama3"
[training]
local_batch_size = 4
max_norm = 0.6
[parallelism]
data_parallel_shard_degree = 2
[activation_checkpoint]
mode = "full"
[lr_scheduler]
warmup_steps = 7
"""
MEGATRON = """\
torchrun --nproc_per_node 2 pretrain_gpt.py --num-layers 4 --hidden-size 64 --num-attention-heads 4 \\
  --micro-batch-size 2 --global-batch-size 8 --clip-grad 0.9 --lr 1e-4 --data-path 0.5 a 0.5 b \\
  --save $CHECKPOINTS --log-interval 10
"""
FILES = {
    "ds.json": DEEPSPEED,
    "trainer.json": json.dumps(TRAINER),
    "auto.json": json.dumps(AUTO),
    "accelerate.yaml": ACCELERATE,
    "titan.toml": TITAN,
    "megatron.sh": MEGATRON,
    "train.py": "print(1)\n",
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def export(*words: str, to: str = "torchrun", job: str = f"{TINY}:even_words") -> int:
    return main(["export", job, "--to", to, "--out", "out", "--force", *words])


def wanted(**uses: dict[str, Any]) -> tuple[str, str]:
    plan = Plan(ranks=2, uses=tuple(make_use(n.replace("_", "-"), k) for n, k in uses.items()))
    Path("plan.yaml").write_text(plan_text(plan))
    return "--plan", "plan.yaml"


# --- settings of the user's own files


@pytest.mark.parametrize(
    ("given", "written", "words"),
    [
        ("ds.json", "deepspeed.json", ("--ranks", "2", "--script", "train.py")),
        ("accelerate.yaml", "accelerate.yaml", ("--script", "train.py")),
        ("titan.toml", "torchtitan.toml", ("--ranks", "2")),
        ("trainer.json", "training_args.json", ("--ranks", "2")),
    ],
)
def test_a_configuration_that_already_matches_the_plan_is_exported_byte_for_byte(
    folder: Path, given: str, written: str, words: tuple[str, ...]
) -> None:
    to = {"torchtitan.toml": "torchtitan", "training_args.json": "trainer"}.get(written, "torchrun")
    assert export("--from", given, *words, to=to) == 0
    assert (folder / "out" / written).read_text() == FILES[given]


def test_an_engine_that_is_named_wins_over_that_of_the_files(folder: Path) -> None:
    plan = wanted(ddp={})
    words = ("--from", "ds.json", "--ranks", "2", *plan, "--script", "train.py", "--script-applies", "all")
    assert export(*words) == 0
    assert (folder / "out" / "deepspeed.json").is_file()
    assert export(*words, "--engine", "native") == 0
    assert not (folder / "out" / "deepspeed.json").exists()


def test_exporting_another_plan_changes_only_the_settings_that_the_plan_decides(folder: Path) -> None:
    plan = wanted(zero={"stage": 3, "persist_elements": 7}, gradient_accumulation={"micro_batches": 2})
    words = ("--from", "ds.json", "--ranks", "2", *plan, "--script", "train.py --deepspeed ds.json")
    assert export(*words) == 0
    found = json.loads((folder / "out" / "deepspeed.json").read_text())
    assert found["zero_optimization"].pop("stage3_param_persistence_threshold") == 7
    for name in [
        n for n in found["zero_optimization"] if n.startswith(("stage3_", "sub_", "memory_", "offload"))
    ]:
        del found["zero_optimization"][name]
    assert found == {
        **json.loads(DEEPSPEED.replace("  // of our cluster\n", "")),
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 2,
        "zero_optimization": {"stage": 3, "round_robin_gradients": True},
    }
    assert (folder / "out" / "ds.json").read_text() == (folder / "out" / "deepspeed.json").read_text()
    assert "zero_optimization.stage: 2 -> 3" in (folder / "out" / "README.md").read_text()
    read_back = to_plan.convert(read([folder / "out" / "deepspeed.json"], ranks=2))
    assert read_back.plan == to_plan.convert(read([folder / "out" / "ds.json"], ranks=2)).plan
    assert read_back.plan.get("zero") is not None
    assert (read_back.micro_batch, read_back.batch) == (2, 8)


@pytest.mark.parametrize("engine", ["accelerate", "deepspeed"])
def test_a_configuration_in_a_subfolder_is_written_beside_the_script_that_it_is_passed_to(
    folder: Path, engine: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "conf").mkdir()
    for name in ("ds.json", "trainer.json"):
        (folder / name).rename(folder / "conf" / name)
    (folder / "zero.yaml").write_text(
        "distributed_type: DEEPSPEED\nnum_processes: 2\n"
        "deepspeed_config: {deepspeed_config_file: conf/ds.json}\n"
    )
    for path in ("conf/ds.json", f"{folder}/conf/ds.json"):
        script = f"train.py --deepspeed={path} --data conf/data.json"
        assert export("--from", "zero.yaml", "--engine", engine, "--script", script) == 0
        command = (folder / "out" / "torchrun.sh").read_text()
        assert command.endswith("train.py --deepspeed=ds.json --data conf/data.json\n")
        assert (folder / "out" / "ds.json").read_text() == (folder / "out" / "deepspeed.json").read_text()
    words = ("--ranks=2", "--script=train.py conf/trainer.json", "--script-applies=all")
    assert export("--from", "conf/trainer.json", *words) == 2
    assert "is started with trainer.json, which engine accelerate does not read" in capsys.readouterr().err


def test_memfits_worker_gets_auto_values_resolved_and_keeps_the_users_settings(folder: Path) -> None:
    assert (
        export("--from", "auto.json", "--from", "trainer.json", "--engine", "deepspeed", "--ranks", "2") == 0
    )
    found = json.loads((folder / "out" / "deepspeed.json").read_text())
    assert (found["gradient_clipping"], found["optimizer"]["type"]) == (0.3, "AdamW")
    assert (found["train_micro_batch_size_per_gpu"], found["gradient_accumulation_steps"]) == (2, 2)
    assert found["bf16"] == {"enabled": True}
    told = json.loads((folder / "out" / "run.json").read_text())
    assert told["job"]["clip"] == told["clip"] == 0.3


def test_an_export_for_the_trainer_keeps_auto_values_and_the_trainers_clipping(folder: Path) -> None:
    assert export("--from", "auto.json", "--from", "trainer.json", "--ranks", "2", to="trainer") == 0
    args = json.loads((folder / "out" / "training_args.json").read_text())
    assert args == {**TRAINER, "deepspeed": "deepspeed.json"}
    assert json.loads((folder / "out" / "deepspeed.json").read_text()) == AUTO


def exported_norms(folder: Path) -> tuple[float | None, float | None]:
    """The gradient norms in the Trainer's arguments and in DeepSpeed's file, None for one that is not set."""
    names = (("training_args.json", "max_grad_norm"), ("deepspeed.json", "gradient_clipping"))
    files = [(json.loads((folder / "out" / file).read_text()), norm) for file, norm in names]
    return files[0][0].get(files[0][1]), files[1][0].get(files[1][1])


def test_an_export_refuses_files_that_clip_to_different_norms(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A reported case: the export kept both, with which the Trainer does not start."""
    (folder / "ds.json").write_text(json.dumps({**AUTO, "gradient_clipping": 1.5}))
    assert export("--from", "ds.json", "--from", "trainer.json", "--ranks", "2", to="trainer") == 2
    told = capsys.readouterr().err
    assert "ds.json clips gradients to a norm of 1.5 (gradient_clipping), trainer.json to 0.3" in told
    assert len(told.strip().splitlines()) == 1
    assert not (folder / "out").exists()


def test_a_file_that_is_added_clips_as_the_users_files_do(folder: Path) -> None:
    """The norm of an added file was 0, with which the Trainer refuses the user's own."""
    plan = wanted(zero={"stage": 2, "precision": "bf16"})
    words = (*plan, "--ranks", "2", "--engine", "deepspeed")
    assert export("--from", "trainer.json", *words, to="trainer") == 0
    assert exported_norms(folder) == (0.3, 0.3)
    default = {n: v for n, v in TRAINER.items() if n != "max_grad_norm"}
    (folder / "trainer.json").write_text(json.dumps(default))
    assert export("--from", "trainer.json", *words, to="trainer") == 0
    assert exported_norms(folder) == (None, 1.0)  # the Trainer's default
    (folder / "ds.json").write_text(json.dumps({**AUTO, "gradient_clipping": 1.5}))
    assert export("--from", "ds.json", *words, to="trainer") == 0
    assert exported_norms(folder) == (1.5, 1.5)
    assert export("--from", "ds.json", "--from", "trainer.json", *words, to="trainer") == 0
    assert exported_norms(folder) == (1.5, 1.5)


def test_an_export_says_which_gradient_norm_has_no_effect(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "ds.json").write_text(json.dumps({n: v for n, v in AUTO.items() if n != "gradient_clipping"}))
    assert export("--from", "ds.json", "--from", "trainer.json", "--ranks", "2", to="trainer") == 0
    said = "max_grad_norm 0.3 of trainer.json has no effect: DeepSpeed clips"
    assert said in capsys.readouterr().out
    assert said in (folder / "out" / "README.md").read_text()
    (folder / "clipped.py").write_text(
        f"import dataclasses, sys\nsys.path.insert(0, {str(Path(TINY).parent)!r})\nimport tiny\n"
        "def job():\n    return dataclasses.replace(tiny.even_words(), clip=2.0)\n"
    )
    assert export("--from", "trainer.json", "--ranks", "2", to="trainer", job="clipped.py:job") == 0
    assert "The job's gradient norm of 2 is not used: 0.3 is that of your files." in capsys.readouterr().out


def test_an_export_refuses_a_batch_that_cannot_be_split_equally(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """DeepSpeed's file had the whole number below: 2 samples for 2.67."""
    plan = wanted(zero={"stage": 2}, gradient_accumulation={"micro_batches": 3})
    assert export("--engine", "deepspeed", *plan) == 2
    assert "samples cannot be split equally over 2 data-parallel ranks x 3 micro-batches" in (
        capsys.readouterr().err
    )


def test_the_settings_in_a_file_that_fsdp_config_names_are_kept(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    section = {"fsdp_version": 2, "transformer_layer_cls_to_wrap": ["Block"], "reshard_after_forward": True}
    (folder / "fsdp.json").write_text(json.dumps(section))
    (folder / "sharded.json").write_text(json.dumps({**TRAINER, "fsdp": True, "fsdp_config": "fsdp.json"}))
    words, kept = ("--from", "sharded.json", "--ranks", "2"), {"version": 2, **section}
    del kept["fsdp_version"]
    for plan, reshard in (((), True), (wanted(fsdp2={"reshard": False, "precision": "bf16"}), False)):
        assert export(*words, *plan, to="trainer") == 0
        args = json.loads((folder / "out" / "training_args.json").read_text())
        assert args["fsdp_config"] == {**kept, "reshard_after_forward": reshard}
    (folder / "fsdp.json").unlink()
    capsys.readouterr()
    assert export(*words, to="trainer") == 2
    told = capsys.readouterr().err
    assert "fsdp_config of sharded.json is fsdp.json, which is neither valid JSON nor the name" in told
    assert told.count("\n") == 1


def test_an_export_for_accelerate_keeps_the_settings_that_the_plan_does_not_decide(folder: Path) -> None:
    plan = wanted(fsdp2={"reshard": False, "precision": "bf16"}, activation_checkpointing={})
    assert export("--from", "accelerate.yaml", *plan, "--script", "train.py") == 0
    found = yaml.safe_load((folder / "out" / "accelerate.yaml").read_text())
    section = found["fsdp_config"]
    assert section.pop("fsdp_reshard_after_forward") is False
    assert section.pop("fsdp_activation_checkpointing") is True  # for a script, Accelerate recomputes
    kept = yaml.safe_load(ACCELERATE)
    del kept["fsdp_config"]["fsdp_reshard_after_forward"]
    assert found == kept


def test_an_export_of_a_megatron_script_keeps_its_options_and_names_the_unresolved_one(folder: Path) -> None:
    words = ("--from", "megatron.sh", "--script", "train.py", "--script-applies", "all")
    assert export(*words, job="char-lm") == 0
    lines = (folder / "out" / "megatron.args").read_text().splitlines()
    assert {"--data-path 0.5 a 0.5 b", "--lr 1e-4", "--clip-grad 0.9", "--log-interval 10"} <= set(lines)
    assert not any("nproc" in line or "CHECKPOINTS" in line for line in lines)
    assert "--save of megatron.sh" in (folder / "out" / "README.md").read_text()


def test_torchtitan_keeps_the_users_sections_under_another_plan(folder: Path) -> None:
    plan = wanted(fsdp2={"precision": "bf16", "units": "ends"})
    assert export("--from", "titan.toml", "--ranks", "2", *plan, to="torchtitan") == 0
    found = tomllib.loads((folder / "out" / "torchtitan.toml").read_text())
    assert found.pop("activation_checkpoint") == {"mode": "none"}
    assert found["optimizer"] == {"implementation": "foreach"}  # the file's silence meant fused
    for name, table in tomllib.loads(TITAN).items():
        assert name == "activation_checkpoint" or table.items() <= found[name].items()


def test_written_toml_reads_back_as_the_same_data() -> None:
    data = {
        "a": 1,
        "t": {"s": 'x"\\\n', "l": [1, 2.5, True, {"k": "v"}], "e": {}, "deep": {"with space": 1e-8}},
    }
    assert tomllib.loads(toml_text(data)) == data


def test_all_values_of_a_flag_are_read() -> None:
    text = "ARGS='--a 1 2 --b=3'\nrun.py $ARGS --c --d -5 x > log"
    assert option_values(text) == {"a": ("1", "2"), "b": ("3",), "c": (), "d": ("-5", "x")}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ("--from", "ds.json"),
            "nothing in ds.json, given with --from, says how many processes train; allowed: --ranks N",
        ),
        (("--from", "accelerate.yaml", "--ranks", "4"), "the files of --from say that 2"),
        (
            ("--from", "trainer.json", "--ranks=2", "--script=train.py trainer.json", "--script-applies=all"),
            "started with trainer.json, which engine accelerate does not read",
        ),
    ],
)
def test_a_contradictory_or_incomplete_export_is_refused_in_one_line_and_writes_nothing(
    folder: Path, capsys: pytest.CaptureFixture[str], words: tuple[str, ...], said: str
) -> None:
    assert export(*words) == 2
    told = capsys.readouterr().err
    assert said in told
    assert told.count("\n") == 1
    assert not (folder / "out").exists()


# --- clipping


@pytest.mark.parametrize(
    ("name", "limit", "explicit"),
    [
        ("ds.json", 0.25, True),
        ("trainer.json", 0.3, True),
        ("titan.toml", 0.6, True),
        ("megatron.sh", 0.9, True),
        ("accelerate.yaml", None, False),
    ],
)
def test_the_clipping_limit_is_read_from_each_librarys_configuration(
    folder: Path, name: str, limit: float | None, explicit: bool
) -> None:
    found = clipping_setting(read([folder / name]))
    assert (found.limit, found.explicit) == (limit, explicit)


def test_where_no_clipping_is_set_exports_write_no_limit_and_say_so(folder: Path) -> None:
    (folder / "trainer.json").write_text('{"output_dir": "x", "per_device_train_batch_size": 2}')
    assert clipping_setting(read([folder / "trainer.json"])).limit == 1.0
    for engine, plan in (("megatron", DDP), ("colossalai", ZERO)):
        text = "".join(t for n, t in handover(plan, engine).config.files.items() if n != "run.json")
        assert not any(word in text for word in ("gradient_clipping", "clip-grad", "max_norm"))
    for engine, plan, written in (("native", FSDP, None), ("deepspeed", ZERO, 0.0)):
        files = bundle("trainer", handover(plan, engine))  # DeepSpeed's default, 1.0, was not predicted
        assert json.loads(files["training_args.json"]).get("max_grad_norm") == written
        assert "Neither the job nor a configuration clips" in files["README.md"]


def test_the_jobs_clipping_limit_is_written_for_every_engine_and_target() -> None:
    def clipped(plan: Plan, engine: str) -> Any:
        given = handover(plan, engine)
        return dataclasses.replace(given, config=render(dataclasses.replace(given.config.spec, clip=0.5)))

    assert json.loads(clipped(ZERO, "deepspeed").config.files["deepspeed.json"])["gradient_clipping"] == 0.5
    assert "--clip-grad 0.5\n" in clipped(DDP, "megatron").config.files["megatron.args"]
    assert (
        json.loads(clipped(ZERO, "colossalai").config.files["colossalai.json"])["arguments"]["max_norm"]
        == 0.5
    )
    for plan, engine in ((FSDP, "native"), (ZERO, "deepspeed")):
        files = bundle("trainer", clipped(plan, engine))
        assert json.loads(files["training_args.json"])["max_grad_norm"] == 0.5
        assert "clipped to a norm of 0.5, as the job specifies" in files["README.md"]
    ends = Plan(uses=(make_use("fsdp2", {"units": "ends"}),), ranks=2)
    assert "max_norm = 0.5\n" in bundle("torchtitan", clipped(ends, "native"))["torchtitan.toml"]


# --- what a script must do itself


def test_an_export_with_a_script_is_refused_until_the_scripts_own_steps_are_acknowledged(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = wanted(zero={}, activation_checkpointing={}, adamw_fused={})
    words = (*plan, "--engine", "deepspeed", "--script", "train.py")
    assert export(*words) == 2
    told = capsys.readouterr().err
    assert "gradient_checkpointing_enable()" in told
    assert "--script-applies activation-checkpointing,adamw-fused" in told
    assert "zero:" not in told
    assert told.count("\n") == 1
    assert not (folder / "out").exists()
    assert export(*words, "--script-applies", "adamw-fused") == 2
    assert "(1) activation-checkpointing" in capsys.readouterr().err
    assert export(*words, "--script-applies", "adamw-fused,activation-checkpointing") == 0
    assert (
        "train.py must apply these parts of the plan itself:\n  activation-checkpointing"
        in capsys.readouterr().out
    )
    text = (folder / "out" / "README.md").read_text()
    assert "## What train.py must do itself" in text
    assert "`adamw-fused`: torch.optim.AdamW(..., fused=True)" in text


@pytest.mark.parametrize(
    ("uses", "words", "to", "factor"),
    [
        ({"zero": {"stage": 2}}, ("--engine", "deepspeed", "--script", "train.py"), "torchrun", "2 * terms"),
        (
            {"ddp": {}, "gradient_accumulation": {"micro_batches": 2}},
            ("--script", "train.py"),
            "slurm",
            "by 2 if",
        ),
        ({"ddp": {"bucket_view": False}}, (), "trainer", "num_items_in_batch"),
    ],
)
def test_a_job_that_counts_loss_terms_is_exported_once_its_weights_are_acknowledged(
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    uses: dict[str, Any],
    words: tuple[str, ...],
    to: str,
    factor: str,
) -> None:
    """A reported case: the first update of such an export was 14.5 % off plain training."""
    words, job = (*wanted(**uses), *words), f"{TINY}:words"
    assert export(*words, to=to, job=job) == 2
    told = capsys.readouterr().err
    assert "loss-terms: multiply the mean loss of each micro-batch by" in told
    assert told.count("\n") == 1
    assert not (folder / "out").exists()
    names = ",".join(name.replace("_", "-") for name in uses if words[-1] == "train.py" and name != "zero")
    assert export(*words, "--script-applies", f"loss-terms,{names}", to=to, job=job) == 0
    text = (folder / "out" / "README.md").read_text()
    assert "must do itself" in text
    assert factor in text
    assert "Nothing checks `loss-terms`." in text


def test_a_batch_that_is_not_split_and_memfits_worker_need_no_acknowledged_weights(folder: Path) -> None:
    job = f"{TINY}:words"
    assert export(*wanted(ddp={}), job=job) == 0
    Path("one.yaml").write_text(plan_text(Plan(uses=(make_use("activation-checkpointing", {}),))))
    assert export("--plan", "one.yaml", to="trainer", job=job) == 0


def test_a_misspelled_acknowledgement_gets_a_suggestion() -> None:
    spec = dataclasses.replace(handover(FSDP).config.spec)
    with pytest.raises(UserError, match="did you mean 'fsdp2'"):
        check_acknowledged(script_steps(spec), ["fsdp"], script="train.py")


def test_no_acknowledgement_is_needed_where_files_apply_the_whole_plan(folder: Path) -> None:
    assert export(*wanted(zero={"stage": 1}), "--engine", "deepspeed", "--script", "train.py") == 0
    assert "must do itself" not in (folder / "out" / "README.md").read_text()


@pytest.mark.parametrize("engine", sorted(ENGINES.keys() - {"replay"}))
def test_every_technique_is_applied_by_a_file_or_listed_as_a_step_of_the_script(engine: str) -> None:
    spec = RunSpec(name="", role="", job=JobRef(spec="x"), plan=Plan(), engine=engine, seed=0, steps=1)
    for name in ENGINES[engine].known & TECHNIQUES.keys():
        plan = Plan(uses=(make_use(name, {}),), ranks=2)
        steps = script_steps(dataclasses.replace(spec, plan=plan, clip=1.0))
        assert {s.name for s in steps} <= {name, "clipping"}
        if engine == "native":
            assert {s.name for s in steps} == {name, "clipping"}
        if (
            name in ENGINES[engine].applied_by_memfit
            and name != "gradient-accumulation"
            and "autocast" not in name
        ):
            assert name in {s.name for s in steps} or (engine, name) == ("megatron", "sgd")


# --- clipping is observed while training


def _watched(
    *, clip: float | None, scale: float = 1.0, calls: bool = True, before: float | None = None
) -> Any:
    torch.manual_seed(0)
    model = torch.nn.Linear(8, 8)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    watch = Monitor(model, optimizer, Plan())
    watch.clip = clip
    with watch:
        (scale * model(torch.ones(2, 8)).square().mean()).backward()
        if calls:
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.01)
        optimizer.step()
    watch.clipping.before = before
    return watch.conclude()


def test_the_monitor_checks_clipping_by_the_gradient_norm_at_the_update() -> None:
    assert "gradient clipping" in _watched(clip=0.01).checked
    with pytest.raises(NotConforming, match=r"planned gradients of norm at most 0\.01 at the update, found"):
        _watched(clip=0.01, calls=False)
    with pytest.raises(
        NotConforming, match=r"gradient clipping: planned none, found clipping to a norm of 0\.01"
    ):
        _watched(clip=0)


def test_clipping_that_never_took_effect_is_unseen_unless_torchs_function_was_called() -> None:
    assert "gradient clipping" in _watched(clip=0.01, scale=1e-4).checked
    assert "did not reach 0.01" in str(_watched(clip=0.01, scale=1e-4, calls=False).unseen)


def test_unplanned_clipping_is_found_by_comparison_with_the_norm_before_the_update() -> None:
    assert "gradient clipping" in _watched(clip=0, calls=False, before=1e-9).checked
    with pytest.raises(NotConforming, match="gradient clipping: planned none"):
        _watched(clip=0, calls=False, before=1e9)
    assert "whether code other than torch's clips gradients" in str(_watched(clip=0, calls=False).unseen)


def test_conform_checks_the_clipping_limit_and_refuses_a_negative_one() -> None:
    model = torch.nn.Linear(4, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def step() -> None:
        model(torch.ones(1, 4)).sum().backward()
        optimizer.step()

    with pytest.raises(NotConforming, match="gradient clipping"):
        conform(model, optimizer, None, step=step, clip=1e-3)
    with pytest.raises(UserError, match="clip is not a gradient norm: -1"):
        conform(model, optimizer, None, step=step, clip=-1)


# --- modules beside the job


def test_a_job_may_import_the_module_beside_it_inside_its_functions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    project, elsewhere = tmp_path / "project", tmp_path / "elsewhere"
    project.mkdir()
    elsewhere.mkdir()
    (project / "beside_it.py").write_text("from tiny import words\n")
    (project / "late.py").write_text(
        "import dataclasses\nimport tiny\n\ndef build():\n    from beside_it import words\n"
        "    return words().build_model()\n\njob = dataclasses.replace(tiny.words(), build_model=build)\n"
    )
    monkeypatch.chdir(elsewhere)
    job = load(JobRef(spec=f"{project}/late.py:job", clip=0.5))
    assert sum(p.numel() for p in job.build_model().parameters()) == sum(
        p.numel() for p in tiny.Words().parameters()
    )
    assert job.clip == 0.5
    assert load(JobRef(spec=f"{project}/late.py:job", clip=0)).clip is None
