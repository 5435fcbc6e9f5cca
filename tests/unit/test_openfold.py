"""OpenFold's settings: presets, plans to files and back, refusals, and OpenFold's own configuration.

The expected values are those of openfold/config.py and train_openfold.py at ce0029e (2025-09), run with
ml_collections 1.1 on 2026-11-25; where OpenFold can be imported, its own code checks the files too.
"""

from __future__ import annotations

import dataclasses
import json
import shlex
from pathlib import Path
from typing import Any

import pytest

from memfit.cli import main
from memfit.engines.registry import render
from memfit.export.base import Handover
from memfit.export.targets import bundle
from memfit.export.write import write
from memfit.jobs.builtin.alphafold2 import _shape
from memfit.lint import to_plan
from memfit.lint.check import check
from memfit.lint.draft import Conversion
from memfit.lint.openfold import PRESETS
from memfit.lint.parse import read
from memfit.techniques.plan_file import plan_text
from memfit.techniques.registry import make_use
from memfit.types.errors import UserError
from memfit.types.job import JobRef
from memfit.types.launch import RunSpec
from memfit.types.plan import Plan

DDP = {"bucket_view": False}
# DeepSpeed's file as OpenFold publishes it.
OWN = {
    "fp16": {"enabled": False, "min_loss_scale": 1},
    "amp": {"enabled": False, "opt_level": "O2"},
    "bfloat16": {"enabled": True},
    "zero_optimization": {
        "stage": 2,
        "offload_optimizer": {"device": "cpu"},
        "contiguous_gradients": True,
    },
    "activation_checkpointing": {
        "partition_activations": True,
        "cpu_checkpointing": False,
        "profile": False,
    },
    "gradient_clipping": 0.1,
    "zero_force_ds_cpu_optimizer": False,
}
TRAIN = (
    "python3 train_openfold.py mmcifs alignments templates out 2021-10-10 --config_preset {} --seed 4 {}\n"
)


def plan(ranks: int = 1, **uses: dict[str, Any]) -> Plan:
    named = {name.replace("_", "-"): knobs for name, knobs in uses.items()}
    return Plan(uses=tuple(make_use(n, k) for n, k in named.items()), ranks=ranks)


PLANS = {
    "plain": plan(),
    "bf16": plan(bf16_autocast={}, activation_checkpointing={}),
    "ddp": plan(8, ddp=DDP, bf16_autocast={}, activation_checkpointing={}),
    "half": plan(bf16_parameters={}, activation_checkpointing={}),
    "half-4": plan(4, ddp=DDP, bf16_parameters={}, activation_checkpointing={}),
    "zero": plan(4, zero={"stage": 2, "offload": "optimizer"}, activation_checkpointing={}),
    "zero-1": plan(2, zero={"stage": 1, "overlap": True, "reduce_bucket_elements": 1000}),
}


def exported(
    given: Plan, size: str | None = "initial", nodes: int = 1, job: str = "alphafold2"
) -> dict[str, str]:
    spec = RunSpec(
        name="x",
        role="run",
        job=JobRef(spec=job, size=size),
        plan=given,
        engine="native",
        seed=0,
        steps=2,
        batch_size=2 * given.ranks,
        evaluate=False,
        threads=1,
    )
    own = {"plan.yaml": plan_text(given)}
    return dict(bundle("openfold", Handover(config=render(spec), own_files=own, nodes=nodes)))


def asked(folder: Path, *files: tuple[str, str]) -> Conversion:
    for name, text in files:
        (folder / name).write_text(text)
    return to_plan.convert(read([folder / files[0][0]]))


@pytest.mark.parametrize("nodes", [1, 2])
@pytest.mark.parametrize("size", ["initial", "finetune", "finetune@320"])
@pytest.mark.parametrize("name", PLANS)
def test_exported_files_read_back_as_the_same_plan_and_size(
    tmp_path: Path, name: str, size: str, nodes: int
) -> None:
    given = PLANS[name]
    if given.ranks % nodes:
        return
    write(tmp_path / "out", exported(given, size, nodes))
    setup = read([tmp_path / "out" / "openfold.args"])
    found = to_plan.convert(setup)
    assert (found.plan, found.size) == (given, size)
    assert (found.micro_batch, found.batch) == (2, 2 * given.ranks)
    assert check(setup) == ()


@pytest.mark.parametrize("name", PLANS)
def test_openfolds_own_configuration_accepts_the_exported_changes(tmp_path: Path, name: str) -> None:
    of_openfold = pytest.importorskip("openfold.config", reason="it is not on the machine")
    write(tmp_path / "out", exported(PLANS[name], "finetune"))
    flat = json.loads((tmp_path / "out" / "openfold.json").read_text())
    config = of_openfold.model_config("finetuning", train=True)
    config.update_from_flattened_dict(flat)
    for path, value in flat.items():
        node = config
        for part in path.split("."):
            assert part in node, path
            node = node[part]
        assert node == value, path
    of_openfold.enforce_config_constraints(config)


# Crop, clustered rows, extra rows, templates of `model_config(name, train=True)`.
@pytest.mark.parametrize(
    ("name", "numbers"),
    [
        ("initial_training", (256, 128, 1024, True)),
        ("finetuning", (384, 512, 5120, True)),
        ("finetuning_ptm", (384, 512, 5120, True)),
        ("finetuning_no_templ", (384, 512, 5120, False)),
        ("finetuning_no_templ_ptm", (384, 512, 5120, False)),
        ("model_1", (256, 128, 5120, True)),
        ("model_2_ptm", (256, 128, 1024, True)),
        ("model_3", (256, 128, 5120, False)),
        ("model_4_ptm", (256, 128, 5120, False)),
        ("model_5", (256, 128, 1024, False)),
    ],
)
def test_presets_have_openfolds_crops_rows_and_templates(
    name: str, numbers: tuple[int, int, int, bool]
) -> None:
    assert dataclasses.astuple(PRESETS[name]) == numbers


@pytest.mark.parametrize(("size", "name"), [("initial", "initial_training"), ("finetune", "finetuning")])
def test_sizes_of_the_alphafold2_job_match_openfolds_presets(size: str, name: str) -> None:
    shape, preset = _shape(size, None, None), PRESETS[name]
    assert (shape.residues, shape.rows, shape.extra_rows) == (preset.residues, preset.rows, preset.extra_rows)
    assert (shape.templates > 0) is preset.templates


def test_an_export_writes_openfolds_arguments_changes_and_deepspeed_file(tmp_path: Path) -> None:
    files = exported(PLANS["half-4"], "finetune", nodes=2)
    flat, half = json.loads(files["openfold.json"]), json.loads(files["deepspeed_config.json"])
    assert flat["data.train.crop_size"] == 384
    assert flat["globals.blocks_per_ckpt"] == 1
    assert flat["globals.chunk_size"] is None
    assert shlex.split(files["openfold.args"]) == shlex.split(
        "--config_preset finetuning --experiment_config_json openfold.json --precision bf16-mixed "
        "--num_nodes 2 --gpus 2 --seed 42 --deepspeed_config_path deepspeed_config.json"
    )
    assert "gradient_accumulation_steps" not in half  # Lightning refuses to find it
    assert half["gradient_clipping"] == 0.0
    assert "DeepSpeed's file does not clip gradients" in files["README.md"]
    assert "No file here clips gradients" in exported(Plan(), "finetune")["README.md"]
    assert half["bf16"]["enabled"]
    assert half["zero_optimization"]["stage"] == 2
    readme = files["README.md"]
    for said in (
        "moving average",
        "ZeRO stage 2",
        "CUDA_VISIBLE_DEVICES",
        "132 for",
    ):
        assert said in readme
    plain = json.loads(exported(PLANS["plain"])["openfold.json"])
    assert plain["globals.blocks_per_ckpt"] is None
    assert plain["model.extra_msa.extra_msa_stack.ckpt"] is False


@pytest.mark.parametrize(
    ("given", "more", "said"),
    [
        (plan(chunking={}), {}, "chunks only in inference"),
        (plan(gradient_accumulation={}), {}, "does not reach its Trainer"),
        (plan(bf16_parameters={"rounding": "stochastic"}), {}, "rounding must be"),
        (plan(2, zero={"precision": "bf16"}), {}, "has no float32 islands"),
        (plan(2, fsdp2={}), {}, "fsdp2: not supported"),
        (plan(2, ddp={}), {}, "bucket_view must be false"),
        (plan(2, zero={"stage": 3}), {}, "stage must be 1 or 2"),
        (plan(activation_checkpointing={"every": 2}), {}, "every must be 1"),
        (plan(), {"size": "tiny"}, "at --size initial"),
        (plan(), {"size": None}, "at --size initial"),
        (plan(), {"job": "weather"}, "network is that of alphafold2"),
    ],
)
def test_plans_that_openfold_cannot_run_are_refused(given: Plan, more: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        exported(given, **more)


def test_openfolds_published_command_and_deepspeed_file_are_read_as_a_plan(tmp_path: Path) -> None:
    """The command is that of docs/source/Training_OpenFold.md."""
    words = "--gpus 4 --num_nodes 1 --precision bf16-mixed --deepspeed_config_path deepspeed_config.json"
    found = asked(
        tmp_path, ("train.sh", TRAIN.format("finetuning", words)), ("deepspeed_config.json", json.dumps(OWN))
    )
    assert found.plan == PLANS["half-4"]
    assert (found.engine, found.size, found.plan.ranks, found.batch) == ("deepspeed", "finetune", 4, 4)
    assert {left.option for left in found.left_out} == {
        "zero_optimization.stage 2",
        "offload_optimizer",
        "ema.decay",
    }


def test_missing_options_have_the_defaults_of_openfolds_training_script(tmp_path: Path) -> None:
    found = asked(
        tmp_path,
        (
            "train.sh",
            "python3 train_openfold.py a b c d 2021-10-10 --max_epochs 1 --config_preset initial_training\n",
        ),
    )
    assert found.plan == plan(bf16_autocast={}, activation_checkpointing={})  # --precision is bf16
    assert (found.engine, found.size, found.micro_batch) == ("native", "initial", 1)


@pytest.mark.parametrize(
    ("flat", "option"),
    [
        ({"globals.use_deepspeed_evo_attention": True}, "use_deepspeed_evo_attention"),
        ({"globals.blocks_per_ckpt": 2}, "blocks_per_ckpt 2"),
        ({"globals.blocks_per_ckpt": None}, "model.extra_msa.extra_msa_stack.ckpt"),
        ({"model.extra_msa.extra_msa_stack.ckpt": False}, "model.extra_msa.extra_msa_stack.ckpt false"),
        ({"model.template.average_templates": True}, "model.template.average_templates"),
        ({"data.train.max_msa_clusters": 200}, "max_msa_clusters 200"),
        ({"model.template.enabled": False}, "model.template.enabled false"),
    ],
)
def test_settings_that_no_plan_expresses_are_listed_as_left_out(
    tmp_path: Path, flat: dict[str, Any], option: str
) -> None:
    found = asked(tmp_path, ("changes.json", json.dumps(flat)))
    assert option in {left.option for left in found.left_out}


def test_precisions_without_deepspeed_are_read_as_techniques(tmp_path: Path) -> None:
    for given, name, left in (
        ("32", None, 0),
        ("16-mixed", "bf16-autocast", 1),
        ("bf16-true", "bf16-parameters", 1),
    ):
        found = asked(tmp_path, ("train.sh", TRAIN.format("initial_training", f"--precision {given}")))
        assert {u.technique for u in found.plan.uses} - {"activation-checkpointing"} == (
            {name} if name else set()
        )
        assert len([o for o in found.left_out if o.option.startswith("precision")]) == left


def test_an_unsupported_network_and_a_missing_file_are_listed_as_left_out(tmp_path: Path) -> None:
    words = TRAIN.format("model_1_multimer_v3", "--experiment_config_json gone.json")
    found = asked(tmp_path, ("train.sh", words))
    assert found.size == ""
    assert {"config_preset model_1_multimer_v3", "the file gone.json"} <= {o.option for o in found.left_out}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"globals": {"chunk_size": 4}}', "nested"),
        ('{"globals.chunk_size": 4, "globals.chunk_size.x": 1}', "or keys below it"),
        ('{"globals.chunk_size.x": 1, "globals.chunk_size": 4}', "or keys below it"),
        ('{"crop_size": 4}', "not a configuration that memfit can read"),
        ('{"globals.blocks_per_ckpt": "two"}', 'blocks_per_ckpt to "two"'),
        ('{"data.train.crop_size": null}', "crop_size to null"),
    ],
)
def test_bad_configuration_changes_are_refused_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, said: str
) -> None:
    (tmp_path / "a.json").write_text(text)
    assert main(["lint", str(tmp_path / "a.json")]) == 2
    told = capsys.readouterr().err
    assert said in told
    assert len(told.strip().splitlines()) == 1


@pytest.mark.parametrize("reverse", [False, True])
def test_a_key_below_another_is_set_after_it_wherever_it_stands(tmp_path: Path, reverse: bool) -> None:
    """As by ml_collections' update_from_flattened_dict."""
    changes = {"globals": {"chunk_size": 4, "eps": 0.1}, "globals.eps": 0.2}
    (tmp_path / "a.json").write_text(json.dumps(dict(sorted(changes.items(), reverse=reverse))))
    options = read([tmp_path / "a.json"]).openfold_config
    assert options is not None
    assert options.data == {"globals": {"chunk_size": 4, "eps": 0.2}}


def test_export_and_plan_accept_openfold_settings_for_alphafold2_only(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("p.yaml").write_text("techniques: {bf16-autocast: {}, activation-checkpointing: {}}\n")
    words = [
        "export",
        "alphafold2",
        "--size",
        "finetune",
        "--plan",
        "p.yaml",
        "--to",
        "openfold",
        "--out",
        "out",
    ]
    assert main(words) == 0
    assert main(["plan", "protein-ss", "--from", "out/openfold.args"]) == 2
    assert "memfit plan alphafold2" in capsys.readouterr().err
    assert main([*words[:1], *words[4:], "--force"]) == 2  # the tiny protein-ss
