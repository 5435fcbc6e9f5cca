"""Lengths and batches: every answer names its workload, and configurations set model, length and batch."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import nn

import memfit
from memfit import catalog
from memfit.cli import app
from memfit.cli.views import search_view
from memfit.jobs.registry import load
from memfit.lint import parse, to_plan
from memfit.planner.request import with_needs
from memfit.planner.workload import workload_of
from memfit.report.terminal import print_search
from memfit.report.words import load_words
from memfit.report.workload_text import workload_text
from memfit.types import serialization
from memfit.types.errors import NothingFits, UserError
from memfit.types.job import JobRef
from memfit.types.plan import EffectClass, Plan
from memfit.types.result import Choice, Estimate, Interval, SearchResult
from memfit.types.workload import Workload
from memfit.workflows import proof_of_concept

OWN_JOB = """
import torch
from torch import nn
from memfit import Job


def job(length=8, batch=2):
    return Job(
        name="own", build_model=lambda: nn.Linear(4, 4), batch_size=batch,
        make_batch=lambda step, seed: torch.zeros(batch, length, 4), loss=lambda model, x: model(x).mean(),
    )


finished = job()
"""
LLAMA = (
    "hf:llama?num_hidden_layers=2&hidden_size=64&intermediate_size=128&num_attention_heads=4&vocab_size=256"
)


@pytest.fixture
def own(tmp_path: Path) -> str:
    (tmp_path / "own.py").write_text(OWN_JOB)
    return f"{tmp_path}/own.py"


# --- --length and --batch of every kind of job


def test_every_kind_of_job_takes_a_length_and_a_batch(own: str) -> None:
    for spec in ("protein-ss", "protein-lm", "char-lm", "genome", LLAMA, f"{own}:job"):
        workload = workload_of(load(JobRef(spec=spec, length=64, batch=3)))
        assert (workload.batch_size, workload.length or workload.sample_shape[0]) == (3, 64), spec
        assert workload.assumed == ()


def test_a_job_object_refuses_a_length_and_suggests_a_function(own: str) -> None:
    with pytest.raises(
        UserError, match="is a Job, not a function, and does not accept --length; make finished a function"
    ):
        load(JobRef(spec=f"{own}:finished", length=64))


@pytest.mark.parametrize("spec", ["weather", "segmentation3d", "potential"])
def test_a_job_without_lengths_refuses_one(spec: str) -> None:
    with pytest.raises(UserError, match=f"{spec} does not accept --length: .*; leave out --length"):
        load(JobRef(spec=spec, length=64))


def test_a_hugging_face_job_names_the_batch_and_length_it_assumed() -> None:
    assert load(JobRef(spec=LLAMA)).assumed == ("batch", "length")
    assert load(JobRef(spec=LLAMA, size="paper", batch=8)).assumed == ("length",)
    text = workload_text(workload_of(load(JobRef(spec=LLAMA)), "H100-SXM"))
    assert text.endswith(
        "batch 4 × 128 tokens, on H100-SXM (batch and length assumed; set --batch, --length)"
    )


def test_a_hugging_face_job_takes_more_than_2048_tokens() -> None:
    job = load(JobRef(spec=LLAMA, size="paper", length=8192, batch=1))
    assert job.make_batch(0, 0)["input_ids"].shape == (1, 8192)


@pytest.mark.parametrize(
    ("model", "most"), [("gpt2", 1024), ("bert", 512), ("roberta", 510), ("opt", 2048), ("gptj", 2048)]
)
def test_no_model_is_given_more_tokens_than_it_has_positions(model: str, most: int) -> None:
    few = f"hf:{model}?num_hidden_layers=1"
    assert load(JobRef(spec=few, length=most)).tokens_per_batch == 4 * most
    with pytest.raises(
        UserError,
        match=f"length {most + 1} of .* is out of range; allowed: 1 to {most} tokens, as many",
    ):
        load(JobRef(spec=few, length=most + 1))
    assert load(JobRef(spec=few, size="paper")).tokens_per_batch <= 4 * most


def test_a_model_with_rotary_positions_takes_a_very_long_sequence() -> None:
    assert load(JobRef(spec=LLAMA, length=100_000, batch=1)).tokens_per_batch == 100_000


def test_an_unknown_setting_of_a_model_gets_a_suggestion() -> None:
    with pytest.raises(UserError, match=r"the setting 'hiden_size', which .*; did you mean 'hidden_size'\?"):
        load(JobRef(spec="hf:llama?hiden_size=64"))


def test_a_value_that_a_model_refuses_is_an_error_of_one_line() -> None:
    with pytest.raises(UserError, match=r"hf:gpt2\?n_layer=x is refused by the configuration of gpt2: .*int"):
        load(JobRef(spec="hf:gpt2?n_layer=x"))
    with pytest.raises(UserError, match=r"cannot build a model with .* GPT2Config: ZeroDivisionError: .*"):
        load(JobRef(spec="hf:gpt2?n_head=0")).build_model()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("plan protein-lm --length 0", "--length"),
        ("plan protein-lm --length 5", "length 5 of protein-lm is out of range; allowed: 16 to 262144"),
        ("plan weather --length 5", "the job weather does not accept --length"),
        (
            "plan protein-lm --size tiny@64 --length 128",
            "--size tiny@64 and --length 128 state different lengths; allowed: the length in only one",
        ),
        (
            "plan hf:gpt2 --length 999999",
            "length 999999 of hf:gpt2 is out of range; allowed: 1 to 1024 tokens, as many as the model has",
        ),
        ("run protein-lm --length many", "--length"),
    ],
)
def test_a_wrong_length_is_refused_in_one_line(
    arguments: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert app.main(arguments.split()) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1
    assert message in error[0]


# --- every answer begins with model, parameters, batch x length, device


def _answer(arguments: str, capsys: pytest.CaptureFixture[str]) -> str:
    assert app.main(arguments.split()) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("option", ["", " --engines"])
def test_an_estimate_and_a_comparison_of_engines_begin_with_the_workload(
    option: str, own: str, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = f"estimate {own}:job --batch 6 --length 16 --on H100-SXM{option}"
    assert _answer(asked, capsys).splitlines()[0] == "own: 20 parameters, batch 6 × 16 × 4, on H100-SXM"
    told = json.loads(_answer(f"{asked} --json", capsys))
    assert next(iter(told)) == "workload"
    assert told["workload"]["parameter_count"] == 20
    assert told["workload"]["batch_size"] == 6


def test_run_begins_with_the_workload(
    own: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def nothing(*request: Any, **options: Any) -> Any:
        raise UserError("stopped here")

    monkeypatch.setattr(proof_of_concept, "run_plan", nothing)
    assert app.main(["run", f"{own}:job", "--batch", "6", "--length", "16"]) == 2
    assert capsys.readouterr().out == "own: 20 parameters, batch 6 × 16 × 4, on this machine\n"


def test_plan_begins_with_the_workload_even_where_nothing_fits(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def nothing(*request: Any, **options: Any) -> Any:
        raise NothingFits(cap_bytes=1, least_bytes=2, plan_text="plain")

    monkeypatch.setattr("memfit.workflows.plan.find_plan", nothing)
    assert app.main(["plan", "protein-lm", "--batch", "2", "--length", "16", "--on", "H100-SXM"]) == 3
    first = "protein-lm: 814 k parameters, batch 2 × 16 residues, on H100-SXM"
    assert capsys.readouterr().out.startswith(first)


def test_an_estimate_begins_with_the_workload() -> None:
    model = nn.Sequential(nn.Linear(64, 512), nn.ReLU(), nn.Linear(512, 10))
    batch = (torch.zeros(8, 64), torch.zeros(8, dtype=torch.long))
    found: Any = memfit.estimate(model, batch, loss=nn.functional.cross_entropy, machine="H100-SXM")
    about = "Sequential: 38.4 k parameters, batch 8 × 64, on H100-SXM"
    assert str(found).startswith(f"{about}; plain: allocated ")
    assert found.explain().startswith(about)
    assert about in found._repr_html_()


def test_token_batches_have_a_length_and_other_batches_a_sample_shape() -> None:
    def workload(batch: torch.Tensor) -> Workload:
        return workload_of(
            memfit.Job(
                name="x",
                build_model=lambda: nn.Linear(1, 1),
                make_batch=lambda step, seed: batch,
                loss=lambda model, part: part.sum(),
                batch_size=len(batch),
            )
        )

    assert workload(torch.zeros(2, 32, dtype=torch.long)).length == 32
    assert workload(torch.zeros(2, 3, 8, 8)).sample_shape == (3, 8, 8)
    assert workload(torch.zeros(2)).sample_shape == ()


def test_the_workload_line_is_translated_to_japanese() -> None:
    job = load(JobRef(spec=LLAMA, length=64))
    text = workload_text(workload_of(job, "H100-SXM"), load_words("ja"))
    assert text.endswith("、バッチ 4 × 64 トークン、H100-SXM 上（バッチは仮定。--batch で変更可）")


# --- model, length, batch and micro-batch of a configuration


def _carried(tmp_path: Path, name: str, text: str) -> Any:
    (tmp_path / name).write_text(text)
    return to_plan.convert(parse.read([tmp_path / name]))


TITAN = """
[model]
name = "{name}"
flavor = "{flavor}"
[training]
local_batch_size = 2
seq_len = 8192
[optimizer]
name = "AdamW"
"""
MEGATRON = (
    "pretrain_gpt.py --num-layers 2 --hidden-size 64 --num-attention-heads 4 --seq-length 32 --bf16 "
    "--vocab-size 1000 --micro-batch-size 2 --global-batch-size 8 --tensor-model-parallel-size 1 "
)
ROTARY = "--position-embedding-type rope "
LLAMA_LIKE = (
    f"{ROTARY}--swiglu --normalization RMSNorm --disable-bias-linear --group-query-attention "
    "--num-query-groups 2 --untie-embeddings-and-output-weights"
)
TABLE = 1024 * 64  # of tokens, padded to 128
GPT_BLOCK = 4 * (64 * 64 + 64) + (64 * 256 + 256) + (256 * 64 + 64) + 2 * 2 * 64
LLAMA_BLOCK = 2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128 + 2 * 64


@pytest.mark.parametrize(
    ("name", "flavor", "parameter_count"),
    [("llama3", "8B", 8_030_261_248), ("llama3", "70B", 70_553_706_496), ("qwen3", "0.6B", 596_049_920)],
)
def test_a_torchtitan_flavor_has_its_published_number_of_parameters(
    name: str, flavor: str, parameter_count: int, tmp_path: Path
) -> None:
    carried = _carried(tmp_path, "titan.toml", TITAN.format(name=name, flavor=flavor))
    job = load(JobRef(spec=carried.model.job, length=carried.length, batch=carried.batch))
    assert workload_of(job).parameter_count == parameter_count
    assert (workload_of(job).length, carried.micro_batch) == (8192, 2)


def test_an_unknown_torchtitan_flavor_is_named(tmp_path: Path) -> None:
    model = _carried(tmp_path, "titan.toml", TITAN.format(name="deepseek_v3", flavor="16B")).model
    assert model.job == ""
    assert model.missing == "memfit does not know the sizes of torchtitan's deepseek_v3 16B"


@pytest.mark.parametrize(
    ("arguments", "kind", "parameter_count"),
    [
        ("", "biogpt", TABLE + (32 + 2) * 64 + 2 * GPT_BLOCK + 2 * 64),
        (ROTARY, "gpt_neox", TABLE + 2 * GPT_BLOCK + 2 * 64),
        (LLAMA_LIKE, "llama", 2 * TABLE + 2 * LLAMA_BLOCK + 64),
    ],
)
def test_a_megatron_scripts_model_is_built_from_its_own_sizes(
    arguments: str, kind: str, parameter_count: int, tmp_path: Path
) -> None:
    carried = _carried(tmp_path, "train.sh", MEGATRON + arguments)
    assert carried.model.job.startswith(f"hf:{kind}?")
    job = load(JobRef(spec=carried.model.job, length=carried.length, batch=carried.batch))
    assert workload_of(job).parameter_count == parameter_count
    assert (job.batch_size, job.tokens_per_batch) == (8, 8 * 32)


@pytest.mark.parametrize("more", ["--num-experts 8", "--position-embedding-type none", "--swiglu"])
def test_a_megatron_model_that_memfit_cannot_build_is_reported(more: str, tmp_path: Path) -> None:
    model = _carried(tmp_path, "train.sh", MEGATRON + more).model
    assert (model.layers, model.width, model.job) == (2, 64, "")
    assert model.missing.startswith(
        ("memfit cannot build a model with ", "memfit has no model with this mix")
    )


def _planned(
    tmp_path: Path,
    text: str,
    arguments: str,
    capsys: pytest.CaptureFixture[str],
    name: str = "train.sh",
    code: int = 0,
) -> Any:
    (tmp_path / name).write_text(text)
    words = ["plan", *arguments.split(), "--from", str(tmp_path / name), "--on", "2xH100-SXM", "--json"]
    assert app.main(words) == code
    return json.loads(capsys.readouterr().out)


def test_without_a_job_the_scripts_own_model_is_predicted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told = _planned(tmp_path, MEGATRON, "", capsys)
    about = told["workload"]
    assert about["model"] == "hf:biogpt (2 layers of width 64)"
    assert (about["batch_size"], about["length"], about["assumed"]) == (8, 32, [])
    assert (told["batch"], told["length"], told["micro_batch"]) == (8, 32, 2)


def test_a_job_that_differs_from_the_script_is_reported_as_left_out(
    tmp_path: Path, own: str, capsys: pytest.CaptureFixture[str]
) -> None:
    told = _planned(tmp_path, MEGATRON, f"{own}:job", capsys)
    left = {one["option"]: one["reason"] for one in told["left_out"]}
    assert (
        left["2 layers of width 64"]
        == f"{own}:job has no blocks of width unknown; the job's own sizes are predicted"
    )
    assert told["workload"]["sample_shape"] == [32, 4]  # its length is the script's


@pytest.mark.parametrize(
    ("more", "missing"),
    [
        ("--num-experts 8 --moe-router-topk 2", "a model with experts"),
        ("--multi-latent-attention", "a model with multi-latent attention"),
        ("--group-query-attention --num-query-groups 1", "no model with this mix"),
    ],
)
def test_a_model_that_no_job_builds_is_refused(
    more: str, missing: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It used to be answered for the default job."""
    (tmp_path / "train.sh").write_text(f"{MEGATRON.rstrip()} {more}\n")
    assert app.main(["plan", "--from", str(tmp_path / "train.sh"), "--on", "2xH100-SXM"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert missing in lines[0]
    assert "memfit plan JOB --from" in lines[0]


def test_options_of_the_scripts_model_are_left_out_with_another_job(
    tmp_path: Path, own: str, capsys: pytest.CaptureFixture[str]
) -> None:
    script = f"{MEGATRON.rstrip()} --attention-dropout 0.1 --vocab-size 500\n"
    told = _planned(tmp_path, script, f"{own}:job", capsys)
    left = {one["option"]: one["reason"] for one in told["left_out"]}
    named = next(option for option in left if "--attention-dropout" in option)
    assert "--vocab-size" in named
    assert left[named] == f"those of {own}:job are predicted"


@pytest.mark.parametrize("setting", ["prescale_gradients", "disable_allgather"])
def test_settings_of_deepspeed_that_change_the_reduction_are_left_out(
    setting: str, tmp_path: Path, own: str, capsys: pytest.CaptureFixture[str]
) -> None:
    zero = '{"train_micro_batch_size_per_gpu": 4, "zero_optimization": {"stage": 0}, "%s": true}'
    told = _planned(tmp_path, zero % setting, f"{own}:job", capsys, "zero.json")
    assert setting in {one["option"] for one in told["left_out"]}


def test_a_length_and_batch_that_the_job_cannot_take_are_listed_as_left_out(
    tmp_path: Path, own: str, capsys: pytest.CaptureFixture[str]
) -> None:
    script = MEGATRON.replace("--micro-batch-size 2 --global-batch-size 8", "--micro-batch-size 1")
    told = _planned(tmp_path, script, f"{own}:finished", capsys)
    left = {one["option"]: one["reason"] for one in told["left_out"]}
    assert "does not accept --length" in left["length 32"]
    assert "does not accept --batch" in left["batch 2"]
    assert told["batch"] == 2, "the batch that is used"


def test_a_batch_on_the_command_line_replaces_the_one_of_the_configuration(
    tmp_path: Path, own: str, capsys: pytest.CaptureFixture[str]
) -> None:
    zero = '{"train_batch_size": 256, "train_micro_batch_size_per_gpu": 8, "zero_optimization": {"stage": 2}}'
    told = _planned(tmp_path, zero, f"{own}:job --batch 128", capsys, "zero.json")
    assert (told["workload"]["batch_size"], told["batch"], told["micro_batch"]) == (128, 128, 4)
    assert {"option": "batch 256", "reason": "--batch 128 was given"} in told["left_out"]


@pytest.mark.parametrize(
    ("setting", "clip"), [("", 1.0), (', "gradient_clipping": 0.5', 0.5), (', "gradient_clipping": 0', None)]
)
def test_gradients_are_clipped_in_the_prediction_as_the_files_clip_them(
    setting: str, clip: float | None, tmp_path: Path, own: str, capsys: pytest.CaptureFixture[str]
) -> None:
    zero = '{"train_micro_batch_size_per_gpu": 4, "zero_optimization": {"stage": 2}' + setting + "}"
    assert _planned(tmp_path, zero, f"{own}:job", capsys, "zero.json")["clip"] == clip


def test_a_better_plan_for_a_configuration_says_that_its_search_was_cut_off(
    tmp_path: Path, own: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "zero.json").write_text('{"train_micro_batch_size_per_gpu": 2}')
    words = [
        "plan",
        f"{own}:job",
        "--from",
        str(tmp_path / "zero.json"),
        "--on",
        "H100-SXM",
        "--within",
        "0.01",
    ]
    assert app.main(words) == 0
    assert "ended the search" in " ".join(capsys.readouterr().out.split())
    assert app.main([*words, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["extent"]["time_up"] is True


def test_without_a_model_in_the_files_the_predicted_job_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    zero = '{"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 0}}'
    told = _planned(tmp_path, zero, "", capsys, "zero.json")
    assert {"option": "the model", "reason": "no file describes it: predicted for protein-ss"} in told[
        "left_out"
    ]


# --- the bytes that decide are the bytes that are shown


def _search(needed_bytes: int, fits: bool, device: bool = True) -> SearchResult:
    """A search whose plain training has 74.85 GiB of tensors on a device of 79.18 GiB."""
    gib = 2**30
    peak = 74.85 * gib
    estimate = Estimate(
        plan=Plan(),
        allocated_bytes=Interval(value=peak, low=peak, high=peak),
        phase_peak_bytes={},
        at_peak_bytes={},
        by_module_bytes={},
        step_s=None,
        flops_per_step=1,
        device_bytes=Interval(value=78 * gib, low=77 * gib, high=81.5 * gib) if device else None,
    )
    choice = Choice(estimate=estimate, fits=fits, effect=EffectClass.E0, needed_bytes=needed_bytes)
    return SearchResult(
        goal="fastest",
        cap_bytes=int(79.18 * gib),
        considered=1,
        baseline=choice,
        frontier=(choice,),
        recommended=None,
        smallest=choice,
    )


def _printed(result: SearchResult, lang: str) -> str:
    text = io.StringIO()
    print_search(result, console=Console(file=text, width=300), lang=lang)
    return text.getvalue()


def test_plain_training_is_shown_with_the_deciding_bytes_and_their_range() -> None:
    planned = with_needs(_search(0, fits=False), catalog.machine("H100-SXM"))
    assert planned.baseline.needed_bytes == planned.smallest.needed_bytes == int(81.5 * 2**30)
    assert planned.frontier[0].needed_bytes == int(81.5 * 2**30)
    assert (
        "needs up to 81.5 GiB on the device (78 GiB expected, 77 GiB to 81.5 GiB; 74.85 GiB of tensors)"
        in _printed(planned, "en")
    )
    assert "The smallest needs 81.5 GiB" in _printed(planned, "en")
    assert "最大 81.5 GiB（見込み 78 GiB、範囲 77 GiB ～ 81.5 GiB、うちテンソル 74.85 GiB）" in _printed(
        planned, "ja"
    )


def test_on_a_cpu_the_needed_bytes_are_shown_with_the_share_of_tensors() -> None:
    gib = 2**30
    text = _printed(_search(int(79.5 * gib), fits=False, device=False), "en")
    assert "Plain training: needs 79.5 GiB (74.85 GiB of tensors)" in text


def test_json_and_records_contain_the_deciding_bytes() -> None:
    planned = with_needs(_search(0, fits=False), catalog.machine("H100-SXM"))
    assert search_view(planned)["baseline"]["needed_bytes"] == int(81.5 * 2**30)
    again = serialization.loads(SearchResult, serialization.dumps(planned), what="a search")
    assert again.baseline.needed_bytes == int(81.5 * 2**30)


def test_a_plan_from_a_file_fits_by_the_needed_bytes_it_reports(
    tmp_path: Path, own: str, capsys: pytest.CaptureFixture[str]
) -> None:
    zero = '{"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 0}}'
    told = _planned(tmp_path, zero, f"{own}:job --memory 1GiB", capsys, "zero.json", code=3)
    assert told["cap_bytes"] == 2**30
    assert told["needed_bytes"] == int(told["given"]["device_bytes"]["high"])
    assert told["fits"] == (told["needed_bytes"] <= told["cap_bytes"])


# --- names of devices


@pytest.mark.parametrize(
    ("name", "variants"),
    [
        ("H100", "H100-SXM, H100-PCIe, H100-NVL or H100-96GB-HBM2e"),
        ("8xA100", "A100-40GB-SXM, A100-80GB-SXM, A100-40GB-PCIe or A100-80GB-PCIe"),
    ],
)
def test_an_ambiguous_device_is_refused_with_its_variants(name: str, variants: str) -> None:
    with pytest.raises(UserError) as error:
        catalog.machine(name)
    assert f"unknown device: '{name.removeprefix('8x')}' is not" in str(error.value)
    assert f"; did you mean {variants}?" in str(error.value)


def test_a_device_is_known_in_lower_case_without_dashes() -> None:
    assert catalog.machine("rtx4090").device.name == "RTX-4090"
