"""Two nodes, of which one dies: does the exported folder train on, with the losses of an undisturbed run?

    python benchmarks/two_nodes.py          (root on Linux, with iproute2)

The protocol was committed before the first run. Two network namespaces of one machine, joined by a virtual
cable, stand for two nodes that share a file system; nothing else is shared: neither has another network than
its loopback interface and the cable. `memfit export --to torchrun --nodes 2` writes the folder, and each node
starts its torchrun.sh as the folder's README.md says. A perceptron of two layers with dropout trains for 40
steps of at least 0.1 s on two gloo ranks, one on each node, with a checkpoint every 5 steps, under each plan
of `PLANS`.

- undisturbed: both nodes train to the end.
- second node dies: when the second node's rank has done step 12, all processes of that node get SIGKILL, the
  launcher's agent among them. As soon as none is left, the node is started again, as a scheduler would do.
- first node dies: the same with the first node, which hosts the rendezvous. The other node's agent then ends;
  when it has, both nodes are started again, as Slurm does when it requeues a job.
- cable is cut: the second node's end of the cable is switched off at step 12 and no process ends. Recorded:
  whether a process ends within 60 s. Then both nodes are killed and started again with the cable on.

A run is recovered if it completes with all 40 losses equal to those of the undisturbed run, bit by bit, and
with one restart from a checkpoint of at least step 10, as `memfit record --add` reads it. All runs are
recorded.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from memfit.cli import main as memfit
from memfit.types.errors import UserError
from memfit.types.result import OutcomeKind
from memfit.workflows.exported_run import read_exported_run

HERE = Path(__file__).parent
RECORDS, PAGE = HERE / "records" / "two_nodes.jsonl", HERE / "two_nodes.md"
STEPS, EVERY, AT_STEP, STEP_S, LIMIT_S, CUT_S = 40, 5, 12, 0.1, 300.0, 60.0
PLANS: Mapping[str, str] = {"DDP": "ddp: {}", "FSDP2": "fsdp2: {}"}
FAULTS = ("second node dies", "first node dies", "cable is cut")
JOB = f"""
import time
import torch
from torch import nn
from memfit import Job

def make_batch(step, seed):
    time.sleep({STEP_S})
    return torch.randn(8, 4, generator=torch.Generator().manual_seed(1000 * seed + step))

job = Job(
    name="small", make_batch=make_batch, loss=lambda m, b: (m(b) - b).square().mean(), batch_size=8,
    build_model=lambda: nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.1), nn.Linear(8, 4)), steps={STEPS},
)
"""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """A network namespace. ``name``: its own; ``address``: of its end of the cable, called "cable"."""

    number: int
    name: str
    address: str

    def run(self, *words: str) -> list[str]:
        return ["ip", "netns", "exec", self.name, *words]

    def pids(self) -> list[int]:
        return list(map(int, _ip("netns", "pids", self.name).split()))

    def start(self, folder: Path, head: Node, output: Path) -> subprocess.Popen[bytes]:
        """Start torchrun.sh of the folder on this node."""
        environment = {
            **os.environ,
            "PYTHON": sys.executable,
            "NODE_RANK": str(self.number),
            "HEAD_ADDR": head.address,
            "LOCAL_ADDR": self.address,
            "GLOO_SOCKET_IFNAME": "cable",
            "OMP_NUM_THREADS": "1",
        }
        with output.open("ab") as file:
            return subprocess.Popen(
                self.run("bash", "torchrun.sh"), cwd=folder, env=environment, stdout=file, stderr=file
            )

    def kill(self) -> None:
        """Kill all processes of the node, and return when none is left."""
        while pids := self.pids():
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.05)


def _ip(*words: str) -> str:
    return subprocess.run(["ip", *words], check=True, capture_output=True, text=True).stdout


def why_not() -> str:
    """Return why this machine cannot make network namespaces; "" if it can."""
    try:
        with nodes():
            return ""
    except FileNotFoundError:
        return "the command ip is not installed (iproute2)"
    except subprocess.CalledProcessError as error:
        return f"network namespaces cannot be made here: {error.stderr.strip()}"


@contextlib.contextmanager
def nodes() -> Iterator[tuple[Node, Node]]:
    """Make two namespaces with a cable between them; at the end kill what runs in them and remove them."""
    both = tuple(Node(number=n, name=f"memfit-{os.getpid()}-{n}", address=f"10.99.0.{n + 1}") for n in (0, 1))
    try:
        for node in both:
            _ip("netns", "add", node.name)
        ends = [("cable", "netns", node.name) for node in both]
        _ip("link", "add", *ends[0], "type", "veth", "peer", "name", *ends[1])
        for node in both:
            _ip("-n", node.name, "address", "add", f"{node.address}/24", "dev", "cable")
            for link in ("lo", "cable"):
                _ip("-n", node.name, "link", "set", link, "up")
        yield both[0], both[1]
    finally:
        names = _ip("netns", "list").split()
        for node in both:
            if node.name in names:
                node.kill()
                _ip("netns", "delete", node.name)


def export(plan: str, folder: Path) -> Path:
    """Export the job with the plan for two nodes, and return the exported folder."""
    folder.mkdir()
    (folder / "job.py").write_text(JOB)
    (folder / "plan.yaml").write_text(f"ranks: 2\ntechniques:\n  {PLANS[plan]}\n")
    words = f"--plan {folder}/plan.yaml --to torchrun --nodes 2 --threads 1 --save kept --save-every {EVERY}"
    out = folder / "out"
    code = memfit(["export", f"{folder}/job.py:job", *words.split(), "--out", str(out)])
    assert code == 0
    return out


def train(plan: str, fault: str, folder: Path) -> dict[str, Any]:
    """Train on two nodes, with ``fault`` ("": none), and return the row of the record, with the losses."""
    out = export(plan, folder)
    with nodes() as both:
        started_s = time.monotonic()
        processes = [node.start(out, both[0], folder / f"node{node.number}.txt") for node in both]
        row: dict[str, Any] = {"plan": plan, "fault": fault}
        if fault:
            row |= _disturb(fault, both, processes, folder)
        codes = [process.wait(LIMIT_S) for process in processes]
        run = read_exported_run(out).run
    measured = run.measurement
    assert measured.ranks is not None or measured.outcome is not OutcomeKind.OK
    return {
        **row,
        "exit_codes": codes,
        "outcome": measured.outcome.value,
        "reason": measured.reason,
        "restarts": [[r.rank, r.reason, r.step, r.first_step] for r in measured.restarts],
        "nodes": measured.ranks.nodes if measured.ranks else None,
        "per_node": measured.ranks.per_node if measured.ranks else None,
        "collectives": measured.ranks.collectives if measured.ranks else None,
        "losses": list(measured.losses),
        "wall_s": round(time.monotonic() - started_s, 1),
    }


def _disturb(
    fault: str, both: tuple[Node, Node], processes: list[subprocess.Popen[bytes]], folder: Path
) -> dict[str, Any]:
    """Do what ``fault`` says, and replace those of ``processes`` that are started again."""
    out = folder / "out"
    victim = 0 if fault == "first node dies" else 1
    _await_step(out, victim)
    cut: dict[str, Any] = {}
    if fault == "cable is cut":
        _ip("-n", both[1].name, "link", "set", "cable", "down")
        cut["noticed_s"] = _first_end(processes, CUT_S)
        for node in both:
            node.kill()
        _ip("-n", both[1].name, "link", "set", "cable", "up")
    else:
        both[victim].kill()
    if victim == 0:  # the other node's agent has lost the rendezvous
        processes[1].wait(LIMIT_S)
    for node, process in zip(both, processes, strict=True):
        if process.poll() is not None or node.number == victim or fault == "cable is cut":
            process.wait(LIMIT_S)
            processes[node.number] = node.start(out, both[0], folder / f"node{node.number}.txt")
    return cut


def _await_step(out: Path, rank: int) -> None:
    """Wait until the rank has done step `AT_STEP`."""
    until_s = time.monotonic() + LIMIT_S
    while time.monotonic() < until_s:
        with contextlib.suppress(UserError):
            run = read_exported_run(out).run
            if run.measurement.first_step + run.measurement.steps_done > AT_STEP:
                return
        time.sleep(0.1)
    raise TimeoutError(f"rank {rank} did not come to step {AT_STEP}")


def _first_end(processes: list[subprocess.Popen[bytes]], limit_s: float) -> float | None:
    """Return after how many seconds the first of the processes ended; None if none did."""
    begun_s = time.monotonic()
    while (passed_s := time.monotonic() - begun_s) < limit_s:
        if any(process.poll() is not None for process in processes):
            return round(passed_s, 1)
        time.sleep(0.2)
    return None


def judged(row: Mapping[str, Any], undisturbed: list[float]) -> dict[str, Any]:
    """Return the row for the record: without losses, with whether they are those of the undisturbed run."""
    is_equal = row["losses"] == undisturbed
    is_recovered = (
        row["outcome"] == "ok" and is_equal and len(row["restarts"]) == 1 and row["restarts"][0][3] >= 10
    )
    rest = {key: value for key, value in row.items() if key != "losses"}
    return {**rest, "losses_equal": is_equal, "recovered": is_recovered}


def page(rows: list[Mapping[str, Any]]) -> str:
    import torch

    lines = [
        "# Two nodes, of which one dies\n",
        "Generated by `python benchmarks/two_nodes.py` from `benchmarks/records/two_nodes.jsonl`; do not",
        "edit. The protocol, at the top of the script, was committed before the first run. Two network",
        "namespaces of one machine, joined by a virtual cable; no second machine and no GPU was there. The",
        "folder is that of",
        f"`memfit export --to torchrun --nodes 2`; torch {torch.__version__}, gloo, {rows[-1]['date']}.\n",
        "| plan | nodes × ranks | fault | restart | recovered, losses bitwise those undisturbed | s |",
        "|---|---|---|---|---|--:|",
    ]
    for row in rows:
        restarts = "; ".join(f"rank {r[0]}: {r[1]}, after {r[2]} steps, from {r[3]}" for r in row["restarts"])
        noticed = ""
        if "noticed_s" in row:
            seconds = row["noticed_s"]
            noticed = (
                f"; noticed by {'nobody in 60 s' if seconds is None else f'a process after {seconds} s'}"
            )
        result = "yes" if row["recovered"] else f"no: {row['outcome']} {row['reason']}"
        lines.append(
            f"| {row['plan']} | {row['nodes']} × {row['per_node']}, {row['collectives']} "
            f"| {row['fault']}{noticed} | {restarts} | {result} | {row['wall_s']:.0f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    if reason := why_not():
        raise SystemExit(reason)
    rows = []
    for plan in PLANS:
        with tempfile.TemporaryDirectory() as temporary:
            undisturbed = train(plan, "", Path(temporary) / "whole")["losses"]
            assert len(undisturbed) == STEPS
            for number, fault in enumerate(FAULTS):
                row = judged(train(plan, fault, Path(temporary) / str(number)), undisturbed)
                row["date"] = datetime.datetime.now(datetime.UTC).date().isoformat()
                rows.append(row)
                print(json.dumps(row), flush=True)
    RECORDS.write_text("".join(json.dumps(row) + "\n" for row in rows))
    PAGE.write_text(page(rows))


if __name__ == "__main__":
    main()
