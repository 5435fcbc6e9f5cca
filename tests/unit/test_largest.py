"""The largest value that fits: bisection on traces, its limits, the command and the function."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import nn
from typer.testing import CliRunner

import memfit
from memfit.cli.app import app
from memfit.jobs.registry import load
from memfit.planner.batch_shape import with_batch_shape
from memfit.planner.largest import LargestValue, TracedSize, batch_multiple, find_largest, length_multiple
from memfit.types.errors import UserError
from memfit.types.job import JobRef
from memfit.types.plan import Plan, use
from memfit.workflows.largest import bucket_edges
from memfit.workflows.size_pairs import draw_steps, read_pairs

CAP = 1_000_000


def answer(
    bytes_of: Callable[[int], float],
    *,
    start: int = 1,
    step: int = 1,
    refuses: Callable[[int], bool] = lambda n: False,
) -> tuple[LargestValue, list[int]]:
    """The answer for memory that `bytes_of` gives, of which 10 % is margin, and the values tried in order."""
    tried: list[int] = []

    def probe(value: int) -> TracedSize:
        tried.append(value)
        if refuses(value):
            return TracedSize(value=value, problem=f"{value} is refused")
        expected = int(bytes_of(value))
        needed = int(1.1 * expected)
        return TracedSize(
            value=value,
            needed_bytes=needed,
            expected_bytes=expected,
            fits=needed <= CAP,
            expected_to_fit=expected <= CAP,
        )

    result = find_largest(probe, dimension="batch", plan=Plan(), cap_bytes=CAP, start=start, step=step)
    return result, tried


@pytest.mark.parametrize("start", [1, 7, 64, 5000])
@pytest.mark.parametrize(
    "bytes_of",
    [
        lambda n: 20_000 + 317 * n,
        lambda n: 5_000 + 40 * n + 3 * n * n,
        lambda n: max(100_000 + 100 * n, 900 * n - 200_000),  # the instant of the peak changes
        lambda n: 1000 * (-(-n // 8)) * 8,  # blocks of eight
        lambda n: 1000 * 1.01**n,
    ],
)
def test_the_value_fits_and_the_next_one_does_not_and_both_were_tried(
    bytes_of: Callable[[int], float], start: int
) -> None:
    result, tried = answer(bytes_of, start=start)
    assert result.safe
    assert result.safe_next
    assert result.expected
    assert result.expected_next
    assert result.safe_next.value == result.safe.value + 1
    assert (
        int(1.1 * int(bytes_of(result.safe.value))) <= CAP < int(1.1 * int(bytes_of(result.safe_next.value)))
    )
    assert bytes_of(result.expected.value) <= CAP < bytes_of(result.expected_next.value)
    assert {result.safe.value, result.safe_next.value, result.expected_next.value} <= set(tried)
    assert result.limit == "memory"
    assert len(tried) == len(set(tried)) < 40


def test_linear_memory_needs_few_traces() -> None:
    result, tried = answer(lambda n: 20_000 + 317 * n, start=8)
    assert result.value == 2804
    assert len(tried) <= 10


def test_only_multiples_of_the_step_are_tried() -> None:
    result, tried = answer(lambda n: 1000 * n, start=10, step=16)
    assert result.value == 896
    assert all(value % 16 == 0 for value in tried)


def test_if_nothing_fits_the_smallest_value_says_what_it_needs() -> None:
    result, _ = answer(lambda n: 2_000_000 + n, start=100)
    assert result.value is None
    assert result.safe_next
    assert result.safe_next.value == 1
    assert "no batch fits" in str(result)
    assert "1 needs 2.098 MiB" in str(result)


def test_values_below_what_the_job_accepts_are_not_the_smallest() -> None:
    result, _ = answer(lambda n: 2_000_000 + n, start=100, refuses=lambda n: n < 16)
    assert result.value is None
    assert result.safe_next
    assert result.safe_next.value == 16


def test_a_limit_of_the_job_is_not_called_one_of_memory() -> None:
    result, _ = answer(lambda n: 100 * n, start=10, refuses=lambda n: n > 300)
    assert result.value == 300
    assert result.limit == "job"
    assert "the limit is not the memory of the training: 301 is refused" in str(result)


def test_a_size_that_does_not_affect_memory_ends_the_search() -> None:
    result, tried = answer(lambda n: 500_000)
    assert result.limit == "none"
    assert result.safe_next is None
    assert len(tried) < 12


def test_a_first_value_that_is_refused_is_an_error() -> None:
    with pytest.raises(UserError, match="10 is refused"):
        answer(lambda n: 1, start=10, refuses=lambda n: True)


def test_batches_are_multiples_of_micro_batches_and_data_parallel_ranks() -> None:
    plan = Plan(ranks=2, uses=(use("ddp"), use("gradient-accumulation", micro_batches=3)))
    assert batch_multiple(plan) == 6
    pipeline = use("pipeline", stages=2, schedule="gpipe", micro_batches=4)
    assert batch_multiple(Plan(ranks=4, uses=(use("ddp"), pipeline))) == 8
    assert batch_multiple(Plan()) == 1
    assert length_multiple(Plan(ranks=2, uses=(use("context-parallel", degree=2),))) == 4
    assert length_multiple(Plan()) == 1


# -- sizes of jobs --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "names"),
    [
        ("char-lm", {"batch", "length", "layers", "hidden"}),
        ("weather", {"batch", "rollout", "layers", "hidden"}),
        ("potential", {"batch", "atoms", "neighbours", "layers", "hidden"}),
        ("alphafold2", {"batch", "length", "crop", "rows", "extra_rows", "layers"}),
        ("hf:llama?num_hidden_layers=2&hidden_size=64", {"batch", "length", "layers", "hidden"}),
    ],
)
def test_jobs_name_the_sizes_that_they_take(spec: str, names: set[str]) -> None:
    job = load(JobRef(spec=spec))
    assert {d.name for d in job.dimensions} == names
    assert {d.name: d.value for d in job.dimensions}["batch"] == job.batch_size


def test_a_size_changes_the_model_and_the_batch() -> None:
    job = load(JobRef(spec="weather", dimensions={"rollout": 6, "layers": 2}))
    assert job.make_batch(0, 0)["fields"].shape[1] == 7
    assert job.size == "tiny@rollout=6,layers=2"
    assert len(job.build_model().blocks) == 2  # type: ignore[arg-type]
    config_job = load(JobRef(spec="hf:llama?num_hidden_layers=1&hidden_size=64", dimensions={"layers": 3}))
    assert {d.name: d.value for d in config_job.dimensions}["layers"] == 3


@pytest.mark.parametrize(
    ("spec", "dimensions", "message"),
    [
        ("weather", {"rolout": 6}, "no dimension 'rolout'; allowed: --batch, --dim rollout.*'rollout'"),
        ("char-lm", {"hidden": 130}, "multiples of 4"),
        ("char-lm", {"layers": 0}, "--dim layers is 0"),
        ("hf:llama", {"hidden": 130}, "multiples of 32, the model.s number of attention heads"),
        ("hf:llama", {"depth": 3}, "no dimension 'depth'; allowed: --batch, --length, --dim layers"),
    ],
)
def test_a_size_that_the_job_does_not_have_is_refused(
    spec: str, dimensions: dict[str, int], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        load(JobRef(spec=spec, dimensions=dimensions))


def test_a_function_offers_its_arguments_that_take_whole_numbers(tmp_path: Path) -> None:
    spec = graph_file(tmp_path)
    job = load(JobRef(spec=spec, dimensions={"nodes": 50}))
    assert {d.name: d.value for d in job.dimensions} == {"nodes": 50, "edges": 400, "hidden": 256}
    assert job.make_batch(0, 0)["x"].shape[0] == 50


def test_a_batch_that_is_an_object_is_not_silently_left_as_it_is() -> None:
    class Graph:
        def __init__(self, x: torch.Tensor) -> None:
            self.x = x

        def to(self, *args: object, **kwargs: object) -> Graph:
            return Graph(self.x.to(*args, **kwargs))  # type: ignore[call-overload]

    job = memfit.Job(
        name="graph",
        build_model=lambda: nn.Linear(4, 4),
        make_batch=lambda step, seed: Graph(torch.ones(8, 4)),
        loss=lambda model, batch: model(batch.x).sum(),
        batch_size=8,
    )
    with pytest.raises(UserError, match="cannot be repeated or cut to 16 samples"):
        with_batch_shape(job, 16)


# -- in Python ------------------------------------------------------------------------------------


def test_largest_of_a_model_and_a_batch_fits_and_the_next_does_not() -> None:
    model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 64))
    batch = torch.randn(32, 64)
    found = memfit.largest(model, batch, machine="H100-SXM", memory="2GiB")
    assert found.value is not None
    assert found.value > 32
    for samples, fits in ((found.value, True), (found.value + 1, False)):
        prediction = memfit.estimate(model, torch.empty(samples, 64), machine="H100-SXM")
        assert (prediction.needed_bytes <= 2 * 2**30) is fits


def test_largest_of_a_function_of_the_number() -> None:
    def build(layers: int) -> tuple[nn.Module, torch.Tensor]:
        return nn.Sequential(*[nn.Linear(256, 256) for _ in range(layers)]), torch.randn(4, 256)

    found = memfit.largest(build, machine="this:cpu", memory="32MiB")
    assert found.value is not None
    assert 10 < found.value < 40
    assert found.safe_next is not None
    assert found.safe_next.needed_bytes > 32 * 2**20
    assert f"largest number that fits 32 MiB: {found.value}" in str(found)


def test_a_model_without_a_batch_is_refused() -> None:
    with pytest.raises(UserError, match="there is no batch"):
        memfit.largest(nn.Linear(4, 4))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"step": 0}, "the argument step is 0"),
        ({"start": -3}, "the argument start is -3"),
        ({"memory": 0}, "not a memory size: 0"),
        ({"model": lambda n: (nn.Linear(n, n), torch.ones(2, n), 3), "batch": None}, "a tuple of 3"),
    ],
)
def test_wrong_numbers_are_refused_in_one_line(arguments: dict[str, object], message: str) -> None:
    given: dict[str, Any] = {"model": nn.Linear(4, 4), "batch": torch.ones(2, 4), "machine": "this:cpu"}
    with pytest.raises(UserError, match=message):
        memfit.largest(**given | arguments)


class Positions(nn.Module):
    """Tokens and learned positions, of which there are 64."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(50, 8), nn.Embedding(64, 8)
        self.head = nn.Linear(8, 50)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        at = torch.arange(tokens.shape[1], device=tokens.device)
        out: torch.Tensor = self.head(self.tokens(tokens) + self.positions(at))
        return out


def test_a_length_beyond_the_models_positions_is_the_models_limit() -> None:
    def build(length: int) -> tuple[nn.Module, torch.Tensor]:
        return Positions(), torch.zeros(2, length, dtype=torch.long)

    assert memfit.estimate(*build(64), machine="H100-SXM").fits
    with pytest.raises(UserError, match="embedding of 64 rows is looked up at row 64"):
        memfit.estimate(*build(65), machine="H100-SXM")
    with pytest.raises(UserError, match="embedding of 50 rows is looked up at row 50"):
        memfit.estimate(Positions(), torch.full((2, 8), 50), machine="H100-SXM")
    with pytest.raises(UserError, match="embedding of 50 rows is looked up at row -100"):
        memfit.estimate(Positions(), torch.full((2, 8), -100), machine="H100-SXM")
    found = memfit.largest(build, machine="H100-SXM")
    assert found.value == 64
    assert found.limit == "job"


# -- the command ----------------------------------------------------------------------------------

GRAPH = """
import torch
from torch import nn
from memfit import Job

class Net(nn.Module):
    def __init__(self, hidden):
        super().__init__()
        self.inner, self.outer = nn.Linear(16, hidden), nn.Linear(hidden, 1)
    def forward(self, x, edges):
        h = torch.relu(self.inner(x))
        messages = h[edges[0]]
        return self.outer(torch.zeros_like(h).index_add(0, edges[1], messages))

def job(nodes=100, edges=400, hidden=256, name="graph"):
    def make_batch(step, seed):
        return {"x": torch.ones(nodes, 16), "edges": torch.zeros(2, edges, dtype=torch.long)}
    return Job(
        name=name, build_model=lambda: Net(hidden), make_batch=make_batch,
        loss=lambda model, batch: model(batch["x"], batch["edges"]).sum(), batch_size=1,
    )
"""


def graph_file(folder: Path) -> str:
    file = folder / "graph.py"
    file.write_text(GRAPH)
    return f"{file}:job"


def run(*words: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["plan", *words])
    text = str(result.exception) if isinstance(result.exception, Exception) else result.output
    return result.exit_code, text


def plain_plan(folder: Path) -> str:
    file = folder / "plain.yaml"
    file.write_text("techniques: {}\n")
    return str(file)


def test_two_sizes_give_a_table_and_a_file_for_a_sampler(tmp_path: Path) -> None:
    out = tmp_path / "edges.json"
    words = ["--largest", "nodes,edges", "--values", "1000,100000", "--on", "RTX-4090", "--memory", "2GiB"]
    code, text = run(
        graph_file(tmp_path), *words, "--plan", plain_plan(tmp_path), "--out", str(out), "--json"
    )
    assert code == 0, text
    report = json.loads(text[text.index("{") :])
    assert [row["value"] for row in report["rows"]] == [1000, 100_000]
    edges = json.loads(out.read_text())
    assert edges == report["buckets"]
    assert edges["1000"] > edges["100000"] > 400
    code, text = run(graph_file(tmp_path), *words, "--plan", plain_plan(tmp_path), "--out", str(out))
    assert "already exists" in text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--largest", "rollout"], "no such size; allowed: nodes, edges, hidden"),
        (["--largest", "a,b,c"], "allowed: the name of one size"),
        (["--largest", "nodes", "--values", "3"], "--values needs two sizes"),
        (["--largest", "nodes", "--out", "x.json"], "--out needs --buckets or two sizes"),
        (["--largest", "nodes", "--buckets", "8"], "--buckets gives lengths"),
        (["--largest", "nodes,edges", "--values", "3,x"], "whole numbers"),
        (["--largest", "edges", "--measure", "--engine", "replay"], "the engine replay trains nothing"),
        (["--measure", "--engine", "replay"], "the engine replay trains nothing"),
        (["--buckets", "8"], "cannot be used without --largest"),
        (["--largest", "nodes", "--save", "x.yaml"], "--save cannot be used with --largest"),
    ],
)
def test_a_wrong_question_is_refused_in_one_line(tmp_path: Path, words: list[str], message: str) -> None:
    code, text = run(graph_file(tmp_path), *words)
    assert code != 0
    assert message in text


def test_a_job_without_sizes_repeats_its_own_batch_and_says_so(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(
        "import torch\nfrom torch import nn\nfrom memfit import Job\n"
        "job = Job(name='mine', build_model=lambda: nn.Linear(64, 64),\n"
        "  make_batch=lambda step, seed: torch.ones(8, 64), loss=lambda m, b: m(b).sum(), batch_size=8)\n"
    )
    words = ["--largest", "batch", "--on", "RTX-4090", "--memory", "2GiB", "--plan", plain_plan(tmp_path)]
    code, text = run(f"{file}:job", *words)
    assert code == 0, text
    assert "repeating or cutting its own batch" in text


def test_the_length_of_a_table_of_positions_is_called_the_limit_of_the_job(tmp_path: Path) -> None:
    job = "hf:gpt2?n_layer=1&n_embd=32&n_head=2&n_positions=96&vocab_size=64"
    words = ["--largest", "seq_len", "--on", "H100-SXM", "--plan", plain_plan(tmp_path)]
    code, text = run(job, "--length", "32", *words)
    assert code == 0, text
    assert "the limit is not the memory of the training: length 97" in text.replace("\n", " ")


def test_buckets_hold_about_equally_many_sequences() -> None:
    lengths = torch.arange(1, 801).numpy()
    assert bucket_edges(lengths, 4) == [200, 400, 600, 800]
    assert bucket_edges(lengths[:3]) == [8]


def test_tiny_words_at_another_batch_is_what_is_traced() -> None:
    assert with_batch_shape(tiny.words(), 3).batch_size == 3


# -- data with two sizes --------------------------------------------------------------------------


def lengths(*words: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["estimate", *words])
    text = str(result.exception) if isinstance(result.exception, Exception) else result.output
    return result.exit_code, text


@pytest.mark.long
def test_two_sizes_of_the_data_give_quantiles_that_agree_with_traces(tmp_path: Path) -> None:
    rows = [(20 + 7 * n % 90, 60 + 31 * n % 800) for n in range(60)]
    (tmp_path / "sizes.csv").write_text("nodes,edges\n" + "".join(f"{a},{b}\n" for a, b in rows))
    (tmp_path / "sizes.jsonl").write_text(
        "".join(json.dumps({"nodes": a, "edges": b}) + "\n" for a, b in rows)
    )
    columns = ["--columns", "nodes,edges"]
    words = [graph_file(tmp_path), *columns, "--batch", "4", "--on", "this:cpu"]
    code, text = lengths(*words, "--lengths", str(tmp_path / "sizes.csv"), "--memory", "1GiB", "--json")
    assert code == 0, text
    report = json.loads(text[text.index("{") :])
    peaks = report["quantile_bytes"]
    assert peaks["p50"] < peaks["p99"] <= peaks["max"]
    assert report["oom_per_step"] == 0
    for held_out in report["held_out"]:
        assert abs(held_out["predicted_bytes"] / held_out["traced_bytes"] - 1) < 0.01
    code, same = lengths(*words, "--lengths", str(tmp_path / "sizes.jsonl"), "--memory", "1GiB", "--json")
    assert json.loads(same[same.index("{") :]) == report
    half_fits = str(peaks["p50"] + report["margin_bytes"])
    code, text = lengths(*words, "--lengths", str(tmp_path / "sizes.csv"), "--memory", half_fits)
    assert "60 samples, 4 per step (sum of their sizes)" in text
    assert re.search(r"out of [\d.]+ MiB: 0\.(4\d*|5) per step", text)


@pytest.mark.parametrize("combination", ["sum", "largest"])
def test_steps_sum_graphs_and_pad_samples(combination: str) -> None:
    pairs = torch.tensor([[1, 10], [2, 20], [3, 30]]).numpy()
    steps = draw_steps(pairs, 3, combination)
    assert (steps == ([6, 60] if combination == "sum" else [3, 30])).all()


def test_empty_lines_between_samples_are_left_out(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("a,b\n3,4\n\n5,6\n\n")
    (tmp_path / "a.jsonl").write_text('{"a": 3, "b": 4}\n\n{"a": 5, "b": 6}\n\n')
    for name in ("a.csv", "a.jsonl"):
        assert read_pairs(str(tmp_path / name), ("a", "b")).tolist() == [[3, 4], [5, 6]]


@pytest.mark.parametrize(
    ("text", "words", "message"),
    [
        ("nodes,edges\n3,0\n", [], "sample 1: edges is '0'"),
        ("nodes,edges\n3\n", [], "sample 1: edges is ''"),
        (f"nodes,edges\n3,{'9' * 5000}\n", [], "sample 1: edges is '9999"),
        (f"nodes,edges\n3,{'9' * 200_000}\n", [], "sizes.csv as CSV: field larger"),
        ("nodes,edges\n", [], "has no samples"),
        ("nodes,arcs\n3,4\n", [], "sample 1 has no column or key 'edges'"),
        ("nodes,edges\n3,4\n", ["--combine", "mean"], "unknown --combine: 'mean'"),
        ("nodes,edges\n3,4\n", ["--column", "nodes"], "--columns cannot be used with --column"),
    ],
)
def test_wrong_data_of_two_sizes_are_refused(
    tmp_path: Path, text: str, words: list[str], message: str
) -> None:
    (tmp_path / "sizes.csv").write_text(text)
    sizes = [graph_file(tmp_path), "--lengths", str(tmp_path / "sizes.csv"), "--columns", "nodes,edges"]
    code, output = lengths(*sizes, *words)
    assert code != 0
    assert message in output


def test_a_host_that_is_the_limit_is_named(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """The sizes of the device, which has enough, were the only ones given."""
    from memfit.cli import main

    benchmark = Path(__file__).parents[2] / "benchmarks" / "host_memory.py"
    (tmp_path / "away.py").write_text(
        "import importlib.util, sys\n"
        f"spec = importlib.util.spec_from_file_location('by_hand_host', {str(benchmark)!r})\n"
        "by_hand = sys.modules['by_hand_host'] = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(by_hand)\n"
        "def job(batch: int = 16):\n    return by_hand.job(512, 4, batch)\n"
    )
    (tmp_path / "plan.yaml").write_text("techniques: {activation-offload: {to: host}}\n")
    words = ["plan", f"{tmp_path}/away.py:job", "--largest", "batch", "--plan", f"{tmp_path}/plan.yaml"]
    assert main([*words, "--on", "H100-SXM", "--host-memory", "5.5GiB"]) in (0, None)
    out = " ".join(capsys.readouterr().out.split())
    assert "the host's memory is the limit: the next needs up to 5." in out
    assert "the host has 5.5 GiB" in out
