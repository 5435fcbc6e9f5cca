"""Fuzzed inputs of memfit's readers. Each reader gets files made of valid ones: values replaced by hostile
ones, keys renamed and removed, bytes changed, cut and repeated."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import pickle
import resource
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from hypothesis import strategies as st
from report_fixture import full_poc
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from memfit.catalog.machine_file import from_toml
from memfit.cli.app import main
from memfit.decision import case, rollout_gates
from memfit.jobs import checkpoints
from memfit.monitoring.limits import limits_of
from memfit.monitoring.prediction import predicted_intervals
from memfit.monitoring.record import read_records
from memfit.report.baseline_file import baseline_text, read_baseline
from memfit.store import Store, exchange
from memfit.techniques.plan_file import read_plan
from memfit.types.baseline import BaselineFile, MemoryBaseline
from memfit.types.errors import MemfitError
from memfit.worker.checkpoint_reader import CheckpointReader
from memfit.workflows.sequence_lengths import read_lengths
from memfit.workflows.size_pairs import read_pairs

LONGEST_LINE, LONGEST_S, MOST_BYTES = 2400, 5.0, 2**30

PLAN = {"ranks": 2, "note": "x", "techniques": {"ddp": {}, "activation-checkpointing": {"every": 1}}}
DEEPSPEED = {
    "train_batch_size": 16,
    "zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}},
    "bf16": {"enabled": True},
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-4, "betas": [0.9, 0.95]}},
}
TRAINER = {
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 2,
    "fp16": True,
    "bf16": True,
    "optim": "adamw_torch",
    "fsdp": "full_shard auto_wrap",
    "fsdp_config": {"transformer_layer_cls_to_wrap": "LlamaDecoderLayer", "activation_checkpointing": True},
    "deepspeed": "ds.json",
}
ACCELERATE = {
    "distributed_type": "FSDP",
    "mixed_precision": "bf16",
    "num_processes": 8,
    "fsdp_config": {"fsdp_sharding_strategy": 1, "fsdp_offload_params": True, "fsdp_version": 2},
}
TITAN = {
    "model": {"name": "llama3", "flavor": "8B"},
    "training": {"seq_len": 4096, "local_batch_size": 2},
    "parallelism": {"data_parallel_shard_degree": 8},
    "activation_checkpoint": {"mode": "full"},
}
LIGHTNING = {"trainer": {"precision": "bf16-mixed", "devices": 8, "strategy": "fsdp"}, "model": {"lr": 0.1}}
LIMITS = {"headroom_ratio": 0.1, "maximum_bytes": "64MiB", "slow_rank_s": 0.01}
PREDICTION = {"estimate": {"allocated_bytes": {"value": 5, "low": 4, "high": 6}, "step_s": 0.1}}
GATES = rollout_gates.Gates().model_dump(exclude_none=True)
CASE = {
    "currency": "USD",
    "place": "japan",
    "work": {"steps_per_run": 10000, "runs_per_year": 12, "years": 5, "utilisation_ratio": 0.7},
    "money": {
        "labour_per_hour": {"value": 25.5, "low": 20, "high": 32, "source": "bill", "date": "2026-05-31"}
    },
    "effort": {"setup_hours": 4},
    "existing": {"machine": "RTX-4090", "machines": 1, "power_w": 500},
}
MACHINE = {
    "name": "lab",
    "hosts": 4,
    "devices_per_host": 2,
    "network": "RoCE-100G",
    "host": "workstation",
    "place": "japan",
    "device": {
        "name": "Custom 48GB",
        "kind": "cuda",
        "architecture": "ada",
        "link": "PCIe4",
        "memory_bytes": {"value": 50e9, "source": "torch", "date": "2025-06-01", "kind": "measured"},
        "peak_flops": {"bfloat16": {"value": 180e12, "source": "data sheet", "date": "2024-03"}},
    },
}
WATCH = b"".join(
    json.dumps(line).encode() + b"\n"
    for line in (
        {"kind": "start", "rank": 0, "world_size": 1, "time_s": 1.0, "prediction": {}, "device": "cpu"},
        {"kind": "step", "step": 0, "time_s": 1.5, "step_s": 0.2, "allocated_bytes": 9, "loss": 2.5},
        {"kind": "step", "step": 1, "time_s": 1.7, "step_s": 0.2, "allocated_bytes": 9, "loss": "nan"},
        {"kind": "alarm", "step": 1, "alarm": "growth", "value": 3.0, "limit": 2.0, "text": "x"},
        {"kind": "end", "time_s": 2.0, "reason": "x"},
        {"kind": "exit", "time_s": 2.0, "code": 1, "oom_kills": 0},
    )
)
LOG = (
    b"step 12 loss 3.2\nTraceback (most recent call last):\n"
    b'  File "/x/train.py", line 5, in <module>\n    loss()\n'
    b"torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of "
    b"23.64 GiB of which 1.06 GiB is free. Process 1 has 22 GiB memory in use. "
    b"Of the allocated memory 20.1 GiB "
    b"is allocated by PyTorch, and 1.2 GiB is reserved by PyTorch but unallocated.\n"
    b"[  12.3] Out of memory: Killed process 77 (python) total-vm:9kB, anon-rss:8kB\n"
)
SCRIPT = (
    b"#!/bin/bash\n#SBATCH --nodes=2\nexport NCCL_DEBUG=INFO\n"
    b"torchrun --nproc-per-node 8 pretrain_gpt.py \\\n"
    b"  --tensor-model-parallel-size 2 --micro-batch-size 4 --bf16 "
    b"--use-distributed-optimizer --seq-length 2048\n"
)
PYTHON = (
    b"import torch\nfrom transformers import TrainingArguments\n"
    b"args = TrainingArguments(output_dir='x', fp16=True, bf16=True,\n"
    b"    per_device_train_batch_size=4, gradient_checkpointing=True, **{'optim': 'adafactor'})\n"
)
MANIFEST = {
    "step": 1,
    "seed": 0,
    "job": "x",
    "plan": "plain",
    "engine": "native",
    "ranks": 1,
    "shapes": {"a": [2, 3]},
    "optimizer": "AdamW",
    "state": ["step"],
    "files_bytes": {"a": 1},
    "files_sha256": {},
    "sha256": "",
}


def lint(path: Path) -> object:
    return main(["lint", str(path)])


def autopsy(path: Path) -> object:
    return main(["autopsy", str(path)])


def record(path: Path) -> object:
    shared = exchange.read(path)
    exchange.text(shared)
    return exchange.compare(shared, shared)


def checkpoint(path: Path) -> object:
    folder = path.with_suffix("")
    folder.mkdir(exist_ok=True)
    path.replace(folder / checkpoints.ABOUT)
    checkpoints.why_incomplete(folder)
    return checkpoints.about(folder)


def _baseline() -> bytes:
    import types
    import typing

    def filled(kind: Any) -> Any:
        origin, arguments = typing.get_origin(kind), typing.get_args(kind)
        if dataclasses.is_dataclass(kind):
            hints = typing.get_type_hints(kind)
            return kind(**{f.name: filled(hints[f.name]) for f in dataclasses.fields(kind)})  # type: ignore[operator]
        if origin in (types.UnionType, typing.Union):
            return filled(arguments[0])
        if origin is tuple:
            return (filled(arguments[0]),)
        if origin is not None:  # a mapping
            return {"a": filled(arguments[1])}
        return {str: "x", int: 5, float: 0.5, bool: True}[kind]

    return baseline_text(BaselineFile(jobs=(filled(MemoryBaseline),))).encode()


def _snapshot() -> bytes:
    block = {"size": 512, "requested_size": 500, "state": "active_allocated", "address": 7, "frames": []}
    segment = {"device": 0, "address": 7, "total_size": 2**21, "stream": 0, "blocks": [block]}
    event = {"action": "oom", "device_free": 5, "size": 2**30, "stream": 0, "frames": [], "time_us": 1}
    return pickle.dumps({"segments": [segment], "device_traces": [[event]]}, 4)


def _npz() -> bytes:
    stream = io.BytesIO()
    np.savez(stream, n=np.array([3, 4, 5]), x=np.zeros((2, 2)))
    return stream.getvalue()


def _metadata() -> bytes:
    size = torch.Size([2, 3])
    chunk = ChunkStorageMetadata(offsets=torch.Size([0, 0]), sizes=size)
    tensor = TensorStorageMetadata(properties=TensorProperties(), size=size, chunks=[chunk])
    place = _StorageInfo(relative_path="__0_0.distcp", offset=0, length=24)
    index = MetadataIndex("model.a", [0, 0])
    return pickle.dumps(
        Metadata({"model.a": tensor, "x": BytesStorageMetadata()}, None, {index: place}, StorageMeta())
    )


def _store() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        stored = Store(Path(folder) / "s.sqlite3")
        stored.append("p", "poc", dataclasses.replace(full_poc(), poc_id="p"))
        return stored.path.read_bytes()


def metadata(path: Path) -> object:
    path.replace(path.with_name(".metadata"))
    return CheckpointReader(path.parent, ["__0_0.distcp"]).read_metadata()


def store(path: Path) -> object:
    return main(["decide", "--json", "--store", str(path)])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reader:
    """``name``: of the file, whose suffix decides how it is read. ``seed``: a valid content, as data that are
    written in the form of the suffix, or as bytes."""

    name: str
    seed: Any
    read: Callable[[Path], object]


READERS: Mapping[str, Reader] = {
    "plan": Reader(name="plan.yaml", seed=PLAN, read=read_plan),
    "lint-deepspeed": Reader(name="ds.json", seed=DEEPSPEED, read=lint),
    "lint-trainer": Reader(name="trainer.yaml", seed=TRAINER, read=lint),
    "lint-accelerate": Reader(name="accelerate.yaml", seed=ACCELERATE, read=lint),
    "lint-lightning": Reader(name="lightning.yaml", seed=LIGHTNING, read=lint),
    "lint-torchtitan": Reader(name="titan.toml", seed=TITAN, read=lint),
    "lint-shell": Reader(name="train.sh", seed=SCRIPT, read=lint),
    "lint-python": Reader(name="train.py", seed=PYTHON, read=lint),
    "limits-toml": Reader(name="limits.toml", seed=LIMITS, read=limits_of),
    "limits-plan": Reader(name="limits.yaml", seed={**PLAN, "watch": LIMITS}, read=limits_of),
    "prediction": Reader(name="prediction.json", seed=PREDICTION, read=predicted_intervals),
    "gates": Reader(name="gates.toml", seed=GATES, read=rollout_gates.read),
    "case": Reader(name="case.toml", seed=CASE, read=case.read),
    "machine": Reader(name="machine.toml", seed=MACHINE, read=from_toml),
    "baseline": Reader(name="baseline.toml", seed=_baseline(), read=read_baseline),
    "record": Reader(
        name="record.json", seed=json.loads(exchange.text(exchange.of_poc(full_poc()))), read=record
    ),
    "checkpoint": Reader(name="memfit.json", seed=MANIFEST, read=checkpoint),
    "watch": Reader(name="watch.jsonl", seed=WATCH, read=read_records),
    "autopsy-watch": Reader(name="watch.jsonl", seed=WATCH, read=autopsy),
    "autopsy-log": Reader(name="train.log", seed=LOG, read=autopsy),
    "autopsy-snapshot": Reader(name="oom.pickle", seed=_snapshot(), read=autopsy),
    "checkpoint-metadata": Reader(name="metadata", seed=_metadata(), read=metadata),
    "lengths-npz": Reader(name="x.npz", seed=_npz(), read=lambda p: read_lengths(str(p))),
    "store": Reader(name="s.sqlite3", seed=_store(), read=store),
    "lengths-text": Reader(name="lengths.txt", seed=b"12\n45\n3\n", read=lambda p: read_lengths(str(p))),
    "lengths-csv": Reader(
        name="lengths.csv", seed=b"id,n\na,12\nb,45\n", read=lambda p: read_lengths(str(p))
    ),
    "lengths-fasta": Reader(
        name="x.fasta", seed=b">a b\nMKVL\n>c\nMK*\n", read=lambda p: read_lengths(str(p))
    ),
    "pairs": Reader(
        name="p.jsonl",
        seed=b'{"a": 1, "b": 2}\n{"a": 3, "b": 4}\n',
        read=lambda p: read_pairs(str(p), ("a", "b")),
    ),
}

HOSTILE = (
    None,
    True,
    False,
    0,
    -1,
    1,
    2**31,
    2**63,
    2**64,
    -(2**63) - 1,
    10**100,
    10**400,
    0.0,
    -0.0,
    1e-300,
    1e308,
    float("inf"),
    float("-inf"),
    float("nan"),
    "",
    " ",
    "\0",
    "\x1b[31m",
    "\u202e",
    "x" * 5000,
    "../../x",
    "/dev/zero",
    "9" * 400,
    "1e999",
    "nan",
    "-1",
    "64MiB",
    "true",
    "null",
    "{}",
    "[]",
    "%s%n",
    "{x}",
    "\n",
    "é",
    "日本",
    [],
    {},
    [[]],
    [None],
    {"": None},
    {"a": {"b": [1, {"c": 2}]}},
    [1] * 300,
)
_scalars = st.sampled_from(HOSTILE) | st.integers() | st.floats() | st.text(max_size=20)
values = st.recursive(
    _scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)


def _places(data: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield place
    items = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    for key, inner in items:
        yield from _places(inner, (*place, key))


def _changed(data: Any, place: tuple[Any, ...], change: Callable[[Any], Any]) -> Any:
    if not place:
        return change(data)
    copy = dict(data) if isinstance(data, dict) else list(data)
    copy[place[0]] = _changed(copy[place[0]], place[1:], change)
    return copy


@st.composite
def changed_data(draw: st.DrawFn, seed: Any) -> Any:
    """Data like ``seed`` with up to three values replaced, keys added, renamed or removed."""
    data = seed
    for _ in range(draw(st.integers(1, 3))):
        place = draw(st.sampled_from(list(_places(data))))
        value = draw(values)
        kind = draw(st.sampled_from(("replace", "replace", "add", "remove", "rename", "nest")))

        def change(old: Any, kind: str = kind, value: Any = value) -> Any:
            if kind == "nest":
                return [old]
            if kind == "replace" or not isinstance(old, dict):
                return value
            if kind == "add":
                return old | {str(value)[:40]: value}
            kept = list(old.items())[1:]
            return dict(kept) if kind == "remove" else dict([*kept, (str(value)[:40], None)])

        data = _changed(data, place, change)
    return data


@st.composite
def changed_bytes(draw: st.DrawFn, seed: bytes) -> bytes:
    """Bytes like ``seed``, up to four times cut, repeated, overwritten or interrupted."""
    data = seed
    for _ in range(draw(st.integers(1, 4))):
        a = draw(st.integers(0, len(data)))
        b = draw(st.integers(a, min(len(data), a + 40)))
        inserted = draw(
            st.binary(max_size=8)
            | st.sampled_from(
                (
                    b"\0",
                    b"\xff\xfe",
                    b"9" * 400,
                    b"[" * 300,
                    b"{",
                    b"&a [*a]",
                    b"\r",
                    b"\n\n",
                    b'"',
                    b"'",
                    b"\\",
                )
            )
        )
        kind = draw(st.sampled_from(("overwrite", "cut", "repeat")))
        middle = {"overwrite": inserted, "cut": b"", "repeat": data[a:b] * draw(st.integers(2, 50))}[kind]
        data = (data[:a] + middle + data[b:])[:200_000]
    return data


def written(data: Any, suffix: str) -> bytes:
    """``data`` in the form of the suffix, as far as it has one."""
    if isinstance(data, bytes):
        return data
    if suffix in (".yaml", ".yml"):
        return yaml.safe_dump(data, allow_unicode=True, sort_keys=False).encode("utf-8", "surrogatepass")
    if suffix == ".toml" and isinstance(data, dict):
        return "".join(f"{_toml_key(k)} = {_toml(v)}\n" for k, v in data.items()).encode(
            "utf-8", "surrogatepass"
        )
    return json.dumps(data).encode()


def _toml(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_toml_key(k)} = {_toml(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_toml, value)) + "]"
    if isinstance(value, float):
        return repr(value)
    return json.dumps("" if value is None else value, ensure_ascii=False)


def _toml_key(key: Any) -> str:
    return json.dumps(str(key), ensure_ascii=False)


def contents(reader: Reader) -> st.SearchStrategy[bytes]:
    """Contents of a file for the reader."""
    if isinstance(reader.seed, bytes):
        return changed_bytes(reader.seed)
    suffix = Path(reader.name).suffix
    as_data = changed_data(reader.seed).map(lambda data: written(data, suffix))
    return as_data | as_data | as_data.flatmap(changed_bytes) | changed_bytes(written(reader.seed, suffix))


def fault(reader: Reader, content: bytes, folder: Path) -> str:
    """Read the content; return what was wrong with that, "" if nothing was: memfit's own error of one short
    line, or an exit code from 0 to 3 with at most one line on standard error, within 5 s of processor time
    and 1
    GiB."""
    path = folder / reader.name
    path.write_bytes(content)
    begun_s, before_kib = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    errors = io.StringIO()
    problem = ""
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(errors):
            code = reader.read(path)
        said = errors.getvalue().splitlines()
        if isinstance(code, int) and not isinstance(code, bool) and (code not in range(4) or len(said) > 1):
            problem = f"exit code {code} and {len(said)} lines: {said[:2]}"
        elif any(len(line) > LONGEST_LINE for line in said):
            problem = f"a line of {max(map(len, said))} characters"
    except MemfitError as error:
        text = str(error)
        problem = "" if len(text) <= LONGEST_LINE else f"a message of {len(text)} characters"
    except Exception as error:  # noqa: BLE001  any is what this looks for
        problem = f"{type(error).__name__}: {error} {_where(error)}"
    took_s = time.process_time() - begun_s
    grown_bytes = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kib)
    if took_s > LONGEST_S:
        problem = problem or f"{took_s:.1f} s"
    return problem or (f"{grown_bytes} more bytes" if grown_bytes > MOST_BYTES else "")


def _where(error: BaseException) -> str:
    places, trace = [], error.__traceback__
    while trace is not None:
        code = trace.tb_frame.f_code
        if "memfit" in code.co_filename:
            places.append(f"{Path(code.co_filename).name}:{trace.tb_lineno}")
        trace = trace.tb_next
    return " > ".join(places[-3:])
