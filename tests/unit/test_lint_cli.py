"""`memfit lint FILE...` and `memfit plan JOB --from FILE`, as a person or a script meets them."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import report_fixture as fixture
from tiny import regression

import memfit.workflows.config_review
from memfit.cli import main
from memfit.types.errors import NothingFits

BAD = '{"train_micro_batch_size_per_gpu": 4, "fp16": {"enabled": true}, "bf16": {"enabled": true}}'
OFFLOADED = '{"stage": 2, "offload_param": {"device": "cpu"}}'
USELESS = f'{{"train_micro_batch_size_per_gpu": 4, "zero_optimization": {OFFLOADED}}}'
CLEAN = '{"train_micro_batch_size_per_gpu": 4, "zero_optimization": {"stage": 2, "reduce_bucket_size": 400}}'
JOB = """
import sys
sys.path.insert(0, {folder!r})
from tiny import regression, words
job = regression()
language = words()
"""
TWO = ("--on", "2xH100-SXM")

Ask = Callable[..., tuple[int, str, str]]


@pytest.fixture
def ask(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Ask:
    """Run a command line in a folder with a job and files; exit code, standard output, standard error."""
    for name, text in (("bad", BAD), ("useless", USELESS), ("clean", CLEAN)):
        (tmp_path / f"{name}.json").write_text(text)
    (tmp_path / "own.py").write_text(JOB.format(folder=str(Path(__file__).parent)))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "300")

    def run(*words: str) -> tuple[int, str, str]:
        code = main(words)
        return code, *capsys.readouterr()

    return run


def test_lint_skips_memfits_own_files_of_an_export(ask: Ask, tmp_path: Path) -> None:
    """Every file of an export may be named; those of memfit itself and Python files are skipped."""
    folder = tmp_path / "job"
    folder.mkdir()
    for name in ("export.json", "run.json", "plan.yaml", "README.md", "train.py"):
        (folder / name).write_text("{}")
    (folder / "deepspeed.json").write_text(CLEAN)
    code, out, _ = ask("lint", *map(str, sorted(folder.iterdir())), "--json")
    assert code == 0
    assert json.loads(out)["files"] == [str(folder / "deepspeed.json")]
    assert ask("lint", str(folder / "export.json"))[0] == 2  # it configures no library


def test_lint_exits_with_code_1_for_errors_and_0_for_other_findings(ask: Ask) -> None:
    code, out, err = ask("lint", "bad.json")
    assert (code, err) == (1, "")
    assert "error bad.json: fp16.enabled and bf16.enabled are both true" in out
    assert "[deepspeed-two-precisions]" in out
    assert "https://" in out
    code, out, _ = ask("lint", "useless.json")
    assert code == 0
    assert "warning useless.json" in out
    assert ask("lint", "clean.json") == (0, "No known problem was found.\n", "")


def test_lint_findings_are_available_as_one_json_object_and_in_japanese(ask: Ask) -> None:
    code, out, _ = ask("lint", "bad.json", "--json")
    told = json.loads(out)
    assert (code, told["files"]) == (1, ["bad.json"])
    (finding,) = told["findings"]
    assert set(finding) == {"rule", "severity", "file", "says", "do", "links"}
    assert finding["severity"] == "error"
    assert "両方が true" in ask("lint", "bad.json", "--lang", "ja")[1]


def test_lint_refuses_unknown_missing_or_duplicate_files_in_one_line(ask: Ask, tmp_path: Path) -> None:
    (tmp_path / "other.json").write_text('{"name": 1}')
    for words in (("lint", "other.json"), ("lint", "gone.json"), ("lint", "bad.json", "clean.json")):
        code, out, err = ask(*words)
        assert (code, out) == (2, "")
        assert len(err.strip().splitlines()) == 1


def test_lint_loads_no_torch(ask: Ask) -> None:
    code = (
        "import sys; from memfit.cli import main; main(['lint', 'bad.json', '--json'])\n"
        "print([m for m in ('torch', 'transformers', 'deepspeed') if m in sys.modules], file=sys.stderr)"
    )
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stderr
        == "[]\n"
    )


def test_plan_from_a_two_rank_configuration_lists_plans_that_need_less_memory(ask: Ask) -> None:
    code, out, _ = ask("plan", "own.py:job", "--from", "useless.json", *TWO, "--json", "--save", "plan.yaml")
    told = json.loads(out)
    assert code == 0
    own = told["workload"]["batch_size"] // 2
    assert (told["engine"], told["fits"], told["micro_batch"], told["batch"]) == (
        "deepspeed",
        True,
        own,
        2 * own,
    )
    assert {f["rule"] for f in told["findings"]} == {"deepspeed-offload-parameters", "deepspeed-bucket"}
    # the job has its own batch
    assert [left["option"] for left in told["left_out"]] == ["batch 8", "4 samples per micro-batch"]
    peaks = [e["allocated_bytes"]["value"] for e in told["better"]]
    assert peaks == sorted(peaks)
    assert peaks[0] < told["given"]["allocated_bytes"]["value"] - 2**30  # without the bucket
    assert told["recommended"] is told["nothing_fits"] is None
    assert "stage: 2" in Path("plan.yaml").read_text()
    assert ask("plan", "own.py:job", "--from", "useless.json", *TWO, "--save", "plan.yaml")[0] == 2


def test_plan_from_flags_of_mace_predicts_their_average_of_weights(ask: Ask, tmp_path: Path) -> None:
    flags = "--train_file a.xyz --distributed --ema --ema_decay 0.9 --batch_size 4 --clip_grad 2 --max_L 1"
    (tmp_path / "run.sh").write_text(f"torchrun --nproc_per_node 2 mace/cli/run_train.py {flags}\n")
    code, out, _ = ask("plan", "own.py:job", "--from", "run.sh", *TWO, "--json")
    told = json.loads(out)
    assert code == 0
    assert (told["ema"], told["clip"], "on 2 ranks" in told["given"]["label"]) == (0.9, 2.0, True)
    assert {"ema", "ema_decay", "clip_grad", "distributed"} <= set(told["carried"])
    assert "max_L" in {option for left in told["left_out"] for option in left["option"].split(", ")}
    assert told["given"]["at_peak_bytes"]["ema"] > 0


def test_plan_from_a_one_rank_configuration_also_shows_the_recommended_plan(
    ask: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    def search(request: Any, progress: Any) -> Any:
        asked.append(request)
        return SimpleNamespace(result=fixture.full_poc().search)

    monkeypatch.setattr(memfit.workflows.config_review, "search", search)
    code, out, _ = ask("plan", "own.py:job", "--from", "clean.json", "--lang", "ja")
    assert code == 0
    assert "zero(" in out
    recommended = fixture.full_poc().search.recommended
    assert recommended is not None
    assert recommended.estimate.plan.label in out
    assert asked[0].cap_bytes > 0  # on a CPU: as much as the given plan asks for
    assert "反映されないもの：バッチ 4（" in out


def test_plan_from_a_configuration_that_trains_adapters_shows_only_plans_that_train_them(
    ask: Ask, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def search(request: Any, progress: Any) -> Any:
        raise AssertionError("by default a search has no adapters")

    monkeypatch.setattr(memfit.workflows.config_review, "search", search)
    options = (
        "stage: sft",
        "finetuning_type: lora",
        "lora_target: all",
        "disable_gradient_checkpointing: true",
    )
    (tmp_path / "adapters.yaml").write_text("\n".join(options))
    code, out, _ = ask(
        "plan", "own.py:language", "--from", "adapters.yaml", "--on", "H100-SXM", "--memory", "8GiB", "--json"
    )
    answer = json.loads(out)
    assert (code, answer["fits"], answer["nothing_fits"], answer["recommended"]) == (0, True, None, None)
    assert all("lora" in e["label"] for e in (answer["given"], *answer["better"]))


@pytest.mark.parametrize(
    ("file", "words", "engine", "reason"),
    [
        ("clean.json", (), "deepspeed", None),
        ("clean.json", ("--engine", "native"), "native", "--engine native was given"),
        (
            "half.json",
            (),
            "native",
            "bf16-parameters is not supported by deepspeed; predicted with PyTorch's own features",
        ),
    ],
)
def test_plan_from_a_configuration_predicts_with_its_engine(
    ask: Ask,
    monkeypatch: pytest.MonkeyPatch,
    file: str,
    words: tuple[str, ...],
    engine: str,
    reason: str | None,
) -> None:
    asked: list[Any] = []

    def search(request: Any, progress: Any) -> Any:
        asked.append(request.engine)
        return SimpleNamespace(result=fixture.full_poc().search)

    monkeypatch.setattr(memfit.workflows.config_review, "search", search)
    Path("half.json").write_text('{"train_micro_batch_size_per_gpu": 4, "bf16": {"enabled": true}}')
    code, out, _ = ask("plan", "own.py:job", "--from", file, *words, "--json")
    assert (code, asked) == (0, [engine])
    reasons = [left["reason"] for left in json.loads(out)["left_out"] if left["option"] == "engine deepspeed"]
    assert len(reasons) == (reason is not None)
    assert all(str(reason) in text for text in reasons)


HOST = ("plan", "own.py:job", "--from", "useless.json", *TWO, "--host-memory", "4GiB")


def test_plan_from_names_the_host_if_only_the_host_is_too_small(ask: Ask) -> None:
    """A reported case: the device's sizes were given as the reason, beside a chance of 0.000000000 %."""
    code, out, _ = ask(*HOST)
    assert code == 3
    assert "It does not fit: the host has 4 GiB, and it needs up to 10" in out
    assert "The device would be enough" in out
    assert "Chance that it does not fit: 8" in out
    assert "--host-memory" not in out  # it was given
    assert "(does not fit)" in out  # each better plan needs the same host
    told = json.loads(ask(*HOST, "--json")[1])
    assert told["fits"] is False
    assert told["given"]["oom_probability"] > 0.8
    code, out, _ = ask(*HOST, "--lang", "ja")
    assert (code, "収まりません。ホストのメモリーが最大 10" in out) == (3, True)


def test_plan_from_says_that_a_small_chance_is_small(ask: Ask) -> None:
    words = ("plan", "own.py:job", "--from", "useless.json", *TWO)
    code, out, _ = ask(*words)
    assert code == 0
    assert "Chance that it does not fit: less than 0.1 %" in out
    assert "It fits: it needs up to" in out
    assert "収まらない確率：0.1 % 未満" in ask(*words, "--lang", "ja")[1]


ACCUMULATED = (
    '{"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "output_dir": "o", "bf16": true}'
)
FUNCTION = """
import dataclasses, sys, torch
sys.path.insert(0, {folder!r})
from tiny import regression
def job(batch: int = 16):
    def make_batch(step, seed):
        return torch.ones(batch, 8), torch.zeros(batch, 4)
    return dataclasses.replace(regression(), make_batch=make_batch, batch_size=batch)
"""


def test_a_batch_that_cannot_be_split_equally_is_refused_alike(ask: Ask, tmp_path: Path) -> None:
    """A reported case: 40 samples on 4 ranks of 4 micro-batches were answered with 2.5 samples each."""
    (tmp_path / "args.json").write_text(ACCUMULATED)
    (tmp_path / "sized.py").write_text(FUNCTION.format(folder=str(Path(__file__).parent)))
    (tmp_path / "plan.yaml").write_text(
        "ranks: 4\ntechniques: {ddp: {}, gradient-accumulation: {micro_batches: 4}}\n"
    )
    four = ("--on", "4xH100-SXM")
    for words in (
        ("plan", "sized.py:job", "--from", "args.json", "--batch", "40", *four),
        ("estimate", "sized.py:job", "--plan", "plan.yaml", "--batch", "40", *four),
        ("export", "sized.py:job", "--plan", "plan.yaml", "--batch", "40", "--to", "torchrun", "--out", "x"),
    ):
        code, _, err = ask(*words)
        assert code == 2, words
        assert err == (
            "memfit: a batch of 40 samples cannot be split equally over 4 data-parallel ranks x 4 "
            "micro-batches; allowed: a multiple of 16 samples, such as 32 or 48 (--batch)\n"
        )
    told = json.loads(ask("plan", "sized.py:job", "--from", "args.json", "--batch", "48", *four, "--json")[1])
    assert (told["batch"], told["micro_batch"]) == (48, 3)
    left_out = {note["option"]: note["reason"] for note in told["left_out"]}
    assert left_out["batch 32"] == "--batch 48 was given"
    assert left_out["2 samples per micro-batch"] == "3 with a batch of 48"


def test_plan_from_refuses_a_chosen_engine_that_does_not_support_the_plan(ask: Ask) -> None:
    code, out, err = ask("plan", "own.py:job", "--from", "clean.json", "--engine", "fairscale")
    assert (code, out) == (2, "")
    assert "engine fairscale does not support this plan: zero is not supported by fairscale" in err


def test_plan_from_a_configuration_reports_the_smallest_need_when_nothing_fits(
    ask: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    def search(request: Any, progress: Any) -> Any:
        raise NothingFits(cap_bytes=1, least_bytes=2, plan_text="sgd")

    monkeypatch.setattr(memfit.workflows.config_review, "search", search)
    assert ask("plan", "own.py:job", "--from", "clean.json", "--nproc", "2", "--without", "lora")[0] == 2
    code, out, _ = ask("plan", "own.py:job", "--from", "clean.json", "--memory", "1B")
    assert code == 3
    assert "the smallest plan needs 2 B" in out
    # the job refuses the batch of the file, so its own is predicted and shown
    assert f"; batch {regression().batch_size}\n" in out
