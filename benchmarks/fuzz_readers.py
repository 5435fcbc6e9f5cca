"""Fuzz every reader of memfit with random files, and count what is no answer of one short line.

    python benchmarks/fuzz_readers.py [--examples N] [--seed S] [READER ...]
    python benchmarks/fuzz_readers.py --guided SECONDS READER       needs `pip install atheris`

The inputs and the property are those of tests/laws/fuzzed_readers.py: memfit's own error of one line of at
most 2,400 characters, or an exit code from 0 to 3 with at most one line on standard error, within 5 s of
processor time and 1 GiB. Each reader gets N examples (default 1,800, of 28 readers) of Hypothesis, drawn with
the seed. Faults are grouped by their place in memfit's source; one example of each is kept.
The records are appended. With --guided, atheris changes the bytes of the valid file so that new branches of
memfit are reached, for that many seconds.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import re
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, Phase, given, seed, settings

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "tests" / "unit"))
_spec = importlib.util.spec_from_file_location("fuzzed_readers", HERE.parent / "tests/laws/fuzzed_readers.py")
assert _spec is not None
assert _spec.loader is not None
fuzzed: Any = importlib.util.module_from_spec(_spec)
sys.modules["fuzzed_readers"] = fuzzed
with contextlib.ExitStack() as _stack:
    if "--guided" in sys.argv:
        import atheris

        _stack.enter_context(atheris.instrument_imports(include=["memfit"]))
    _spec.loader.exec_module(fuzzed)


def fuzz(name: str, examples: int, number: int, folder: Path) -> dict[str, Any]:
    """Return the counts and faults of one reader."""
    reader, faults, counts = fuzzed.READERS[name], dict[str, Any](), {"inputs": 0, "faults": 0}

    @seed(number)
    @settings(
        max_examples=examples, database=None, deadline=None, phases=[Phase.generate], derandomize=False,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(fuzzed.contents(reader))
    def one(content: bytes) -> None:
        counts["inputs"] += 1
        if problem := fuzzed.fault(reader, content, folder):
            counts["faults"] += 1
            key = re.sub(r"'.*?'|\d+", "_", problem)[:60] + problem[-40:]
            faults.setdefault(key, {"problem": problem[:400], "content": content[:300].decode("latin-1")})

    begun = time.process_time()
    one()
    return {
        "reader": name,
        "seed": number,
        **counts,
        "cpu_s": round(time.process_time() - begun, 1),
        "examples": list(faults.values()),
    }


def fuzz_guided(name: str, seconds: int, folder: Path) -> None:
    """Fuzz one reader with atheris, which ends this process. The record is on standard output, in the last
    line that begins with a brace."""
    reader, corpus = fuzzed.READERS[name], folder / "corpus"
    corpus.mkdir()
    (corpus / "valid").write_bytes(fuzzed.written(reader.seed, Path(reader.name).suffix))
    record: dict[str, Any] = {"reader": name, "seed": "guided", "inputs": 0, "faults": 0, "examples": []}
    begun, told = time.process_time(), 0.0

    def one(content: bytes) -> None:
        nonlocal told
        record["inputs"] += 1
        if problem := fuzzed.fault(reader, content, folder):
            record["faults"] += 1
            record["examples"].append({"problem": problem[:400], "content": content[:300].decode("latin-1")})
            del record["examples"][20:]
        if (now := time.process_time()) - told > 5 or problem:
            told, record["cpu_s"] = now, round(now - begun, 1)
            print(json.dumps(record, ensure_ascii=False), flush=True)

    atheris.Setup([sys.argv[0], f"-max_total_time={seconds}", "-max_len=20000", str(corpus)], one)
    atheris.Fuzz()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--examples", type=int, default=1800)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--guided", type=int, metavar="SECONDS")
    parser.add_argument("readers", nargs="*", default=list(fuzzed.READERS))
    options = parser.parse_args()
    records = []
    with tempfile.TemporaryDirectory() as folder:
        if options.guided:
            fuzz_guided(options.readers[0], options.guided, Path(folder))
        for name in options.readers:
            records.append(fuzz(name, options.examples, options.seed, Path(folder)))
            print(json.dumps(records[-1], ensure_ascii=False), flush=True)
    inputs, faults = (sum(r[key] for r in records) for key in ("inputs", "faults"))
    print(f"{inputs} inputs of {len(records)} readers: {faults} faults")
    with (HERE / "records" / "fuzz_readers.jsonl").open("a") as file:
        file.writelines(f"{json.dumps(r)}\n" for r in records)


if __name__ == "__main__":
    main()
