"""The gate for CI: `memfit baseline`, the file that it writes, SARIF, and the files for CI services."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from memfit.cli import main
from memfit.cost.module_memory import largest_modules, module_sums
from memfit.lint.location import locate
from memfit.report.baseline_drift import compare_baseline, drift_text
from memfit.report.baseline_file import baseline_text, read_baseline
from memfit.report.sarif import LEVELS
from memfit.types.baseline import (
    OTHERS,
    BaselineFile,
    BaselineTarget,
    BlockMemory,
    MemoryBaseline,
    ModuleMemory,
)
from memfit.types.errors import UserError
from memfit.workflows.baseline import job_path, target_in, write_baseline

ROOT = Path(__file__).parents[2]
MIB = 2**20
JOB = """
import torch
from torch import nn
from torch.nn import functional
from memfit import Job


class Encoder(nn.Module):
    def __init__(self, hidden):
        super().__init__()
        self.up = nn.Linear(256, hidden)
        self.down = nn.Linear(hidden, 256)

    def forward(self, x):
        return x + self.down(functional.gelu(self.up(x)))


class Net(nn.Module):
    def __init__(self, hidden=1024):
        super().__init__()
        self.encoder = Encoder(hidden)
        self.layers = nn.ModuleList([Encoder(512) for _ in range(6)])

    def forward(self, x):
        x = self.encoder(x)
        for layer in self.layers:
            x = layer(x)
        return x


job = Job(
    name="mine",
    build_model=Net,
    make_batch=lambda step, seed: (torch.zeros(8192, 256), torch.zeros(8192, 256)),
    loss=lambda model, batch: functional.mse_loss(model(batch[0]), batch[1]),
    batch_size=8192,
)
"""
# Kernels of the processor differ most in these: convolutions, recurrent layers, attention.
KERNELS = """
import torch
from torch import nn
from memfit import Job


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.images = nn.Sequential(nn.Conv2d(3, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU())
        self.words = nn.LSTM(64, 64, batch_first=True)
        self.attention = nn.TransformerEncoderLayer(64, 4, 128, batch_first=True)

    def forward(self, x):
        x = self.images(x.contiguous(memory_format=torch.channels_last)).flatten(2).transpose(1, 2)
        return self.attention(self.words(x)[0])


job = Job(
    name="kernels",
    build_model=Net,
    make_batch=lambda step, seed: torch.zeros(8, 3, 16, 16),
    loss=lambda model, batch: model(batch).mean(),
    batch_size=8,
)
"""

Ask = Callable[..., tuple[int, str, str]]


@pytest.fixture
def ask(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Ask:
    """Run a command line in a folder with a job; exit code, standard output, standard error."""
    (tmp_path / "my_train.py").write_text(JOB)
    monkeypatch.chdir(tmp_path)

    def run(*words: str) -> tuple[int, str, str]:
        code = main(words)
        return code, *capsys.readouterr()

    return run


def widen(folder: Path, hidden: int) -> None:
    (folder / "my_train.py").write_text(JOB.replace("hidden=1024", f"hidden={hidden}"))


# --- write and check


def test_an_unchanged_job_passes_and_is_written_as_the_same_bytes(ask: Ask, tmp_path: Path) -> None:
    assert ask("baseline", "write", "my_train.py:job")[0] == 0
    first = (tmp_path / "memfit-baseline.toml").read_bytes()
    code, out, _ = ask("baseline", "check")
    assert (code, out) == (0, "my_train.py:job, plain, H100-SXM: no growth above 2%\n")
    assert ask("baseline", "write")[0] == 0
    assert (tmp_path / "memfit-baseline.toml").read_bytes() == first


def test_five_percent_more_activations_of_one_module_fail_with_module_and_line(
    ask: Ask, tmp_path: Path
) -> None:
    ask("baseline", "write", "my_train.py:job")
    widen(tmp_path, 1076)
    code, out, _ = ask("baseline", "check", "--sarif", "memory.sarif")
    assert code == 1
    assert re.search(
        r"my_train.py:job, plain, H100-SXM, forward of encoder.up, my_train.py:15: .* \(\+5.1 %\)", out
    )
    assert "`memfit baseline write`" in out
    shown = (ROOT / "docs/ci.md").read_text(encoding="utf-8").split("```text\n")[1].partition("```")[0]
    assert set(shown.splitlines()) <= set(out.splitlines())
    log = sarif(tmp_path / "memory.sarif")
    places = [r["locations"][0]["physicalLocation"] for r in log["results"]]
    assert {"artifactLocation": {"uri": "my_train.py"}, "region": {"startLine": 15}} in places
    # Accepted: what was written again passes.
    assert ask("baseline", "write")[0] == 0
    assert ask("baseline", "check")[0] == 0


def test_five_percent_more_in_one_of_several_alike_blocks_fail_with_module_and_line(
    ask: Ask, tmp_path: Path
) -> None:
    ask("baseline", "write", "my_train.py:job")
    (tmp_path / "my_train.py").write_text(JOB.replace("Encoder(512)", "Encoder(538 if _ == 3 else 512)"))
    code, out, _ = ask("baseline", "check")
    assert code == 1
    assert re.search(r"H100-SXM, forward of one of layers\.\*\.up, my_train.py:15: .* \(\+5.1 %\)", out)
    # Another order of the same blocks is no growth, nor are fewer of them.
    assert ask("baseline", "write")[0] == 0
    text = JOB.replace("Encoder(512)", "Encoder(538 if _ == 1 else 512)")
    for same_or_less in (text, text.replace("range(6)", "range(5)")):
        (tmp_path / "my_train.py").write_text(same_or_less)
        assert ask("baseline", "check")[0] == 0


def test_growth_of_the_whole_is_told_by_phase_and_largest_modules(ask: Ask, tmp_path: Path) -> None:
    ask("baseline", "write", "my_train.py:job")
    widen(tmp_path, 2048)
    code, out, _ = ask("baseline", "check")
    assert code == 1
    assert re.search(r"H100-SXM, forward: \d+.* MiB -> .* \(\+\d+.\d %\); encoder.up \+", out)
    assert "(my_train.py:15)" in out
    assert "the model had 2,103,040 parameters" in out
    told = json.loads(ask("baseline", "check", "--json")[1])
    drift = next(d for d in told["jobs"][0]["drifts"] if d["phase"] == "forward")
    assert drift["to_bytes"] > drift["from_bytes"]
    assert drift["modules"][0]["line"] == "my_train.py:15"


def test_less_memory_passes_with_the_hint_to_store_it(ask: Ask, tmp_path: Path) -> None:
    ask("baseline", "write", "my_train.py:job")
    widen(tmp_path, 512)
    code, out, _ = ask("baseline", "check")
    assert code == 0
    assert "forward takes less: " in out
    assert out.splitlines()[-1].endswith("`memfit baseline write`")


def test_the_prediction_depends_on_no_property_of_this_processor(tmp_path: Path) -> None:
    """Threads, vector instructions and the order of hashes differ; the bytes do not."""
    plain = {"OMP_NUM_THREADS": "2", "PYTHONHASHSEED": "1"}
    poor = {"OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "2"}
    poor |= {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41"}
    texts = []
    for name, variables in (("plain", plain), ("poor", poor)):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "kernels.py").write_text(KERNELS)
        words = [sys.executable, "-m", "memfit", "baseline", "write", "kernels.py:job"]
        words += ["--plan", "plain", "--plan", "bf16-autocast"]
        run = subprocess.run(
            words, cwd=folder, env={**os.environ, **variables}, capture_output=True, text=True, check=False
        )
        assert run.returncode == 0, run.stderr
        texts.append((folder / "memfit-baseline.toml").read_bytes())
    assert texts[0] == texts[1]
    assert b'plan = "bf16-autocast"' in texts[0]


def test_paths_are_relative_to_the_folder_of_the_file(
    ask: Ask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "ci").mkdir()
    (tmp_path / "plan.yaml").write_text("techniques: {bf16-autocast: {}}")
    words = ("--plan", "plan.yaml", "--file", "ci/peaks.toml", "--on", "a100-80gb-sxm")
    assert ask("baseline", "write", "my_train.py:job", *words)[0] == 0
    entry = read_baseline(tmp_path / "ci/peaks.toml").jobs[0]
    assert (entry.job, entry.plan) == ("../my_train.py:job", "../plan.yaml")
    assert entry.machine == "A100-80GB-SXM"
    monkeypatch.chdir(tmp_path / "ci")
    assert ask("baseline", "check", "--file", "peaks.toml")[0] == 0
    (tmp_path / "plan.yaml").write_text("techniques: {}")
    code, out, _ = ask("baseline", "check", "--file", "peaks.toml")
    assert code == 1
    assert "the plan was bf16-autocast; it is plain" in out
    assert out.splitlines()[-1].endswith("`memfit baseline write --file peaks.toml`")


def test_a_folder_of_a_hugging_face_model_is_a_path_and_a_name_is_not(tmp_path: Path) -> None:
    ci = tmp_path / "ci"
    (tmp_path / "models/mine").mkdir(parents=True)
    for job, moved in (("hf:models/mine?layers=2", "hf:../models/mine?layers=2"), ("hf:llama", "hf:llama")):
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(tmp_path)
            target = target_in(ci, BaselineTarget(job=job, machine="H100-SXM"))
            assert target.job == moved
            assert job_path(target, Path("ci")) == job
            inside = BaselineTarget(job="hf:models/mine", machine="H100-SXM")
            patch.chdir("/")
            assert (tmp_path / "models/mine").samefile(job_path(inside, tmp_path).removeprefix("hf:"))


def test_writing_one_job_keeps_the_others(ask: Ask, tmp_path: Path) -> None:
    ask("baseline", "write", "my_train.py:job")
    ask("baseline", "write", "my_train.py:job", "--plan", "bf16-autocast")
    ask("baseline", "write", "char-lm", "--batch", "2")
    titles = [entry.title for entry in read_baseline(tmp_path / "memfit-baseline.toml").jobs]
    assert titles == [
        "char-lm batch 2, plain, H100-SXM",
        "my_train.py:job, bf16-autocast, H100-SXM",
        "my_train.py:job, plain, H100-SXM",
    ]


def test_a_job_that_another_process_writes_meanwhile_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "memfit-baseline.toml"

    def predict(targets: Any, folder: Path, on_target: Any) -> list[MemoryBaseline]:
        other = BaselineFile(jobs=(stored(job="other.py:job"),))
        path.write_text(baseline_text(other))
        return [stored(job="my_train.py:job")]

    monkeypatch.setattr("memfit.workflows.baseline._predictions", predict)
    monkeypatch.setattr("memfit.workflows.baseline.shorten", lambda prediction: prediction)
    write_baseline(
        path, [BaselineTarget(job="my_train.py:job", machine="H100-SXM")], lambda done, count, target: None
    )
    assert [entry.job for entry in read_baseline(path).jobs] == ["my_train.py:job", "other.py:job"]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("write", "my_train.py:job", "--on", "this"), "cannot be for the machine this"),
        (("write", "my_train.py:job", "--on", "H1000"), "H1000"),
        (("write",), "there is no baseline memfit-baseline.toml"),
        (("write", "--on", "H100-SXM"), "--on is given without a JOB"),
        (("write", "my_train.py:job", "--tolerance", "1%"), "--tolerance is not an argument"),
        (("check", "my_train.py:job"), "JOB is not an argument"),
        (("check",), "there is no baseline memfit-baseline.toml"),
        (("check", "--tolerance", "2"), "not a percentage: '2'"),
        (("compare",), "unknown action"),
    ],
)
def test_wrong_arguments_are_one_line_and_write_nothing(
    ask: Ask, tmp_path: Path, words: tuple[str, ...], says: str
) -> None:
    code, out, err = ask("baseline", *words)
    assert (code, out) == (2, "")
    assert says in err
    assert err.count("\n") == 1
    assert not (tmp_path / "memfit-baseline.toml").exists()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("jobs = [", "is not valid TOML"),
        ('format = "7"', "its format is '7'"),
        ('format = "1"\n[[jobs]]\njob = "a.py:job"', "Field required"),
        ('format = "1"\nextra = 1', "extra"),
        ('format = "1"', "has no jobs"),
    ],
)
def test_a_broken_file_is_one_line(ask: Ask, tmp_path: Path, text: str, says: str) -> None:
    (tmp_path / "memfit-baseline.toml").write_text(text)
    code, _, err = ask("baseline", "check")
    assert code == 2
    assert says in err
    assert err.count("\n") == 1


# --- the comparison, on predictions made by hand


def row(module: str, line: str = "", code: str = "", **columns: int) -> ModuleMemory:
    return ModuleMemory(module=module, line=line, code=code, **columns)


def stored(*rows: ModuleMemory, **changes: Any) -> MemoryBaseline:
    entry = MemoryBaseline(
        job="a.py:job",
        plan_label="plain",
        machine="H100-SXM",
        memfit="0.1.0",
        torch="2.13.0",
        parameter_count=10,
        allocated_bytes=1000 * MIB,
        reserved_bytes=1100 * MIB,
        peak_phase="backward",
        phase_bytes={"forward": 900 * MIB, "backward": 1000 * MIB},
        category_bytes={},
        modules=rows,
    )
    return dataclasses.replace(entry, **changes)


def drifts(before: MemoryBaseline, now: MemoryBaseline, tolerance: float = 0.02) -> list[str]:
    return [drift_text(drift) for drift in compare_baseline(before, now, tolerance).drifts]


def test_a_module_drifts_although_the_peak_stays_within_the_tolerance() -> None:
    before = stored(row("mlp", "a.py:7", "h = up(x)", forward_bytes=100 * MIB))
    now = stored(row("mlp", "a.py:9", "h = up(x)", forward_bytes=105 * MIB))
    assert drifts(before, now) == ["forward of mlp, a.py:9: 100 MiB -> 105 MiB (+5.0 %)"]
    assert drifts(before, now, 0.06) == []


def test_a_block_is_compared_with_that_of_its_rank() -> None:
    def of(*sizes: int) -> MemoryBaseline:
        blocks = (BlockMemory(module="layers.*.up", forward_bytes=sizes),)
        return stored(row("layers.*.up", forward_bytes=sum(sizes)), blocks=blocks)

    before = of(40 * MIB, 20 * MIB, 20 * MIB)
    assert drifts(before, of(40 * MIB, 21 * MIB, 20 * MIB)) == [
        "forward of one of layers.*.up: 20 MiB -> 21 MiB (+5.0 %)"
    ]
    assert drifts(before, before) == drifts(before, of(40 * MIB, 20 * MIB)) == []


def test_the_line_that_grew_is_named_not_the_largest() -> None:
    large = row("mlp", "a.py:7", "h = up(x)", forward_bytes=100 * MIB)
    added = row("mlp", "a.py:8", "h = h * 2", forward_bytes=30 * MIB)
    moved = dataclasses.replace(large, line="a.py:70")
    assert drifts(stored(large), stored(moved, added))[0].startswith("forward of mlp, a.py:8: ")


def test_a_renamed_module_is_no_drift_and_a_new_one_is() -> None:
    before = stored(row("mlp", forward_bytes=100 * MIB))
    renamed = stored(row("ffn", "a.py:7", "h", forward_bytes=100 * MIB))
    comparison = compare_baseline(before, renamed, 0.02)
    assert not comparison.drifts
    assert comparison.notes == ("new modules: ffn", "modules that are gone: mlp")
    new = stored(*before.modules, row("ffn", "a.py:7", "h", forward_bytes=50 * MIB))
    assert drifts(before, new) == ["forward of new module ffn, a.py:7: 0 B -> 50 MiB"]


def test_modules_around_the_listing_limit_do_not_drift_when_nothing_changes() -> None:
    rows = [row(f"m{i}", "a.py:7", "h", forward_bytes=(9_990 + i) * 1049) for i in range(20)]
    now = stored(*rows)
    before = stored(*largest_modules(rows, now.allocated_bytes))
    assert OTHERS in module_sums(before.modules)
    assert not compare_baseline(before, now, 0.0).drifts


def test_small_modules_are_compared_together() -> None:
    before = stored(row(OTHERS, state_bytes=100 * MIB))
    now = stored(*(row(f"m{i}", state_bytes=7 * MIB) for i in range(15)))
    assert drifts(before, now) == ["states of modules of less than 1 % each: 100 MiB -> 105 MiB (+5.0 %)"]


def test_reserved_memory_drifts_by_more_than_a_segment_only() -> None:
    assert drifts(stored(), stored(reserved_bytes=1123 * MIB)) == [
        "reserved memory: 1.074 GiB -> 1.097 GiB (+2.1 %)"
    ]
    assert not drifts(stored(reserved_bytes=20 * MIB), stored(reserved_bytes=40 * MIB))


def test_another_version_of_torch_is_told() -> None:
    comparison = compare_baseline(stored(torch="2.12.0"), stored(), 0.02)
    assert not comparison.drifts
    assert comparison.notes[0].startswith("the baseline was written by torch 2.12.0 ")


def test_the_file_keeps_what_is_written_into_it(tmp_path: Path) -> None:
    code = 'x = f"\\u00e9\\t{self.up(x)}" # 🔥 \x7f'
    entry = stored(row("a.b", "src/é.py:7", code, forward_bytes=1), size="tiny", batch=3)
    baseline = BaselineFile(jobs=(entry,), tests=(dataclasses.replace(entry, job="test_a"),))
    path = tmp_path / "b.toml"
    path.write_text(baseline_text(baseline), encoding="utf-8")
    assert read_baseline(path) == baseline
    path.write_text(baseline_text(dataclasses.replace(baseline, jobs=(entry, entry))), encoding="utf-8")
    with pytest.raises(UserError, match=r"two entries for a.py:job size tiny batch 3"):
        read_baseline(path)


# --- pytest

TEST = """
import pytest
import torch
from my_train import Net


def test_memory(memfit_memory):
    loss = torch.nn.functional.mse_loss
    memfit_memory(Net(), (torch.zeros(8192, 256), torch.zeros(8192, 256)), loss=loss, optimizer="sgd")


@pytest.mark.parametrize("width", [256])
def test_of_a_plan(memfit_memory, width):
    batch = torch.zeros(512, width)
    memory = memfit_memory(lambda: torch.nn.Linear(width, width), batch, plan="bf16-autocast", name="linear")
    assert memory.allocated_bytes > 0
"""
MORE = """

def test_without_baseline(memfit_memory):
    memfit_memory(torch.nn.Linear(4, 4), torch.zeros(2, 4))


def test_twice(memfit_memory):
    memfit_memory(torch.nn.Linear(4, 4), torch.zeros(2, 4), name="linear", machine="A100-80GB-SXM")
"""


def run_pytest(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", "-p", "memfit.integrations.pytest_plugin", "-W", "error"]
    environment = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTEST_ADDOPTS": ""}
    return subprocess.run(
        [*command, "-q", "-p", "no:cacheprovider", *words],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_fixture_stores_memory_and_fails_with_module_and_line_when_it_grew(tmp_path: Path) -> None:
    (tmp_path / "my_train.py").write_text(JOB)
    (tmp_path / "test_it.py").write_text(TEST)
    update = run_pytest(tmp_path, "--memfit-update")
    assert update.returncode == 0, update.stdout + update.stderr
    names = [entry.job for entry in read_baseline(tmp_path / "memfit-baseline.toml").tests]
    assert names == ["linear", "test_it.py::test_memory"]
    widen(tmp_path, 1076)
    (tmp_path / "test_it.py").write_text(TEST + MORE)
    checked = run_pytest(tmp_path)
    assert "3 failed, 1 passed" in checked.stdout, checked.stdout + checked.stderr
    assert "the predicted memory of test_it.py::test_memory, plain, H100-SXM grew" in checked.stdout
    assert re.search(r"forward of encoder.up, my_train.py:15: .*\+5.1 %", checked.stdout)
    assert "no memory stored for test_it.py::test_without_baseline" in " ".join(checked.stdout.split())
    assert "`pytest test_it.py::test_without_baseline --memfit-update` stores it" in checked.stdout
    assert "stored for bf16-autocast, H100-SXM" in checked.stdout


def test_a_damaged_baseline_fails_the_test_with_one_line(tmp_path: Path) -> None:
    (tmp_path / "test_it.py").write_text(f"import torch\n{MORE}")
    (tmp_path / "memfit-baseline.toml").write_text("[[tests]\n")
    for words in ((), ("--memfit-update",)):
        failed = run_pytest(tmp_path, *words, "-k", "without_baseline", "--tb=short")
        assert "1 failed" in failed.stdout, failed.stdout + failed.stderr
        assert "memfit-baseline.toml" in failed.stdout
        assert "pytest_plugin.py" not in failed.stdout, "no traceback"
        assert (tmp_path / "memfit-baseline.toml").read_text() == "[[tests]\n"


def test_the_plugin_loads_no_torch_when_it_is_not_used(tmp_path: Path) -> None:
    test = "import sys\n\ndef test_a():\n    assert not {'torch', 'numpy', 'pydantic'} & sys.modules.keys()\n"
    (tmp_path / "test_a.py").write_text(test)
    run = run_pytest(tmp_path)
    assert "1 passed" in run.stdout, run.stdout + run.stderr


def test_the_plugin_is_registered_with_pytest() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["entry-points"]["pytest11"] == {"memfit": "memfit.integrations.pytest_plugin"}


# --- SARIF


def sarif(path: Path) -> dict[str, Any]:
    """Return the only run of a SARIF log, after checking what the schema of version 2.1.0 requires."""
    log = json.loads(path.read_text(encoding="utf-8"))
    assert log["version"] == "2.1.0"
    assert log["$schema"].endswith("sarif-2.1.0.json")
    (run,) = log["runs"]
    driver = run["tool"]["driver"]
    assert driver["name"] == "memfit"
    rules = [rule["id"] for rule in driver["rules"]]
    assert len(rules) == len(set(rules))
    assert all(rule["shortDescription"]["text"] and rule["help"]["text"] for rule in driver["rules"])
    for result in run["results"]:
        assert rules[result["ruleIndex"]] == result["ruleId"]
        assert result["level"] in LEVELS
        assert result["message"]["text"]
        (location,) = result["locations"]
        assert location["physicalLocation"]["artifactLocation"]["uri"]
        region = location["physicalLocation"].get("region", {"startLine": 1})
        assert region["startLine"] >= 1
        assert region.get("startColumn", 1) >= 1
    return run


BAD = """{
  "train_micro_batch_size_per_gpu": 4,
  "fp16": {
    "enabled": true
  },
  "bf16": {"enabled": true}
}
"""


def test_lint_writes_sarif_with_the_line_of_the_setting(ask: Ask, tmp_path: Path) -> None:
    (tmp_path / "my ds.json").write_text(BAD)
    (tmp_path / "other.json").write_text(BAD)
    code, _, _ = ask("lint", "--each", "my ds.json", "other.json", "--sarif", "lint.sarif")
    assert code == 1
    run = sarif(tmp_path / "lint.sarif")
    found = next(r for r in run["results"] if r["ruleId"] == "deepspeed-two-precisions")
    assert found["level"] == "error"
    place = found["locations"][0]["physicalLocation"]
    assert place["artifactLocation"]["uri"] == "my%20ds.json"
    assert place["region"] == {"startLine": 4, "startColumn": 5}
    (tmp_path / "clean.json").write_text('{"train_batch_size": 4, "zero_optimization": {"stage": 2}}')
    ask("lint", "clean.json", "--sarif", "clean.sarif")
    assert sarif(tmp_path / "clean.sarif")["results"] == []


def test_lint_refuses_two_files_of_a_kind_unless_each_is_checked_by_itself(ask: Ask, tmp_path: Path) -> None:
    for name in ("a.json", "b.json"):
        (tmp_path / name).write_text(BAD)
    assert ask("lint", "a.json", "b.json")[0] == 2
    code, out, _ = ask("lint", "--each", "a.json", "b.json", "--json")
    told = json.loads(out)
    assert (code, told["files"]) == (1, ["a.json", "b.json"])
    assert {finding["file"] for finding in told["findings"]} == {"a.json", "b.json"}


@pytest.mark.parametrize(
    ("suffix", "text", "sentence", "position"),
    [
        (".json", BAD, "fp16.enabled and bf16.enabled are both true", (4, 5)),
        (".json", BAD, "enabled is true", None),  # there are two, and it may be plain English
        (".json", '{\t"a_b": 1}', "a_b is 1", None),  # YAML forbids tabs there
        (".yaml", "x: 1\nfsdp_config:\n  fsdp_offload: true\n", "fsdp_offload is on", (3, 3)),
        (".yaml", "a_b: &x\n  c_d: *x\n", "c_d is odd", None),  # contains itself: not read
        (".toml", "[training]\nseq_len = 4\n[model]\nseq-x = 1\n", "seq_len 4 is odd", (2, 1)),
        (".toml", "[a]\nnum_x = 4\n[b]\nnum_x = 1\n", "b.num_x is 1", (4, 1)),
        (".sh", "python a.py \\\n  --micro-batch-size 4 # --seq-length\n", "micro-batch-size 4", (2, 3)),
        (".sh", "a --seq-length 1\nb --seq-length 2\n", "seq-length is given twice", None),
    ],
)
def test_the_position_of_a_setting_is_exact_or_unknown(
    suffix: str, text: str, sentence: str, position: tuple[int, int] | None
) -> None:
    assert locate(text, suffix, sentence) == position


# --- files for CI services


def loaded(name: str) -> Any:
    return yaml.safe_load((ROOT / name).read_text(encoding="utf-8"))


def commands() -> list[str]:
    lines = [hook["entry"] for hook in loaded(".pre-commit-hooks.yaml")]
    lines += [step["run"] for step in loaded("action.yml")["runs"]["steps"] if "run" in step]
    return [re.sub(r"\$\{SARIF:\+(.*?)\}", r"\1", line) for line in lines if line.startswith("memfit")]


@pytest.mark.parametrize("line", commands())
def test_commands_of_hooks_and_action_exist_with_their_options(
    line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = shlex.split(line)
    assert main([words[1], "--help"]) == 0
    text = capsys.readouterr().out
    assert not [word for word in words if word.startswith("--") and word not in text]
    assert words[1] in ("lint", "baseline")


def test_hooks_and_action_have_what_their_services_require() -> None:
    assert len(commands()) == 3
    hooks = loaded(".pre-commit-hooks.yaml")
    assert [hook["id"] for hook in hooks] == ["memfit-lint", "memfit-baseline"]
    assert all({"name", "entry", "language"} <= hook.keys() for hook in hooks)
    pattern = re.compile(hooks[0]["files"])
    assert pattern.search("conf/ds_zero3.json")
    assert not pattern.search("package.json")
    action = loaded("action.yml")
    assert action["runs"]["using"] == "composite"
    assert all("shell" in step for step in action["runs"]["steps"] if "run" in step)
    used = set(re.findall(r"inputs\.(\w+)", (ROOT / "action.yml").read_text(encoding="utf-8")))
    assert used == action["inputs"].keys()


def test_examples_of_the_page_are_valid() -> None:
    page = (ROOT / "docs/ci.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```(\w+)\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    workflow, hooks = (yaml.safe_load(text) for language, text in blocks if language == "yaml")
    inputs = workflow["jobs"]["memory"]["steps"][-1]["with"]
    assert inputs.keys() <= loaded("action.yml")["inputs"].keys()
    ids = {hook["id"] for hook in hooks["repos"][0]["hooks"]}
    assert ids == {hook["id"] for hook in loaded(".pre-commit-hooks.yaml")}
    for language, text in blocks:
        if language == "python":
            compile(text, "ci.md", "exec")
