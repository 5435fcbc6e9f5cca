"""Exported files of every target: they are read back, and those that a shell can run are run."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from memfit import engines
from memfit.cli import main
from memfit.cli.export import _file_texts
from memfit.engines.registry import ENGINES, render
from memfit.export import readme
from memfit.export.base import Handover
from memfit.export.targets import TARGETS, bundle
from memfit.export.write import digest, write
from memfit.techniques.plan_file import plan_text, read_plan
from memfit.techniques.registry import make_use
from memfit.types.errors import UserError
from memfit.types.job import JobRef
from memfit.types.launch import RunSpec
from memfit.types.plan import Plan

TINY = Path(__file__).with_name("tiny.py")
DDP = Plan(uses=(make_use("ddp", {}),), ranks=2)
ZERO = Plan(uses=(make_use("zero", {"stage": 2}),), ranks=4)
FSDP = Plan(uses=(make_use("fsdp2", {"precision": "bf16"}),), ranks=4)
CASES = [("native", DDP), ("accelerate", DDP), ("accelerate", FSDP), ("deepspeed", ZERO), ("megatron", DDP)]
CASES += [("fairscale", DDP), ("colossalai", DDP)]
CLUSTERS = ("torchrun", "slurm")


def handover(plan: Plan = DDP, engine: str = "native", **more: object) -> Handover:
    spec = RunSpec(
        name="x",
        role="run",
        job=JobRef(spec="tiny.py:words"),
        plan=plan,
        engine=engine,
        seed=0,
        steps=2,
        batch_size=8,
        evaluate=False,
        threads=1,
    )
    own = {"plan.yaml": plan_text(plan), "tiny.py": TINY.read_text()}
    return Handover(config=render(spec), own_files=own, **more)  # type: ignore[arg-type]


@pytest.mark.parametrize(("engine", "plan"), CASES)
@pytest.mark.parametrize("target", CLUSTERS)
def test_files_of_the_engine_are_exported_unchanged_and_the_plan_reads_back(
    tmp_path: Path, target: str, engine: str, plan: Plan
) -> None:
    given = handover(plan, engine, nodes=2)
    write(tmp_path / "out", bundle(target, given))
    for name, text in given.config.files.items():
        assert (tmp_path / "out" / name).read_bytes() == text.encode()
    assert read_plan(tmp_path / "out" / "plan.yaml") == plan


@pytest.mark.parametrize("target", CLUSTERS)
def test_exported_shell_files_have_valid_syntax(tmp_path: Path, target: str) -> None:
    for nodes, script in ((1, ()), (2, ("train.py", "--text", "it's $HOME"))):
        folder = tmp_path / str(nodes)
        write(folder, bundle(target, handover(nodes=nodes, script=script)))
        for file in (*folder.glob("*.sh"), *folder.glob("*.sbatch")):
            subprocess.run(["bash", "-n", file], check=True)


# --- Slurm


# Some of sbatch's options: `man sbatch`, Slurm 25.05, https://slurm.schedmd.com/sbatch.html, read 2026-11.
SBATCH = {
    "job-name",
    "nodes",
    "ntasks-per-node",
    "cpus-per-task",
    "gpus-per-node",
    "requeue",
    "open-mode",
    "output",
}


def test_slurm_directives_come_first_and_are_known() -> None:
    text = bundle("slurm", handover(nodes=2, script=("train.py",)))["job.sbatch"]
    lines = text.splitlines()
    directives = [line for line in lines if line.startswith("#SBATCH ")]
    assert lines[1 : 1 + len(directives)] == directives
    given = dict(d.removeprefix("#SBATCH --").partition("=")[::2] for d in directives)
    assert given.keys() <= SBATCH
    assert (given["nodes"], given["ntasks-per-node"], given["gpus-per-node"]) == ("2", "1", "1")


_STUBS = {
    # Slurm commands that the script calls: the nodes' names, and one task on each, all on this machine
    "scontrol": '#!/bin/sh\n[ "$1 $2" = "show hostnames" ] && echo localhost && echo second\n',
    "srun": "#!/usr/bin/env bash\n"
    'while [[ "$1" == --* ]]; do shift; done\n'
    'for node in 0 1; do SLURM_NODEID=$node "$@" & tasks+=($!); done\n'
    'for task in "${tasks[@]}"; do wait "$task" || exit 1; done\n',
}


def test_the_sbatch_script_trains_on_two_nodes(tmp_path: Path) -> None:
    folder, stubs = tmp_path / "out", tmp_path / "bin"
    write(folder, bundle("slurm", handover(nodes=2)))
    stubs.mkdir()
    for name, text in _STUBS.items():
        (stubs / name).write_text(text)
        (stubs / name).chmod(0o755)
    slurm = {
        "SLURM_SUBMIT_DIR": str(folder),
        "SLURM_JOB_NODELIST": "node[1-2]",
        "SLURM_CPUS_PER_TASK": "1",
        "SLURM_JOB_ID": str(os.getpid()),
        "LOCAL_ADDR": "127.0.0.1",
    }
    assert _run("job.sbatch", folder, {**slurm, "PATH": f"{stubs}:{os.environ['PATH']}"}) == ["ok", "ok"]


def test_the_sbatch_script_refuses_to_start_from_another_folder(tmp_path: Path) -> None:
    write(tmp_path / "out", bundle("slurm", handover(nodes=2)))
    ended = subprocess.run(
        ["bash", tmp_path / "out" / "job.sbatch"],
        env={**os.environ, "SLURM_SUBMIT_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 2
    assert "submit from the folder" in ended.stderr


def _run(script: str, folder: Path, env: dict[str, str]) -> list[str]:
    """The outcome of each rank, from its own log."""
    source = str(Path(__file__).parents[2] / "src")
    ended = subprocess.run(
        ["bash", script],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
        timeout=200,
        env={**os.environ, "PYTHON": sys.executable, "PYTHONPATH": source, **env},
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    logs = [f.read_text().splitlines() for f in folder.glob("logs/**/stdout.log")]
    told = [json.loads(line) for lines in logs for line in lines if line.startswith('{"event": "result"')]
    assert len({t["measurement"]["weights_digest"] for t in told}) == 1
    return [t["measurement"]["outcome"] for t in told]


# --- torchrun


def test_the_torchrun_script_trains_on_one_node_without_an_address(tmp_path: Path) -> None:
    write(tmp_path / "out", bundle("torchrun", handover(engine="accelerate")))
    assert _run("torchrun.sh", tmp_path / "out", {}) == ["ok", "ok"]


_DIES_ONCE = """
import dataclasses, os, pathlib
from tiny import words, words_batch

def make_batch(step, seed):
    died = pathlib.Path("died")
    if step == 2 and os.environ["RANK"] == "1" and not died.exists():
        died.touch()
        os._exit(1)
    return words_batch(step, seed)

job = dataclasses.replace(words(), make_batch=make_batch)
"""


def test_restarted_ranks_continue_from_the_last_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "plan.yaml").write_text(plan_text(DDP))
    (tmp_path / "mine.py").write_text(_DIES_ONCE)
    (tmp_path / "tiny.py").write_bytes(TINY.read_bytes())
    monkeypatch.chdir(tmp_path)
    asked = "export mine.py:job --plan plan.yaml --to torchrun --out out --steps 4 --save kept --save-every 1"
    monkeypatch.setenv("RANK", "0")
    assert main(asked.split()) == 0
    (tmp_path / "out" / "tiny.py").write_bytes(TINY.read_bytes())
    assert _run("torchrun.sh", tmp_path / "out", {}) == ["ok", "ok"]
    logs = sorted((tmp_path / "out" / "logs").rglob("0/stdout.log"))  # one per attempt
    assert len(logs) == 2
    steps = [re.findall(r'"event": "step".*?"step": (\d+)', log.read_text()) for log in logs]
    assert [step for attempt in steps for step in attempt] == ["0", "1", "2", "3"]


def test_a_users_script_receives_the_engines_configuration(tmp_path: Path) -> None:
    def line(engine: str, plan: Plan, *script: str) -> str:
        return bundle("torchrun", handover(plan, engine, script=script, nodes=2))["torchrun.sh"]

    assert line("deepspeed", ZERO, "train.py").endswith(
        "train.py --deepspeed --deepspeed_config deepspeed.json\n"
    )
    assert "DS_ACCELERATOR" not in line("deepspeed", ZERO, "train.py")  # that is for CPUs
    assert line("deepspeed", ZERO, "train.py", "--config=deepspeed.json").endswith(
        "--config=deepspeed.json\n"
    )
    assert "accelerate.commands.launch --config_file accelerate.yaml" in line("accelerate", FSDP, "train.py")


def test_a_users_script_runs_with_its_arguments(tmp_path: Path) -> None:
    program = "import os, sys\nopen(f\"told{os.environ['RANK']}\", 'w').write(repr(sys.argv[1:]))\n"
    words = ("own.py", "--text", "it's $HOME")
    given = handover(script=words)
    files = {**bundle("torchrun", given), "own.py": program}
    write(tmp_path / "out", files)
    env = {**os.environ, "PYTHON": sys.executable}
    subprocess.run(["bash", tmp_path / "out" / "torchrun.sh"], env=env, check=True, capture_output=True)
    assert [(tmp_path / "out" / f"told{rank}").read_text() for rank in (0, 1)] == [repr(list(words[1:]))] * 2
    assert "run.json" not in files  # memfit's worker is not started


def test_accelerate_launch_accepts_the_exported_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Values that only the cluster knows override the YAML; everything else comes from it."""
    pytest.importorskip("accelerate")
    import shlex

    from accelerate.commands.launch import _validate_launch_command, launch_command_parser

    folder = tmp_path / "out"
    write(folder, bundle("torchrun", handover(FSDP, "accelerate", script=("train.py",), nodes=2)))
    text = (folder / "torchrun.sh").read_text().replace("\\\n", "")
    words = shlex.split(text[text.index("--config_file") :])
    filled = [
        w.replace("$NODE_RANK", "1").replace("$HEAD_ADDR", "first").replace("$HEAD_PORT", "29400")
        for w in words
    ]
    monkeypatch.chdir(folder)
    args, _, _ = _validate_launch_command(launch_command_parser().parse_args(filled))
    assert (args.num_machines, args.num_processes, int(args.machine_rank)) == (2, 4, 1)
    assert (args.main_process_ip, args.rdzv_backend, args.max_restarts) == ("first", "c10d", 3)
    assert args.use_fsdp
    assert args.fsdp_version == 2
    assert args.mixed_precision == "bf16"


def test_ranks_that_do_not_divide_evenly_among_nodes_are_refused() -> None:
    with pytest.raises(
        UserError,
        match="4 ranks cannot be divided evenly among --nodes 3; allowed: numbers of nodes that divide 4: 1",
    ):
        handover(ZERO, "deepspeed", nodes=3)


# --- the folder


def test_writing_overwrites_only_with_force_and_leaves_no_partial_folder(tmp_path: Path) -> None:
    out = tmp_path / "out"
    write(out, {"a": "1", "b": "2"})
    with pytest.raises(UserError, match="already exists"):
        write(out, {"a": "3"})
    (out / "mine").write_text("kept")
    write(out, {"a": "3"}, force=True)
    assert {p.name: p.read_text() for p in out.iterdir() if p.name != "export.json"} == {
        "a": "3",
        "mine": "kept",
    }
    assert json.loads((out / "export.json").read_text())["files"] == {"a": digest("3")}
    with pytest.raises(UserError, match="cannot write"):
        write(tmp_path / "new", {"a": "1", "no/such": "2"})
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_users_file_with_the_name_of_a_generated_file_is_refused() -> None:
    given = handover()
    with pytest.raises(UserError, match=r"run\.json"):
        Handover(config=given.config, own_files={"run.json": ""})
    with pytest.raises(UserError, match=r"torchrun\.sh"):
        bundle("torchrun", Handover(config=given.config, own_files={"torchrun.sh": ""}))


# --- the command


def test_the_export_command_copies_the_users_job_and_overwrites_only_with_force(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "plan.yaml").write_text(plan_text(DDP))
    monkeypatch.chdir(tmp_path)
    command = [
        "export",
        f"{TINY}:words",
        "--plan",
        "plan.yaml",
        "--to",
        "slurm",
        "--nodes",
        "2",
        "--out",
        "out",
    ]
    assert main([*command, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert set(told["files"]) == {
        "README.md",
        "job.sbatch",
        "plan.yaml",
        "run.json",
        "tiny.py",
        "torchrun.sh",
    }
    assert json.loads((tmp_path / "out" / "run.json").read_text())["job"]["spec"] == "tiny.py:words"
    assert (tmp_path / "out" / "tiny.py").read_bytes() == TINY.read_bytes()
    assert main(command) == 2
    assert "already exists" in capsys.readouterr().err
    assert main([*command, "--force"]) == 0


@pytest.mark.parametrize(("engine", "plan"), [("accelerate", DDP), ("deepspeed", ZERO)])
def test_exported_engine_files_equal_those_of_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, engine: str, plan: Plan
) -> None:
    from memfit.workflows import single_run

    class Begun(Exception):
        spec: RunSpec

    def begin(spec: RunSpec, *given: object, **more: object) -> None:
        Begun.spec = spec
        raise Begun

    monkeypatch.setattr(single_run, "run_spec", begin)
    monkeypatch.setattr(single_run, "calibrate", lambda *args, **options: None)  # nothing is timed
    (tmp_path / "plan.yaml").write_text(plan_text(plan))
    asked = [f"{TINY}:words", "--plan", str(tmp_path / "plan.yaml"), "--engine", engine]
    with pytest.raises(Begun):
        main(["run", *asked])
    assert main(["export", *asked, "--to", "torchrun", "--out", str(tmp_path / "out")]) == 0
    ours = {name: text for name, text in render(Begun.spec).files.items() if name != "run.json"}
    assert ours
    for name, text in ours.items():
        assert (tmp_path / "out" / name).read_bytes() == text.encode()


def test_a_megatron_export_passes_the_models_sizes_to_the_users_script(tmp_path: Path) -> None:
    (tmp_path / "plan.yaml").write_text(plan_text(DDP))
    (tmp_path / "pretrain_gpt.py").touch()
    asked = [
        "export",
        "char-lm",
        "--plan",
        str(tmp_path / "plan.yaml"),
        "--engine",
        "megatron",
        "--to=torchrun",
    ]
    out, script = str(tmp_path / "out"), str(tmp_path / "pretrain_gpt.py")
    assert main([*asked, "--script", script, "--out", out]) == 0
    assert "--num-layers 4\n" in (tmp_path / "out" / "megatron.args").read_text()
    started = (tmp_path / "out" / "torchrun.sh").read_text()
    assert started.endswith("pretrain_gpt.py $(cat megatron.args)\n")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--to", "slrum"], "did you mean 'slurm'"),
        (["--to", "slurm", "--nodes", "3"], "nodes that divide 2"),
        (["--to", "slurm", "--engine", "deepsped"], "did you mean 'deepspeed'"),
        (["--to", "slurm", "--engine", "replay"], "does not train, so it cannot be exported"),
        (["--to", "slurm", "--script", "nowhere.py"], "cannot read nowhere.py"),
        (["--to", "slurm", "--script", "train.py 'a b"], "--script is not a valid command line: No closing"),
        (["--to", "slurm", "--script", "train.py \\"], "--script is not a valid command line: No escaped"),
        (["--to", "k8s", "--image", "a/b:1", "--claim", "disk"], "--claim needs --save"),
    ],
)
def test_mistakes_are_reported_in_one_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    said: str,
) -> None:
    (tmp_path / "plan.yaml").write_text(plan_text(DDP))
    monkeypatch.chdir(tmp_path)
    assert main(["export", f"{TINY}:words", "--plan", "plan.yaml", "--out", "out", *words]) == 2
    told = capsys.readouterr().err
    assert said in told
    assert told.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_every_target_says_how_its_files_are_started() -> None:
    assert readme._START.keys() == TARGETS.keys()


def test_every_engine_with_a_folder_has_a_training_step_for_the_worker() -> None:
    folders = [p.parent for p in Path(engines.__file__).parent.glob("*/__init__.py")]
    assert [f.name for f in folders if not (f / "step.py").is_file()] == []


def test_every_engine_but_replay_has_an_export_case() -> None:
    assert {engine for engine, _ in CASES} == ENGINES.keys() - {"replay"}


def test_modules_that_the_job_file_imports_are_copied_and_packages_are_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, text in {
        "jobs.py": "import torch, parts\nfrom layers.norms import Norm\n",
        "parts.py": "from more import x\n",
        "more.py": "import jobs, json\n",
        "other.py": "",
        "layers/__init__.py": "",
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert sorted(_file_texts(tmp_path / "jobs.py")) == ["jobs.py", "more.py", "parts.py"]
    assert "not copied: layers beside jobs.py" in capsys.readouterr().err
