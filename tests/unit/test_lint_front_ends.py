"""Files of Axolotl, LLaMA-Factory, Lightning's command line and mace_run_train, read into plans."""

from __future__ import annotations

import ast
import dataclasses
import importlib.util
import json
import tomllib
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
import yaml
from test_lint_to_plan import variants

from memfit.lint.check import check
from memfit.lint.clipping import clipping_setting
from memfit.lint.draft import Conversion
from memfit.lint.option_reasons import option_reasons
from memfit.lint.option_schema import library_settings
from memfit.lint.parse import Options, read
from memfit.lint.to_plan import convert

FILES = Path(__file__).parents[1] / "data/front_ends"
NAMES = sorted(path.name for path in FILES.iterdir())
LIBRARIES = ("axolotl", "lightning", "llamafactory", "mace")


def kind(name: str) -> str:
    return name.partition("-")[0]


def carried(name: str, *, ranks: int | None = None) -> Conversion:
    return convert(read([FILES / name], ranks=ranks))


def written(folder: Path, name: str, **options: Any) -> Conversion:
    (folder / name).write_text(yaml.safe_dump(options))
    return convert(read([folder / name]))


def techniques(found: Conversion) -> dict[str, dict[str, Any]]:
    return {use.technique: dict(use.settings) for use in found.plan.uses}


def reasons(found: Conversion) -> dict[str, str]:
    return {option: note.reason for note in found.left_out for option in note.option.split(", ")}


@pytest.mark.parametrize("name", NAMES)
def test_every_option_of_a_file_is_carried_over_or_has_a_reason(name: str) -> None:
    options: Options = getattr(read([FILES / name]), kind(name))
    table = option_reasons(kind(name))
    found = carried(name)

    def names(data: Any, section: str = "") -> list[str]:
        inner = [(f"{section}.{key}".lstrip("."), value) for key, value in data.items()]
        return [
            path
            for key, value in inner
            for path in (names(value, key) if isinstance(value, dict) and key in table.sections else [key])
            if value is not None
        ]

    first_words = {option.partition(" ")[0] for option in reasons(found)}
    assert [n for n in names(options.data) if n not in found.carried and n not in first_words] == []
    assert not set(found.carried) & first_words


@pytest.mark.parametrize("name", NAMES)
def test_a_file_is_recognised_and_read_only_as_its_library(name: str) -> None:
    setup = read([FILES / name])
    assert [library for library in LIBRARIES if getattr(setup, library) is not None] == [kind(name)]


HUGGING_FACE = ("accelerate", "deepspeed", "trainer")


@pytest.mark.parametrize("library", HUGGING_FACE)
def test_every_option_of_the_hugging_face_libraries_is_carried_over_or_has_a_reason(library: str) -> None:
    """All that options/*.toml has: the libraries' own names, as scripts/library_options.py read them."""
    table, options = option_reasons(library), library_settings(library).now
    names = {n for n in options[""] if n not in table.sections}
    names |= {f"{section}.{n}" for section in table.sections for n in options[section]}
    assert sorted(names - table.carried - table.silent - table.reasons.keys()) == []


def test_every_field_of_the_installed_training_arguments_is_known() -> None:
    spec = importlib.util.find_spec("transformers")
    assert spec is not None
    assert spec.origin is not None
    source = (Path(spec.origin).parent / "training_args.py").read_text(encoding="utf-8")
    (arguments,) = (
        n for n in ast.parse(source).body if isinstance(n, ast.ClassDef) and n.name == "TrainingArguments"
    )
    fields = {ast.unparse(n.target) for n in arguments.body if isinstance(n, ast.AnnAssign)}
    table = option_reasons("trainer")
    assert len(fields) > 100
    assert sorted(fields - table.carried - table.silent - table.sections - table.reasons.keys()) == []


def test_arguments_that_change_the_training_are_not_dropped_without_a_word(tmp_path: Path) -> None:
    """A reported case: neither was carried over or listed."""
    changed = {"label_smoothing_factor": 0.1, "neftune_noise_alpha": 5, "torch_empty_cache_steps": 4}
    file = {
        "per_device_train_batch_size": 2,
        "output_dir": "out",
        "bf16": True,
        "logging_steps": 5,
        **changed,
    }
    (tmp_path / "args.json").write_text(json.dumps(file))
    found = convert(read([tmp_path / "args.json"]))
    assert reasons(found).keys() == changed.keys()
    assert found.carried == ("per_device_train_batch_size", "bf16")
    (tmp_path / "args.json").write_text(json.dumps({**file, **dict.fromkeys(changed, 0), "lerning_rate": 1}))
    found = convert(read([tmp_path / "args.json"]))
    assert list(reasons(found).values()) == [
        "memfit knows no such option of TrainingArguments; did you mean learning_rate?"
    ]


def test_settings_of_deepspeed_and_accelerate_are_not_dropped_without_a_word(tmp_path: Path) -> None:
    ds = {"train_micro_batch_size_per_gpu": 1, "gradient_accumulation_dtype": "fp32", "steps_per_print": 3}
    (tmp_path / "ds.json").write_text(json.dumps(ds))
    assert reasons(convert(read([tmp_path / "ds.json"], ranks=2))).keys() == {"gradient_accumulation_dtype"}
    half = {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}
    (tmp_path / "ds.json").write_text(json.dumps({"train_micro_batch_size_per_gpu": 1, **half}))
    assert reasons(convert(read([tmp_path / "ds.json"], ranks=2))).keys() == {
        "data_types.grad_accum_dtype fp32"
    }
    (tmp_path / "a.yaml").write_text(
        "distributed_type: FSDP\nnum_processes: 2\n"
        "fsdp_config: {fsdp_version: 2, fsdp_ignored_modules: head}\n"
        "parallelism_config: {parallelism_config_sp_size: 2}\n"
    )
    found = reasons(convert(read([tmp_path / "a.yaml"])))
    assert found.keys() == {"fsdp_config.ignored_modules", "parallelism_config.sp_size"}


@pytest.mark.parametrize("library", [*LIBRARIES, *HUGGING_FACE])
def test_no_option_has_two_reasons_or_is_carried_over_as_well(library: str) -> None:
    text = resources.files("memfit.lint").joinpath(f"reasons/{library}.toml").read_text(encoding="utf-8")
    data = tomllib.loads(text)
    names = [*data["carried"].split(), *data.get("silent", "").split()]
    names += [*(n for group in data["group"] for n in group["options"].split())]
    assert sorted({name for name in names if names.count(name) > 1}) == []


@pytest.mark.parametrize("name", NAMES)
def test_unexpected_values_of_a_front_end_never_raise_an_error(name: str) -> None:
    setup = read([FILES / name])
    options: Options = getattr(setup, kind(name))
    for data in variants(options.data):
        odd_options = dataclasses.replace(options, data=data)
        changed = {kind(name): odd_options} | ({"trainer": odd_options} if setup.trainer else {})
        odd = dataclasses.replace(setup, **changed)
        check(odd)
        clipping_setting(odd)
        assert convert(odd).plan.ranks >= 1


def test_a_deepspeed_setting_in_yaml_whose_name_is_a_number_raises_no_error(tmp_path: Path) -> None:
    settings = {"zero_optimization": {"stage": 2, 1: 2}}
    options = {"stage": "sft", "finetuning_type": "lora", "model_name_or_path": "m", "deepspeed": settings}
    (tmp_path / "a.yaml").write_text(yaml.safe_dump(options))
    setup = read([tmp_path / "a.yaml"])
    assert [f for f in check(setup) if f.rule == "deepspeed-stage3-keys"] == []


# -- Axolotl -----------------------------------------------------------------------------------------------


def test_axolotls_qlora_is_a_plan_with_frozen_weights_in_4_bits() -> None:
    found = carried("axolotl-qlora.yml")
    assert techniques(found) == {
        "qlora": {"rank": 32, "outside": "frozen"},
        "bf16-autocast": {},
        "adamw-8bit": {},
        "activation-checkpointing": {"every": 1},
        "gradient-accumulation": {"micro_batches": 4},
    }
    assert (found.micro_batch, found.batch, found.length) == (2, 8, 4096)
    assert found.model is not None
    assert found.model.job.startswith("hf:llama?hidden_size=2048&")


def test_axolotls_fsdp2_on_several_ranks_is_sharded_with_its_own_clipping() -> None:
    setup = read([FILES / "axolotl-fsdp2.yml"], ranks=4)
    plan = techniques(convert(setup))
    assert {k: plan["fsdp2"][k] for k in ("offload", "reshard", "precision", "sync")} == {
        "offload": True,
        "reshard": True,
        "precision": "bf16",
        "sync": "last",
    }
    assert "activation-checkpointing" in plan
    assert convert(setup).batch == 8
    assert clipping_setting(setup).limit == 0.5


def test_axolotl_trains_a_whole_model_in_bf16_only_without_sharding(tmp_path: Path) -> None:
    base = {"base_model": "m", "datasets": [], "sequence_len": 8, "micro_batch_size": 1}
    alone = techniques(written(tmp_path, "a.yml", **base))
    assert alone == {"bf16-parameters": {"rounding": "stochastic"}}
    low = written(tmp_path, "a.yml", **base, optimizer="adamw_8bit")
    assert techniques(low) == {"bf16-parameters": {"rounding": "stochastic"}}
    assert "float32 only" in reasons(low)["optimizer adamw-8bit"]
    sharded = techniques(written(tmp_path, "a.yml", **base, fsdp=["full_shard"], fsdp_config={"a": 1}))
    assert "bf16-parameters" not in sharded


def test_a_deepspeed_file_that_axolotl_ships_is_known_by_its_name() -> None:
    found = carried("axolotl-zero3.yml", ranks=8)
    assert techniques(found)["zero"]["stage"] == 3
    assert not any(option.startswith("the file") for option in reasons(found))
    assert "did you mean context_parallel_size?" in reasons(found)["context_paralel_size"]


@pytest.mark.parametrize("shipped", ["zero3.json", "zero3_bf16_cpuoffload_all.json"])
def test_a_shipped_file_that_gathers_weights_on_saves_is_not_warned_of(shipped: str, tmp_path: Path) -> None:
    text = (FILES / "axolotl-zero3.yml").read_text()
    (tmp_path / "a.yml").write_text(text.replace("zero3_bf16.json", shipped))
    assert shipped in (tmp_path / "a.yml").read_text()
    assert "deepspeed-gather-on-save" not in {f.rule for f in check(read([tmp_path / "a.yml"]))}


def test_an_own_deepspeed_file_takes_precedence_over_a_shipped_one(tmp_path: Path) -> None:
    (tmp_path / "deepspeed_configs").mkdir()
    own = {"zero_optimization": {"stage": 1}, "bf16": {"enabled": "auto"}}
    (tmp_path / "deepspeed_configs/zero3_bf16.json").write_text(json.dumps(own))
    (tmp_path / "a.yml").write_text((FILES / "axolotl-zero3.yml").read_text())
    assert techniques(convert(read([tmp_path / "a.yml"], ranks=8)))["zero"]["stage"] == 1


def test_adapters_with_weights_of_8_bits_are_predicted_with_16_and_the_reason(tmp_path: Path) -> None:
    found = written(
        tmp_path,
        "a.yml",
        base_model="m",
        datasets=[],
        micro_batch_size=1,
        adapter="lora",
        load_in_8bit=True,
        lora_target_modules=["q_proj"],
        gradient_checkpointing="offload",
    )
    assert techniques(found)["lora"] == {"rank": 8, "outside": "frozen", "dora": False}
    assert techniques(found)["bf16-parameters"] == {"rounding": "master"}
    assert set(reasons(found)) >= {
        "frozen weights of 8 bits",
        "lora_target_modules",
        "gradient_checkpointing offload",
    }


def test_adapters_in_fp16_are_predicted_in_bf16(tmp_path: Path) -> None:
    found = written(
        tmp_path, "a.yaml", stage="sft", finetuning_type="lora", model_name_or_path="m", fp16=True
    )
    assert techniques(found)["bf16-parameters"] == {"rounding": "master"}
    assert "fp16-autocast" not in techniques(found)
    assert "fp16" in reasons(found)


def test_dora_of_a_file_is_the_setting_of_lora(tmp_path: Path) -> None:
    common = {"micro_batch_size": 1, "base_model": "m", "datasets": [], "bf16": True}
    axolotl = written(tmp_path, "a.yml", **common, adapter="lora", peft_use_dora=True)
    factory = written(
        tmp_path, "b.yaml", stage="sft", finetuning_type="lora", model_name_or_path="m", use_dora=True
    )
    assert techniques(axolotl)["lora"] == techniques(factory)["lora"]
    assert techniques(axolotl)["lora"]["dora"] is True
    assert "peft_use_dora" in axolotl.carried
    assert "use_dora" in factory.carried


def test_dora_over_weights_of_4_bits_is_left_out_with_the_reason(tmp_path: Path) -> None:
    common = {"micro_batch_size": 1, "base_model": "m", "datasets": [], "load_in_4bit": True}
    axolotl = written(tmp_path, "a.yml", **common, adapter="qlora", peft_use_dora=True)
    assert "qlora" in techniques(axolotl)
    assert "frozen weights of 16 bits only" in reasons(axolotl)["peft_use_dora"]
    assert "peft_use_dora" not in axolotl.carried


def test_axolotls_parallel_sizes_give_the_number_of_ranks(tmp_path: Path) -> None:
    found = written(
        tmp_path,
        "a.yml",
        base_model="m",
        datasets=[],
        micro_batch_size=1,
        fsdp_version=2,
        fsdp_config={"reshard_after_forward": True},
        dp_shard_size=4,
        tensor_parallel_size=2,
    )
    assert found.plan.ranks == 8
    assert techniques(found)["tensor-parallel"]["degree"] == 2
    assert found.batch == 4


# -- LLaMA-Factory -----------------------------------------------------------------------------------------


def test_llama_factory_recomputes_unless_it_is_switched_off() -> None:
    assert techniques(carried("llamafactory-lora.yaml")) == {
        "lora": {"rank": 16, "outside": "frozen", "dora": False},
        "bf16-parameters": {"rounding": "master"},
        "activation-checkpointing": {"every": 1},
        "adamw-fused": {},
        "gradient-accumulation": {"micro_batches": 8},
    }
    script = carried("llamafactory-qlora.sh")
    assert "activation-checkpointing" not in techniques(script)
    assert (script.micro_batch, script.batch) == (4, 16)


def test_preferences_and_unknown_options_of_llama_factory_are_said() -> None:
    found = carried("llamafactory-zero2.yaml", ranks=4)
    assert techniques(found)["zero"]["offload"] == "optimizer"
    assert found.batch == 32
    assert "stage dpo" in reasons(found)
    assert "use_galore" in found.carried  # it is off
    unknown = reasons(carried("llamafactory-qlora.sh"))["resume_lora_training"]
    assert unknown == "memfit knows no such option of LLaMA-Factory: predicted without it"


def test_adapters_under_zero_stage_3_are_predicted_without_recomputation(tmp_path: Path) -> None:
    found = written(
        tmp_path,
        "a.yaml",
        stage="sft",
        finetuning_type="lora",
        model_name_or_path="m",
        bf16=True,
        deepspeed="examples/deepspeed/ds_z3_config.json",
    )
    assert "lora" in techniques(found)
    assert "recomputation of blocks" in reasons(found)


# -- Lightning ---------------------------------------------------------------------------------------------


def test_lightnings_ddp_has_the_ranks_of_its_devices_and_nodes() -> None:
    found = carried("lightning-ddp.yaml")
    assert (found.plan.ranks, found.micro_batch, found.batch) == (8, 16, 256)
    assert techniques(found) == {
        "ddp": {"bucket_mib": 25, "bucket_view": False, "sync": "last"},
        "bf16-autocast": {},
        "gradient-accumulation": {"micro_batches": 2},
    }
    assert clipping_setting(read([FILES / "lightning-ddp.yaml"])).limit == 0.5


def test_lightnings_fsdp_by_class_is_fsdp2_and_clipping_by_value_is_left_out() -> None:
    found = carried("lightning-fsdp.yaml")
    plan = techniques(found)
    assert (found.plan.ranks, plan["fsdp2"]["reshard"], plan["fsdp2"]["offload"]) == (2, False, True)
    assert "activation-checkpointing" in plan
    assert "trainer.gradient_clip_val" in reasons(found)
    assert clipping_setting(read([FILES / "lightning-fsdp.yaml"])).limit is None


def test_lightnings_deepspeed_by_name_has_lightnings_own_bucket() -> None:
    found = carried("lightning-deepspeed.yaml", ranks=2)
    zero = techniques(found)["zero"]
    assert (zero["stage"], zero["offload"], zero["reduce_bucket_elements"]) == (3, "parameters", 200_000_000)
    assert found.batch == 8
    assert clipping_setting(read([FILES / "lightning-deepspeed.yaml"])).limit == 0.0


@pytest.mark.parametrize(
    ("precision", "technique", "note"),
    [
        ("32-true", None, None),
        (16, "fp16-autocast", None),
        ("bf16-true", "bf16-parameters", None),
        ("64-true", None, "trainer.precision 64-true"),
        ("transformer-engine", "bf16-autocast", "trainer.precision transformer-engine"),
    ],
)
def test_lightnings_precisions_become_techniques_or_notes(
    precision: Any, technique: str | None, note: str | None, tmp_path: Path
) -> None:
    found = written(tmp_path, "a.yaml", trainer={"precision": precision, "devices": 1}, model={})
    assert set(techniques(found)) == ({technique} if technique else set())
    assert note is None or note in reasons(found)


# -- MACE --------------------------------------------------------------------------------------------------


def test_mace_flags_give_batch_average_and_clipping_and_the_model_is_left_out() -> None:
    setup = read([FILES / "mace-slurm.sh"])
    found = convert(setup)
    assert (found.plan.uses, found.micro_batch, found.ema) == ((), 32, 0.995)
    assert clipping_setting(setup).limit == 5.0
    assert {"default_dtype float32", "hidden_irreps", "amsgrad"} <= set(reasons(found))


def test_mace_flags_take_precedence_over_the_file_of_config() -> None:
    setup = read([FILES / "mace-distributed.sh"])
    found = convert(setup)
    assert (found.plan.ranks, found.micro_batch, found.batch) == (2, 8, 16)
    assert "ddp" in techniques(found)
    assert clipping_setting(setup).limit == 0.0
    assert "weight_pt" in reasons(found)
    alone = read([FILES / "mace-config.yml"])
    assert clipping_setting(alone).limit == 10.0
    assert convert(alone).plan.ranks == 1


def test_values_that_are_no_numbers_are_not_carried_over(tmp_path: Path) -> None:
    flags = "--train_file a.xyz --batch_size ten --ema --ema_decay 99 --clip_grad much"
    (tmp_path / "run.sh").write_text(f"mace_run_train {flags}\n")
    found = convert(read([tmp_path / "run.sh"]))
    assert found.carried == ("ema",)
    assert {"batch_size ten", "ema_decay 99", "clip_grad much"} <= reasons(found).keys()
    trainer = {"devices": "two", "num_nodes": "1", "gradient_clip_val": "abc", "max_epochs": 3}
    found = written(tmp_path, "lightning.yaml", trainer=trainer, model={}, data={"batch_size": 4})
    assert found.carried == ("trainer.num_nodes",)
    assert {"trainer.devices two", "trainer.gradient_clip_val abc"} <= reasons(found).keys()
    for devices in ("auto", "0,1", -1):
        found = written(tmp_path, "l.yaml", trainer={"devices": devices, "max_epochs": 3}, model={}, data={})
        assert not any("whole number" in reason for reason in reasons(found).values())


def test_a_mace_configuration_that_does_not_exist_is_said(tmp_path: Path) -> None:
    (tmp_path / "run.sh").write_text("mace_run_train --config missing.yml --batch_size 3\n")
    assert "the file missing.yml" in reasons(convert(read([tmp_path / "run.sh"])))


# -- models of the Hub -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "job"),
    [
        ("meta-llama/Meta-Llama-3-8B-Instruct", "hf:llama?hidden_size=4096&intermediate_size=14336&"),
        ("unsloth/Qwen2.5-7B-Instruct", "hf:qwen2?hidden_size=3584&"),
        ("Qwen/Qwen3-8B", "hf:qwen3?hidden_size=4096&"),
        ("mistralai/Mixtral-8x7B-v0.1", "hf:mixtral?hidden_size=4096&"),
        ("Qwen/Qwen2.5-VL-7B-Instruct", ""),
        ("TheBloke/Llama-2-7B-AWQ", ""),
        ("Qwen/Qwen3-30B-A3B", "hf:Qwen/Qwen3-30B-A3B"),
        ("meta-llama/Llama-3.1-405B", "hf:meta-llama/Llama-3.1-405B"),
        ("mine/Qwen3-30B-A3B-AWQ", ""),
        ("mine/llama-2-700b", ""),
        ("~nobody-has-this-name/model", ""),
        ("m" * 300, ""),
    ],
)
def test_the_sizes_of_well_known_models_are_those_of_their_name(name: str, job: str, tmp_path: Path) -> None:
    found = written(tmp_path, "a.yml", base_model=name, datasets=[], micro_batch_size=1)
    assert found.model is not None
    assert found.model.job.startswith(job) if job else found.model.job == ""
    assert job or name in found.model.missing


def test_a_local_folder_beside_the_file_is_the_model(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text('{"model_type": "llama"}')
    found = written(tmp_path, "a.yml", base_model="model", datasets=[], micro_batch_size=1)
    assert found.model is not None
    assert found.model.job == f"hf:{tmp_path / 'model'}"
