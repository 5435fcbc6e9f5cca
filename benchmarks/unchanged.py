"""Did a change of the code change any answer? Every estimate, search, export and finding, before and after.

    python benchmarks/unchanged.py record FILE [--only PART]   write the answers of this tree
    python benchmarks/unchanged.py compare BEFORE AFTER        list answers that differ; exit 1 if any does
        [--reworded]   between two trees whose sentences differ: of a sentence, only its numbers are compared

The answers come through memfit's public functions and its command line, so that code below them can move.
Nothing is timed on this machine: searches are for devices of the catalog, and estimates are not probed.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import json
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
Answer = tuple[str, Any]

# -- estimates: the rows of memory_truth.py and memory_truth_ranks.py ---------------------------------------


def estimates() -> Iterator[Answer]:
    import memory_truth

    for names in ([], list(memory_truth.SCIENCE)):
        for job, _ in memory_truth.jobs(names or None):
            for plan in memory_truth.cases(job.name):
                yield f"{job.name}: {plan.label}", _estimate(job, plan)


def estimates_on_ranks() -> Iterator[Answer]:
    import memory_truth_ranks

    from memfit.jobs.registry import load

    for row in memory_truth_ranks.ROWS:
        yield row.name, _estimate(load(row.ref), row.plan)


def _estimate(job: Any, plan: Any) -> Any:
    import memfit

    try:
        found = memfit.estimate(job, plan=plan, probe=False).estimate
    except Exception as error:  # noqa: BLE001  a refusal is an answer
        return f"{type(error).__name__}: {error}"
    at_peak, phases = dict(found.at_peak_bytes), dict(found.phase_peak_bytes)
    return {
        "allocated": [found.allocated_bytes.low, found.allocated_bytes.value, found.allocated_bytes.high],
        "phases": {str(k): v for k, v in phases.items()},
        "at_peak": {str(k): v for k, v in at_peak.items()},
        "modules": dict(found.by_module_bytes),
        "flops": found.flops_per_step,
    }


# -- searches ---------------------------------------------------------------------------------------------

_ITSELF = f"{Path(__file__).resolve()}"
SEARCHES = {
    "protein-ss, L4, 700 MiB": ("protein-ss", "--on", "L4", "--memory", "700MiB"),
    "char-lm, RTX 4090, exact": ("char-lm", "--on", "RTX-4090", "--memory", "900MiB", "--accuracy", "exact"),
    "weather, A100, smallest": ("weather", "--on", "A100-40GB-SXM", "--goal", "smallest"),
    "genome, H100": ("genome", "--on", "H100-SXM", "--memory", "2GiB"),
    "segmentation3d, L4": ("segmentation3d", "--on", "L4", "--memory", "1500MiB"),
    "protein-lm 650M, 8 H100": ("protein-lm", "--size", "650M", "--on", "8xH100-SXM"),
    "protein-lm 3B, 8 A100": ("protein-lm", "--size", "3B", "--on", "8xA100-80GB-SXM"),
    "Llama, 2 L4": (f"{_ITSELF}:llama", "--on", "2xL4", "--accuracy", "exact"),
    "Llama, 4 A100, 4.5 GiB": (f"{_ITSELF}:llama", "--on", "4xA100-80GB-SXM", "--memory", "4608MiB"),
    "GPT-2, 2 RTX 4090": (f"{_ITSELF}:gpt2", "--on", "2xRTX-4090", "--accuracy", "exact"),
    "GPT-2, 4 H100": (f"{_ITSELF}:gpt2", "--on", "4xH100-SXM", "--without", "tensor-parallel"),
    "BERT, 2 A100, 4.5 GiB": (f"{_ITSELF}:bert", "--on", "2xA100-40GB-SXM", "--memory", "4608MiB"),
}


def llama() -> Any:
    sizes = {"num_hidden_layers": 4, "hidden_size": 1024, "intermediate_size": 2816, "vocab_size": 32000}
    return _transformer("Llama", 4, **sizes, num_attention_heads=16, num_key_value_heads=8)


def gpt2() -> Any:
    return _transformer("GPT2", 8, n_layer=4, n_embd=768, n_head=12, vocab_size=8192)


def bert() -> Any:
    sizes = {"num_hidden_layers": 4, "hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 3072}
    return _transformer("Bert", 8, **sizes)


def _transformer(kind: str, batch: int, **sizes: int) -> Any:
    import torch
    import transformers

    from memfit.types.job import Job

    config = getattr(transformers, f"{kind}Config")(**sizes, use_cache=False)
    head = transformers.AutoModelForMaskedLM if kind == "Bert" else transformers.AutoModelForCausalLM

    def given(step: int, seed: int) -> Any:
        return {n: torch.zeros(batch, 512, dtype=torch.long) for n in ("input_ids", "labels")}

    return Job(
        name=kind.lower(),
        build_model=lambda: head.from_config(config),
        make_batch=given,
        loss=lambda model, part: model(**part).loss,
        batch_size=batch,
    )


def searches() -> Iterator[Answer]:
    for name, words in SEARCHES.items():
        code, text = _command("plan", *words, "--json")
        answer = json.loads(text) if code == 0 else text
        yield name, _without_times(answer)


_TIMES = ("timings", "took_s", "correction")


def _without_times(value: Any) -> Any:
    """Without what this machine or the clock decides."""
    if isinstance(value, dict):
        return {
            k: _without_times(v) for k, v in value.items() if k not in ("timings", "took_s", "correction")
        }
    return [_without_times(v) for v in value] if isinstance(value, list) else value


# -- exports ----------------------------------------------------------------------------------------------

PLANS = {
    "plain": "{}",
    "checkpointed": "techniques: {activation-checkpointing: {every: 2}, bf16-autocast: {}}",
    "ddp": "ranks: 2\ntechniques: {ddp: {}, gradient-accumulation: {micro_batches: 2}}",
    "fsdp2": "ranks: 4\ntechniques: {fsdp2: {precision: bf16}, activation-checkpointing: {}}",
    "zero 2": "ranks: 2\ntechniques: {zero: {stage: 2}, bf16-autocast: {}}",
    "zero 3": "ranks: 4\ntechniques: {zero: {stage: 3}, activation-checkpointing: {}}",
    "tensor-parallel": "ranks: 4\ntechniques: {tensor-parallel: {degree: 2}, ddp: {}}",
    "pipeline": "ranks: 2\ntechniques: {pipeline: {}, gradient-accumulation: {micro_batches: 4}}",
}
TARGETS = ("torchrun", "slurm", "k8s", "skypilot", "trainer", "torchtitan", "openfold")
ENGINES = ("native", "accelerate", "deepspeed", "fairscale", "megatron")


def exports() -> Iterator[Answer]:
    asked = [(target, "native") for target in TARGETS] + [("torchrun", engine) for engine in ENGINES[1:]]
    with tempfile.TemporaryDirectory() as name:
        out, file = Path(name) / "out", Path(name) / "plan.yaml"
        for (plan, text), (target, engine) in itertools.product(PLANS.items(), asked):
            file.write_text(text)
            job = "alphafold2" if target == "openfold" else "char-lm"
            words = ("--plan", str(file), "--to", target, "--engine", engine, "--out", str(out), "--force")
            code, said = _command("export", job, *words)
            files = sorted(f for f in out.rglob("*") if f.is_file() and f.suffix != ".md")
            answer = {str(f.relative_to(out)): _settings(f.read_text()) for f in files} if code == 0 else said
            yield (
                f"{plan}, {engine}, {target}",
                answer.replace(name, "FOLDER") if isinstance(answer, str) else answer,
            )


# -- findings ---------------------------------------------------------------------------------------------


def findings() -> Iterator[Answer]:
    """Of every set-up that the tests of the rules have."""
    sys.path.insert(0, str(HERE.parent / "tests" / "unit"))
    import test_lint_rules as rules

    tables = {n: t for n, t in vars(rules).items() if n.isupper() and isinstance(t, dict)}
    cases = {f"{n}/{k}": c for n, t in tables.items() for k, c in t.items() if isinstance(c, rules.Case)}
    for name, case in cases.items():
        for side in ("bad", "good"):
            with tempfile.TemporaryDirectory() as folder:
                files = [Path(folder) / n for n, _ in getattr(case, side)]
                for file, (_, text) in zip(files, getattr(case, side), strict=True):
                    file.write_text(text)
                known = ("--ranks", str(case.ranks)) if case.ranks else ()
                _, said = _command("lint", *map(str, files), *known, "--json")
                yield f"{name}, {side}", said.replace(folder, "FOLDER")


# -- record and compare -----------------------------------------------------------------------------------

PARTS: dict[str, Callable[[], Iterator[Answer]]] = {
    "findings": findings,
    "exports": exports,
    "searches": searches,
    "ranks": estimates_on_ranks,
    "estimates": estimates,
}


def _command(*words: str) -> tuple[int, str]:
    """(exit code, what it printed; what it complained of where it printed nothing)."""
    from memfit.cli import main

    out, complaint = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(complaint):
        try:
            code = main(list(words))
        except SystemExit as ended:
            code = int(ended.code or 0)
    return code, out.getvalue() or complaint.getvalue()


def _settings(text: str) -> list[str]:
    """The lines of an exported file, without its comments."""
    return [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]


def record(path: Path, parts: Sequence[str]) -> None:
    answers = json.loads(path.read_text()) if path.exists() else {}
    for part in parts:
        answers[part] = {}
        for name, answer in PARTS[part]():
            answers[part][name] = answer
        print(f"{part}: {len(answers[part])} answers", flush=True)
        path.write_text(json.dumps(answers, indent=1, sort_keys=True, ensure_ascii=False))


def compare(before: Path, after: Path, *, reworded: bool) -> int:
    """How many answers differ; each is printed."""
    one, other = json.loads(before.read_text()), json.loads(after.read_text())
    if reworded:
        one, other = _numbers(one), _numbers(other)
    count = different = 0
    for part in sorted(one.keys() | other.keys()):
        for name in sorted(one.get(part, {}).keys() | other.get(part, {}).keys()):
            a, b = (json.loads(json.dumps(x.get(part, {}).get(name))) for x in (one, other))
            count += 1
            if a != b:
                different += 1
                print(f"{part}: {name}")
                for where, x, y in itertools.islice(_differences(a, b), 5):
                    print(f"   {where or 'the answer'}: {str(x)[:150]} -> {str(y)[:150]}")
    print(f"{count} answers, {different} differ")
    return different


def _numbers(value: Any) -> Any:
    """``value`` with each sentence (a text of at least three words) replaced by the numbers in it, and
    without digests of files, which hold sentences."""
    if isinstance(value, dict):
        return {k: _numbers(v) for k, v in value.items()}
    if isinstance(value, str) and value.startswith(("{", "[")):  # JSON that a command printed
        with contextlib.suppress(json.JSONDecodeError):
            return _numbers(json.loads(value))
    if isinstance(value, str) and len(value.split()) > 2:
        return re.findall(r"\d+(?:[.,]\d+)*", value)
    if isinstance(value, str):
        return re.sub(r"[0-9a-f]{64}", "DIGEST", value)
    return [_numbers(v) for v in value] if isinstance(value, list) else value


def _differences(a: Any, b: Any, where: str = "") -> Iterator[tuple[str, Any, Any]]:
    if isinstance(a, dict) and isinstance(b, dict):
        for key in sorted(a.keys() | b.keys()):
            yield from _differences(a.get(key), b.get(key), f"{where}.{key}".strip("."))
    elif isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        for index, (x, y) in enumerate(zip(a, b, strict=True)):
            yield from _differences(x, y, f"{where}[{index}]")
    elif a != b:
        yield where, a, b


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    commands = parser.add_subparsers(required=True, dest="command")
    recording = commands.add_parser("record")
    recording.add_argument("file", type=Path)
    recording.add_argument("--only", choices=PARTS, nargs="*", default=list(PARTS))
    comparing = commands.add_parser("compare")
    comparing.add_argument("before", type=Path)
    comparing.add_argument("after", type=Path)
    comparing.add_argument("--reworded", action="store_true")
    asked = parser.parse_args()
    if asked.command == "compare":
        return 1 if compare(asked.before, asked.after, reworded=asked.reworded) else 0
    with tempfile.TemporaryDirectory() as home:  # nothing stored on this machine decides an answer
        os.environ |= {"XDG_CACHE_HOME": f"{home}/cache", "XDG_DATA_HOME": f"{home}/data"}
        record(asked.file, asked.only)
    return 0


if __name__ == "__main__":
    sys.exit(main())
