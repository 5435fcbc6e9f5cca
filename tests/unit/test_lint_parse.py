"""Reading configurations: the kind of a file, scripts that are not run, and files that name other files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from memfit.lint.launch_script import option_values, read_script
from memfit.lint.parse import read
from memfit.types.errors import UserError

DEEPSPEED = '{"train_batch_size": 8, "bf16": {"enabled": true}, "zero_optimization": {"stage": 2}}'
ACCELERATE = "distributed_type: FSDP\nnum_processes: 4\nfsdp_config:\n  fsdp_version: 2\n"
TRAINER = "output_dir: out\nbf16: true\ngradient_checkpointing: true\n"
MEGATRON = (
    "torchrun --nproc_per_node 8 --nnodes 2 pretrain.py --tensor-model-parallel-size 4 --num-layers 8\n"
)
TORCHTITAN = '[job]\ndescription = "x"\n[training]\nlocal_batch_size = 4\n'


@pytest.mark.parametrize(
    ("kind", "name", "text"),
    [
        ("deepspeed", "a.json", DEEPSPEED),
        ("deepspeed", "a.json", "\ufeff" + DEEPSPEED),
        ("deepspeed", "a.yaml", "bf16:\n  enabled: true\ngradient_clipping: 1.0\n"),
        ("accelerate", "a.yaml", ACCELERATE),
        ("trainer", "a.yml", TRAINER),
        ("trainer", "a.json", json.dumps({"per_device_train_batch_size": 2, "fp16": True})),
        ("trainer", "a.sh", "python train.py --output_dir out --bf16 True --learning_rate 1e-4\n"),
        ("megatron", "a.sh", MEGATRON),
        ("megatron", "megatron.args", "--num-layers 4\n--micro-batch-size 2\n--bf16\n"),
        ("megatron", "a.yaml", "tensor-model-parallel-size: 2\nnum-layers: 4\nhidden-size: 8\n"),
        ("megatron", "a.yaml", "ENV_VARS:\n  A: 1\nMODEL_ARGS:\n  --num-layers: 4\n  --bf16: true\n"),
        ("torchtitan", "a.toml", TORCHTITAN),
    ],
)
def test_the_kind_of_a_file_is_recognised_from_its_content(
    kind: str, name: str, text: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_text(text, encoding="utf-8")
    setup = read([tmp_path / name])
    assert getattr(setup, kind) is not None
    assert setup.files == (str(tmp_path / name),)


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("a.json", '{"name": "x"}', "its keys (up to six) are name"),
        ("a.json", '{"model.layers.0.mlp": 1, "lm_head": 2}', "its keys (up to six) are model.layers.0.mlp"),
        ("a.json", "[1, 2]", "a list"),
        ("a.json", "{", "is not JSON"),
        ("a.yaml", "a: [", "is not valid YAML"),
        ("a.toml", "= 1", "is not valid TOML"),
        ("pyproject.toml", "[project]\nname = 'x'\n", "its keys (up to six) are project"),
        ("a.sh", "echo hello --world\n", "no option of a training library"),
        ("a.json", "{" + " " * (1 << 20) + "}", "too large to be read"),
        ("a.bin", "\udcff\udcfe", "not UTF-8 text"),
    ],
)
def test_unrecognised_or_invalid_files_are_refused_with_their_name_and_the_reason(
    name: str, text: str, says: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(UserError) as error:
        read([tmp_path / name])
    assert says in str(error.value)
    assert name in str(error.value)


def test_a_missing_file_or_two_files_of_one_kind_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="No such file"):
        read([tmp_path / "none.json"])
    for name in ("a.json", "b.json"):
        (tmp_path / name).write_text(DEEPSPEED)
    with pytest.raises(UserError, match="are both DeepSpeed JSON"):
        read([tmp_path / "a.json", tmp_path / "b.json"])


def test_a_script_is_read_without_being_run() -> None:
    script = read_script(
        """#!/bin/bash
export CUDA_DEVICE_MAX_CONNECTIONS=1
GPUS=8  # --not-a-flag 1
NODES=${NNODES:-2}
TP=${1}
WORLD=$((GPUS * $NODES + 0))
ARGS=(
    --micro-batch-size 2
    --global-batch-size $WORLD   # a comment --num-layers 7
    --tensor-model-parallel-size $TP
    --lr=1e-4 --bf16
)
if [ -n "$FP8" ]; then
    ARGS+=(--fp8-format hybrid)
fi
torchrun --nproc_per_node $GPUS pretrain.py "${ARGS[@]}" \\
    --seq-length 4096
"""
    )
    assert script.flags == {
        "micro_batch_size": "2",
        "global_batch_size": "16",
        "lr": "1e-4",
        "bf16": True,
        "seq_length": "4096",
        "nproc_per_node": "8",
        "fp8_format": "hybrid",
        "tensor_model_parallel_size": script.flags["tensor_model_parallel_size"],
    }
    assert script.unsure == {"fp8_format"}
    assert script.env == {"CUDA_DEVICE_MAX_CONNECTIONS": "1"}


def test_a_flag_has_the_value_of_a_variable_that_is_set_elsewhere_in_the_script() -> None:
    script = read_script(
        'CLIP=${1:-0.5}; STEPS=3\nif true; then export RATE=1e-4 NODES=2; fi\n: "${LAYERS:=8}"\n'
        "x --clip-grad $CLIP --train-iters ${STEPS} --lr $RATE --num-layers $LAYERS --nnodes=${NODES}\n"
    )
    assert script.flags == {
        "clip_grad": "0.5",
        "train_iters": "3",
        "lr": "1e-4",
        "num_layers": "8",
        "nnodes": "2",
    }
    assert script.env == {"RATE": "1e-4", "NODES": "2"}
    assert script.unsure == set()


def test_sums_with_operators_other_than_the_basic_four_are_left_unresolved() -> None:
    lines = 'N=4\nx --a $((2 * N + 1)) --b $((~5)) --c $((!0)) --d $((2*²)) --e $(("$N" / 2)) --f $((8/00))'
    flags = read_script(lines).flags
    assert (flags["a"], flags["e"]) == ("9", "2")
    assert all("$" in flags[name] for name in "bcdf")


def test_numbers_in_sums_are_octal_if_they_begin_with_0() -> None:
    flags = read_script("N=010\nx --a $((010)) --b $((N * 2)) --c $((08 + 1)) --d $((100 - 0))").flags
    assert (flags["a"], flags["b"], flags["d"]) == ("8", "16", "100")
    assert "$" in flags["c"]  # an error of the shell


def test_sums_of_numbers_that_no_shell_can_hold_are_left_unresolved() -> None:
    flags = read_script(f"x --a $(({'9' * 5000} + 1)) --b $((999999999 * 9999999999))").flags
    assert "$" in flags["a"]
    assert "$" in flags["b"]


def test_script_values_known_only_at_run_time_are_unknown(tmp_path: Path) -> None:
    (tmp_path / "a.sh").write_text(
        "x --num-layers $LAYERS --micro-batch-size 1 --micro-batch-size 2 --seq-length $((8 / 0))"
        " --optimizer `cat name`\n"
    )
    options = read([tmp_path / "a.sh"]).megatron
    assert options is not None
    assert (
        options.count("num_layers")
        is options.count("micro_batch_size")
        is options.count("seq_length")
        is None
    )
    assert options.unsure == {"micro_batch_size"}
    assert options.get("optimizer") is None
    names = ("num_layers", "micro_batch_size", "seq_length", "optimizer")
    assert all(map(options.undetermined, names))
    assert not options.undetermined("lr")


def test_the_rank_count_is_read_from_the_launcher_unless_it_is_given(tmp_path: Path) -> None:
    (tmp_path / "a.sh").write_text(MEGATRON)
    (tmp_path / "a.yaml").write_text(ACCELERATE)
    assert read([tmp_path / "a.sh"]).ranks == 16
    assert read([tmp_path / "a.yaml"]).ranks == 4
    assert read([tmp_path / "a.sh"], ranks=2).ranks == 2


def test_a_deepspeed_file_named_by_another_file_is_read_or_listed_as_missing(tmp_path: Path) -> None:
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "ds.json").write_text(DEEPSPEED)
    accelerate = tmp_path / "configs" / "accelerate.yaml"
    for path in ("ds.json", "configs/ds.json", str(tmp_path / "configs" / "ds.json")):
        text = f"distributed_type: DEEPSPEED\ndeepspeed_config:\n  deepspeed_config_file: {path}\n"
        accelerate.write_text(text)
        setup = read([accelerate])
        assert setup.deepspeed is not None
        assert setup.deepspeed.count("zero_optimization.stage") == 2
    accelerate.write_text(text.replace("ds.json", "gone.json"))
    setup = read([accelerate])
    assert setup.deepspeed is None
    assert setup.missing == (str(tmp_path / "configs" / "gone.json"),)


def test_deepspeed_settings_inside_trainer_and_accelerate_files_are_read(tmp_path: Path) -> None:
    trainer, accelerate = tmp_path / "t.json", tmp_path / "a.yaml"
    trainer.write_text(json.dumps({"output_dir": "o", "deepspeed": json.loads(DEEPSPEED)}))
    accelerate.write_text(
        "distributed_type: DEEPSPEED\nmixed_precision: bf16\ndeepspeed_config:\n  zero_stage: 3\n"
        "  offload_param_device: cpu\n  gradient_accumulation_steps: 4\n  gradient_clipping: 1.0\n"
    )
    inside = read([trainer]).deepspeed
    assert inside is not None
    assert inside.on("bf16.enabled")
    own = read([accelerate]).deepspeed
    assert own is not None
    assert own.data["zero_optimization"]["offload_param"] == {"device": "cpu"}
    assert own.count("gradient_accumulation_steps") == 4
    assert own.on("bf16.enabled")


def test_the_trainers_fsdp_config_is_read_from_the_file_it_names_or_from_json_text(tmp_path: Path) -> None:
    trainer, section = tmp_path / "t.json", {"fsdp_version": 2, "reshard_after_forward": False}
    (tmp_path / "fsdp.json").write_text(json.dumps(section))
    for value in ("fsdp.json", json.dumps(section), section):
        trainer.write_text(json.dumps({"output_dir": "o", "fsdp": True, "fsdp_config": value}))
        options = read([trainer]).trainer
        assert options is not None
        assert options.section("fsdp_config") == {"version": 2, "reshard_after_forward": False}
    trainer.write_text(json.dumps({"output_dir": "o", "fsdp": True, "fsdp_config": "gone.json"}))
    assert read([trainer]).missing == ("gone.json",)


def test_deepspeed_settings_are_read_from_json_text_in_a_script(tmp_path: Path) -> None:
    text = json.dumps({"zero_optimization": {"stage": 2}, "optimizer": {"type": "AdamW"}}, indent=1)
    for quoted in (f"'{text}'", json.dumps(text).replace("\\n", "\n")):
        script = f'DS={quoted}\npython train.py --output_dir o \\\n  --deepspeed "$DS" --bf16\n'
        (tmp_path / "a.sh").write_text(script)
        setup = read([tmp_path / "a.sh"])
        assert setup.deepspeed is not None
        assert setup.deepspeed.count("zero_optimization.stage") == 2
        assert setup.trainer is not None
        assert setup.trainer.on("bf16")
        assert option_values(script) == {"output_dir": ("o",), "deepspeed": (text,), "bf16": ()}


def test_accelerate_megatron_section_is_read_as_megatron_arguments(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(
        "distributed_type: MEGATRON_LM\nmixed_precision: bf16\nnum_processes: 4\nmegatron_lm_config:\n"
        "  megatron_lm_tp_degree: 2\n  megatron_lm_pp_degree: 2\n  megatron_lm_sequence_parallelism: true\n"
    )
    options = read([tmp_path / "a.yaml"]).megatron
    assert options is not None
    assert options.data == {
        "tensor_model_parallel_size": 2,
        "pipeline_model_parallel_size": 2,
        "sequence_parallel": True,
        "bf16": True,
    }


def test_auto_and_invalid_values_are_read_as_none(tmp_path: Path) -> None:
    text = {
        "train_batch_size": "auto",
        "gradient_clipping": "nan",
        "steps_per_print": 2.5,
        "fp16": {"enabled": "auto"},
    }
    (tmp_path / "a.json").write_text(json.dumps(text))
    options = read([tmp_path / "a.json"]).deepspeed
    assert options is not None
    assert options.raw("train_batch_size") == "auto"
    assert options.count("train_batch_size") is options.number("gradient_clipping") is None
    assert options.count("steps_per_print") is None
    assert not options.on("fp16.enabled")
    assert not options.off("fp16.enabled")
    assert options.raw("fp16.enabled.deeper") is None
    assert options.section("train_batch_size") == {}


def test_comments_in_deepspeed_json_are_ignored(tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    path.write_text(
        '{ // the batch\n "train_micro_batch_size_per_gpu": 4, # "no": 1\n /* a\n b */'
        ' "zero_optimization": {"stage": 2}, "tensorboard": {"output_path": "http://x/#y"}}'
    )
    found = read([path])
    assert found.deepspeed is not None
    assert found.deepspeed.raw("zero_optimization.stage") == 2
    assert found.deepspeed.raw("tensorboard.output_path") == "http://x/#y"
