"""Other memory predictors beside memfit on the same runs, in one go.

    python benchmarks/peers_memory.py [--csv FILE] [--source PEER=PATH ...]   measure, ask, record, page
    python benchmarks/peers_memory.py --page                                  the page from the last record

Each peer is installed into an environment of its own (--environments FOLDER keeps them) and asked in a
process of its own; one that cannot be had is said to be not installed. Two are on GitHub: give a clone by
--source eleutherai=.../cookbook/calc/calc_transformer_mem.py and, newer than its package,
--source llm-analysis=.../llm-analysis. Published rows are asked where --csv names their file.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from memory_truth_ranks import SETTLED, WHOLE, Truth, _on_ranks
from peers.facts import Question, to_json
from peers.install import CAVEATS, PEERS, Peer, python_of
from peers.rows import (
    SHARDING,
    cpu_questions,
    published_bytes,
    published_question,
    published_setups,
    rank_question,
    rank_rows,
    run_together,
)
from peers.table import page

from memfit.cost.memory import memory_profile
from memfit.jobs.registry import load
from memfit.store.environment import fingerprint
from memfit.trace.tracer import trace
from memfit.types.machine import Calibration

HERE = Path(__file__).parent
RECORDS, PAGE = HERE / "records" / "peers_memory.jsonl", HERE / "peers_memory.md"
LIMIT_S = 900.0
Row = dict[str, Any]


def main() -> None:
    options = _options()
    torch.set_num_threads(1)
    command = "python benchmarks/peers_memory.py --csv published.csv --source ..."
    if not options.page:
        sources = dict(text.split("=", 1) for text in options.source)
        record = run(options.csv, sources, options.environments, options.only)
        if options.only:
            print(page(record, PEERS, CAVEATS, command))
            return
        with RECORDS.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
    last = json.loads(RECORDS.read_text(encoding="utf-8").splitlines()[-1])
    PAGE.write_text(page(last, PEERS, CAVEATS, command), encoding="utf-8")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--csv", type=Path, metavar="FILE", help="with the columns of published.csv")
    parser.add_argument("--source", action="append", default=[], metavar="PEER=PATH")
    parser.add_argument(
        "--environments", type=Path, metavar="FOLDER", default=Path(tempfile.gettempdir()) / "memfit-peers"
    )
    parser.add_argument(
        "--only", default="", metavar="WORD", help="runs whose name holds this; nothing is recorded"
    )
    parser.add_argument("--page", action="store_true")
    return parser.parse_args()


def run(csv: Path | None, sources: dict[str, str], folder: Path, only: str) -> dict[str, Any]:
    asked = [
        (row, question)
        for part in (_one_process(only), _two_processes(only), _published(csv, only) if csv else [])
        for row, question in part
    ]
    peers = [_with(peer, sources.get(peer.name, ""), folder, asked) for peer in PEERS]
    return {
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "environment": dict(fingerprint()),
        "peers": peers,
        "rows": [row for row, _ in asked],
    }


def _with(peer: Peer, source: str, folder: Path, asked: Sequence[tuple[Row, Question]]) -> dict[str, Any]:
    """Puts the peer's answers into the rows. Returns what is to say of the peer itself."""
    version, failed = "", ""
    if peer.source == "needed" and not Path(source).is_file():
        failed = "not installed: its repository is not a package; see --source"
    else:
        try:
            mine = [(row, q) for row, q in asked if peer.states or row["group"] != "states"]
            told = ask(python_of(peer, folder), peer.name, source, [q for _, q in mine])
            version = told["version"]
            for row, answer in zip((r for r, _ in mine), told["answers"], strict=True):
                row["answers"][peer.name] = answer
        except subprocess.TimeoutExpired:
            failed = f"it failed: no answer in {LIMIT_S:.0f} s"
        except subprocess.CalledProcessError as error:
            stage = "it failed" if "peers.adapters" in error.cmd else "not installed"
            failed = f"{stage}: {_reason(error.stderr or str(error))}"
        except (OSError, IndexError, ValueError) as error:
            failed = f"it failed: {error}"
    print(f"{peer.name} {version}: {failed or 'asked'}", flush=True)
    return {"name": peer.name, "version": version, "failed": failed}


def _reason(text: str) -> str:
    """The last line that calls itself an error, of pip's or Python's many."""
    lines = text.strip().splitlines()
    return next((line for line in reversed(lines) if "error" in line.lower()), lines[-1])[:160]


def ask(python: str, peer: str, source: str, questions: Sequence[Question]) -> dict[str, Any]:
    """Raises CalledProcessError. Peers may print; the last line is ours."""
    path = [str(HERE.parent / "src"), str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(path), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [python, "-W", "ignore", "-m", "peers.adapters", peer, source],
        env=env,
        check=True,
        capture_output=True,
        input=json.dumps([to_json(q) for q in questions]),
        text=True,
        timeout=LIMIT_S,
    )
    told: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return told


def _row(name: str, group: str, measured_bytes: float, memfit: Any, unprobed: Any = None) -> Row:
    """``memfit``, ``unprobed``: an answer, or bytes."""
    answers = {"memfit": memfit, **({} if unprobed is None else {"memfit-unprobed": unprobed})}
    given = {k: v if isinstance(v, dict) else {"bytes": v, "missing": []} for k, v in answers.items()}
    return {"name": name, "group": group, "measured_bytes": measured_bytes, "answers": given}


def _one_process(only: str) -> list[tuple[Row, Question]]:
    questions = [q for q in cpu_questions() if only in q.name]
    if not questions:
        return []
    asked = ("truth", "memfit", "memfit-unprobed")
    told = zip(*(ask(sys.executable, who, "", questions)["answers"] for who in asked), strict=True)
    return [
        (_row(q.name, "one", truth["bytes"], *ours), q)
        for q, (truth, *ours) in zip(questions, told, strict=True)
    ]


def _two_processes(only: str) -> list[tuple[Row, Question]]:
    """As memory_truth_ranks.py measures and predicts; the rank whose median of settled repeats is highest."""
    truth, found = Truth(), []
    for sharding in SHARDING:
        wanted = {r.name for r in rank_rows(sharding) if only in r.name}
        rows = run_together(sharding) if wanted else []
        for row, told in zip(rows, _on_ranks(rows, sharding) if rows else [], strict=True):
            if row.name not in wanted:
                continue
            measured = [statistics.median(r["peaks"]["peak"] for r in rank[:SETTLED]) for rank in told]
            top = measured.index(max(measured))
            traced = trace(load(row.ref), row.plan, rank=top, max_micro_batches=WHOLE)
            ours, bare = truth.peaks(traced), memory_profile(traced, Calibration()).peak_bytes
            states = statistics.median(r["peaks"]["optimizer"] for r in told[top][:SETTLED])
            question = rank_question(row)
            found.append((_row(row.name, "ranks", measured[top], ours["peak"], bare), question))
            found.append((_row(row.name, "states", states, ours["optimizer"]), question))
            print(row.name, ours["peak"] / measured[top] - 1, ours["optimizer"] / states - 1, flush=True)
    return found


def _published(csv: Path, only: str) -> list[tuple[Row, Question]]:
    setups = [s for s in published_setups(csv) if only in s.id]
    questions = [published_question(s) for s in setups]
    ours = ask(sys.executable, "memfit-published", str(csv), questions)["answers"]
    return [
        (_row(s.id, "published", published_bytes(s), told), q)
        for s, q, told in zip(setups, questions, ours, strict=True)
    ]


if __name__ == "__main__":
    main()
