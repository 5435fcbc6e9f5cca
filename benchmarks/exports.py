"""Every kind of exported folder, run by its own launcher on two CPU ranks: does it train the plan?

    python benchmarks/exports.py [--only WORD]    export, launch, record, write the page
    python benchmarks/exports.py --page           the page from the records only

memfit's worker and the scripts of `tests/engines/handover` check themselves with `memfit.conform`, clipping
included. Slurm, Kubernetes and SkyPilot are stood in for: what they would start on a node is started here.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from memfit.techniques.plan_file import plan_text
from memfit.techniques.registry import make_use
from memfit.types.plan import Plan

HERE = Path(__file__).parent
RECORDS, PAGE = HERE / "records" / "exports.jsonl", HERE / "exports.md"
PROGRAMS = HERE.parent / "tests" / "engines" / "handover"
CHECKPOINTING = {"activation-checkpointing": {}}
TIMEOUT_S = 300
USERS_DEEPSPEED = {
    "gradient_clipping": 0.05,
    "train_micro_batch_size_per_gpu": 4,
    "zero_optimization": {"stage": 2},
    "scheduler": {"type": "WarmupLR", "params": {"warmup_max_lr": 0.001, "warmup_num_steps": 10}},
}
USERS_TRAINER = {
    "output_dir": "mine",
    "learning_rate": 3e-5,
    "max_grad_norm": 0.05,
    "per_device_train_batch_size": 4,
    "weight_decay": 0.1,
    "optim": "adamw_torch",
    "gradient_checkpointing": True,
}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """``script``: of the user, "": memfit's worker; ``user_file``: whose settings are kept; ``clip``: who
    says to what gradients are clipped."""

    target: str
    engine: str
    uses: Mapping[str, Mapping[str, Any]]
    script: str = ""
    user_file: str = ""
    job: str = "my_job.py:job"
    clip: str = "the job"

    @property
    def plan(self) -> Plan:
        return Plan(ranks=2, uses=tuple(make_use(n, k) for n, k in self.uses.items()))

    @property
    def name(self) -> str:
        uses = " + ".join(
            n + (f"({', '.join(f'{k}={v}' for k, v in s.items())})" if s else "")
            for n, s in self.uses.items()
        )
        program = self.script or ("by_trainer.py" if self.target == "trainer" else "worker")
        return f"{self.target}, {self.engine}, {program}: {uses}"


def _rows() -> Iterator[Row]:
    more = {**CHECKPOINTING, "gradient-accumulation": {"micro_batches": 2}}
    for uses in ({"ddp": {}}, {"fsdp2": {}}, {"zero": {"stage": 3}}, {"fsdp2": {}, **more}):
        yield Row(target="torchrun", engine="native", uses=uses)
    for uses in ({"ddp": {}}, {"fsdp2": {}, **CHECKPOINTING}, {"zero": {"stage": 2}}):
        yield Row(target="torchrun", engine="accelerate", uses=uses)
    for stage in (0, 1, 2, 3):
        yield Row(
            target="torchrun",
            engine="deepspeed",
            uses={"zero": {"stage": stage}, **CHECKPOINTING},
            user_file="ds.json",
            clip="ds.json",
        )
    yield Row(target="torchrun", engine="fairscale", uses={"sharded-ddp": {}, **CHECKPOINTING})
    yield Row(target="torchrun", engine="megatron", uses={"ddp": {}}, job="char-lm", clip="nobody")
    yield Row(
        target="torchrun",
        engine="deepspeed",
        uses={"zero": {"stage": 2}, **CHECKPOINTING},
        script="by_deepspeed.py",
        user_file="ds.json",
        clip="ds.json",
    )
    yield Row(
        target="torchrun", engine="accelerate", uses={"ddp": {}, **CHECKPOINTING}, script="by_accelerate.py"
    )
    for target in ("torchrun", "slurm", "k8s", "skypilot"):
        yield Row(target=target, engine="native", uses={"fsdp2": {}, **CHECKPOINTING}, script="by_torch.py")
        if target != "torchrun":
            yield Row(target=target, engine="native", uses={"fsdp2": {}})
    yield Row(
        target="trainer",
        engine="native",
        uses={"ddp": {"bucket_view": False}, **CHECKPOINTING},
        user_file="tr.json",
        clip="tr.json",
    )


ROWS = tuple(_rows())
NOT_RUN = (
    "torchtitan: its trainer asks for a GPU; its own config managers read every exported file (tests)",
    "openfold: its trainer asks for a GPU and its data",
    "megatron with a script: Megatron-LM's pretrain_gpt.py asks for a GPU; its parser reads the file (tests)",
    "colossalai: it is in an environment of its own; the worker's runs there are in engines.md",
    "accelerate with FSDP and a script: on a CPU its `prepare` shards nothing, without a word",
)


def export(row: Row, root: Path) -> Path:
    for file in PROGRAMS.glob("*.py"):
        (root / file.name).write_bytes(file.read_bytes())
    (root / "ds.json").write_text(json.dumps(USERS_DEEPSPEED))
    (root / "tr.json").write_text(json.dumps(USERS_TRAINER))
    (root / "plan.yaml").write_text(plan_text(row.plan))
    words = [row.job, "--plan", "plan.yaml", "--to", row.target, "--engine", row.engine, "--out", "out"]
    words += ["--script", row.script, "--script-applies", "all"] if row.script else []
    words += ["--from", row.user_file, "--ranks", "2"] if row.user_file else []
    words += {"k8s": ["--image", "none"], "skypilot": ["--gpu", "H100"] if row.script else []}.get(
        row.target, []
    )
    words += ["--max-restarts", "0"]
    if row.job == "char-lm":
        words += ["--steps", "2"]
    subprocess.run([sys.executable, "-P", "-m", "memfit", "export", *words], cwd=root, check=True, env=_env())
    return root / "out"


def _env() -> dict[str, str]:
    source = str(HERE.parent / "src")
    return {
        **os.environ,
        "PYTHON": sys.executable,
        "PYTHONPATH": source,
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
        "HEAD_ADDR": "127.0.0.1",
        "LOCAL_ADDR": "127.0.0.1",
    }


def command(row: Row, folder: Path) -> tuple[list[str], dict[str, str]]:
    """What the target's own machinery would start on the one node, and the variables that it sets."""
    if row.target == "slurm":
        stubs = folder / "bin"
        stubs.mkdir()
        texts = {
            "scontrol": "#!/bin/sh\necho localhost\n",
            "srun": '#!/usr/bin/env bash\nwhile [[ "$1" == --* ]]; do shift; done\n'
            'SLURM_NODEID=0 exec "$@"\n',
        }
        for name, text in texts.items():
            (stubs / name).write_text(text)
            (stubs / name).chmod(0o755)
        env = {"SLURM_SUBMIT_DIR": str(folder), "SLURM_JOB_NODELIST": "node", "SLURM_CPUS_PER_TASK": "1"}
        path = f"{stubs}:{os.environ['PATH']}"
        return ["bash", "job.sbatch"], {**env, "SLURM_JOB_ID": str(os.getpid()), "PATH": path}
    if row.target == "k8s":
        documents = {d["kind"]: d for d in yaml.safe_load_all((folder / "job.yaml").read_text())}
        mounted = folder / "mounted"
        mounted.mkdir()
        for name, text in documents["ConfigMap"]["data"].items():
            (mounted / name).write_text(text)
        container = documents["Job"]["spec"]["template"]["spec"]["containers"][0]
        return [w.replace("/memfit/files", str(mounted)) for w in container["command"]], {"NODE_RANK": "0"}
    if row.target == "skypilot":
        task = yaml.safe_load((folder / "task.yaml").read_text())
        env = {"SKYPILOT_NODE_RANK": "0", "SKYPILOT_NODE_IPS": "127.0.0.1", "SKYPILOT_TASK_ID": "a"}
        return ["bash", "-c", task["run"]], env
    if row.target == "trainer":
        for name in ("by_trainer.py", "checks.py"):
            (folder / name).write_bytes((PROGRAMS / name).read_bytes())
        words = (
            "-m torch.distributed.run --standalone --nproc-per-node 2 --tee 3 --log-dir logs by_trainer.py"
        )
        return [sys.executable, *shlex.split(words)], {}
    return ["bash", "torchrun.sh"], {}


def measured(row: Row) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as root:
        folder = export(row, Path(root))
        words, env = command(row, folder)
        begun = time.perf_counter()
        ended = subprocess.run(
            words,
            cwd=folder,
            env={**_env(), **env},
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
            check=False,
        )
        wall_s = time.perf_counter() - begun
        kept = _kept(row, folder)
    text = ended.stdout + ended.stderr
    told = [json.loads(t) for t in re.findall(r"^\[default\d\]:\s?(\{\"event\".*\})$", text, re.M)]
    checks = [t for t in told if t["event"] in ("conformance", "handover")]
    return {
        "row": row.name,
        "plan": row.plan.label,
        "rc": ended.returncode,
        "wall_s": wall_s,
        "kept": kept,
        "ranks": [_of_rank(t) for t in checks],
        "clip": row.clip,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "error": text[-600:] if ended.returncode else "",
    }


def _kept(row: Row, folder: Path) -> bool | None:
    """Whether every value of the user's file that no plan decides is in the exported one."""
    if not row.user_file:
        return None
    user = USERS_DEEPSPEED if row.user_file == "ds.json" else USERS_TRAINER
    written = "deepspeed.json" if row.user_file == "ds.json" else "training_args.json"
    found = json.loads((folder / written).read_text())
    return all(found.get(name) == value for name, value in user.items() if name != "zero_optimization")


def _of_rank(told: Mapping[str, Any]) -> dict[str, Any]:
    """Whether it conforms, whether clipping was seen, and what a careless script was told that it lacks."""
    if "checked" in told:
        return {
            "conforms": True,
            "clipping": "gradient clipping" in told["checked"],
            "careless": told["careless"],
            "unseen": told["unseen"],
        }
    text = told["result"]
    checked, _, unseen = text.partition("; not checked: ")
    return {
        "conforms": text.startswith("as planned"),
        "clipping": "gradient clipping" in checked,
        "careless": None,
        "unseen": [unseen] if unseen else [],
    }


def page(records: list[dict[str, Any]]) -> str:
    known = {r["row"]: r for r in records}
    found = [known[row.name] for row in ROWS if row.name in known]
    good = [
        r for r in found if r["rc"] == 0 and len(r["ranks"]) == 2 and all(x["conforms"] for x in r["ranks"])
    ]
    clipped = [r for r in good if all(x["clipping"] for x in r["ranks"])]
    lines = [
        "# Exports: every folder, run by its own launcher",
        "",
        "Generated by `python benchmarks/exports.py` from `benchmarks/records/exports.jsonl`; do not edit.",
        "",
        f"- {len(found)} of {len(ROWS)} kinds of folder launched on two CPU ranks over gloo",
        f"- {len(good)} train the plan by `memfit.conform` on both ranks",
        f"- clipping was seen to be as said in {len(clipped)}",
        *(f"- not run: {text}" for text in NOT_RUN),
        "",
        "A careless script is the same one without what no exported file applies: what it is told.",
        "",
        "| target, engine, program: plan | code | conforms | clip of | seen | settings kept | careless | s |",
        "|---|--:|---|---|---|---|---|--:|",
    ]
    for r in found:
        ranks = r["ranks"]
        conforms = "yes" if r in good else "**no**"
        seen = "yes" if ranks and all(x["clipping"] for x in ranks) else "no"
        kept = {None: "", True: "yes", False: "**no**"}[r["kept"]]
        careless = ", ".join(ranks[0]["careless"] or ()) if ranks and ranks[0]["careless"] is not None else ""
        lines.append(
            f"| {r['row']} | {r['rc']} | {conforms} | {r['clip']} | {seen} | {kept} | {careless} "
            f"| {r['wall_s']:.0f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="")
    parser.add_argument("--page", action="store_true")
    asked = parser.parse_args()
    records = [json.loads(line) for line in RECORDS.read_text().splitlines()] if RECORDS.exists() else []
    for row in () if asked.page else ROWS:
        if asked.only in row.name:
            print(row.name, flush=True)
            new = measured(row)
            records = [*(r for r in records if r["row"] != row.name), new]
            print(" ", new["rc"], new["ranks"], f"{new['wall_s']:.0f} s", new["error"], flush=True)
            RECORDS.write_text("".join(json.dumps(r) + "\n" for r in records))
    PAGE.write_text(page(records))


if __name__ == "__main__":
    main()
