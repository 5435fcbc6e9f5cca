"""Kubernetes and SkyPilot files: valid by their schemas, with every file unchanged, started as declared."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from test_export import CASES, handover

from memfit.engines.registry import render
from memfit.export.base import Handover
from memfit.export.targets import bundle
from memfit.export.write import write
from memfit.types.errors import UserError
from memfit.types.launch import CheckpointSettings
from memfit.types.plan import Plan

# Writes what the launcher told this rank, then ends.
PROGRAM = """
import os
rank = os.environ["RANK"]
with open(f"{os.environ['TOLD']}/{rank}", "w") as file:
    file.write(" ".join(os.environ[n] for n in ("WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR")))
"""


def scripted(**more: Any) -> Handover:
    given = handover(nodes=2, script=("own.py",), **more)
    return Handover(
        config=given.config,
        nodes=2,
        script=given.script,
        gpu=given.gpu,
        image=given.image,
        own_files={"own.py": PROGRAM},
    )


def documents(handed: Handover) -> dict[str, Any]:
    return {d["kind"]: d for d in yaml.safe_load_all(bundle("k8s", handed)["job.yaml"])}


@pytest.mark.parametrize("given", [handover(nodes=2, image="a/b:1"), scripted(image="a/b:1")])
def test_kubernetes_files_are_valid_by_the_kubernetes_schema(given: Handover) -> None:
    kubernetes = pytest.importorskip("kubernetes_validate", reason="it is an extra of development")
    for document in documents(given).values():
        kubernetes.validate(document, "1.34", strict=True)
    broken = documents(given)["Job"]
    broken["spec"]["template"]["spec"]["containers"][0]["comand"] = []
    with pytest.raises(kubernetes.ValidationError):
        kubernetes.validate(broken, "1.34", strict=True)


@pytest.mark.parametrize(("engine", "plan"), CASES)
def test_the_config_map_holds_every_file_unchanged(engine: str, plan: Plan) -> None:
    given = handover(plan, engine, nodes=2, image="a/b:1")
    held = documents(given)["ConfigMap"]["data"]
    for name, text in {**given.config.files, **given.own_files}.items():
        assert held[name].encode() == text.encode()


@pytest.mark.parametrize(
    "text", ["", "a\n\n", "  indented\n", "tab\tend \n", "no end", "\r\n", "é ☃ \u2028\n", "# {{x}}\n---\n"]
)
def test_any_text_reads_back_unchanged_from_a_config_map(text: str) -> None:
    given = handover(nodes=2, image="a/b:1")
    carried = Handover(config=given.config, nodes=2, image="a/b:1", own_files={"x": text})
    assert documents(carried)["ConfigMap"]["data"]["x"] == text


def test_pods_reach_the_first_pod_by_its_name_in_the_indexed_job() -> None:
    found = documents(handover(nodes=2, image="a/b:1"))
    job, service = found["Job"], found["Service"]
    pod = job["spec"]["template"]["spec"]
    env = {e["name"]: e for e in pod["containers"][0]["env"]}
    name = job["metadata"]["name"]
    assert pod["subdomain"] == service["metadata"]["name"]
    assert env["HEAD_ADDR"]["value"] == f"{name}-0.{pod['subdomain']}"
    assert service["spec"]["selector"].items() <= job["spec"]["template"]["metadata"]["labels"].items()
    assert job["spec"]["completions"] == job["spec"]["parallelism"] == 2
    assert len(name) <= 60


def test_a_container_starts_its_share_of_the_ranks(tmp_path: Path) -> None:
    found = documents(scripted(image="a/b:1"))
    container = found["Job"]["spec"]["template"]["spec"]["containers"][0]
    mounted = tmp_path / "files"
    mounted.mkdir()
    for name, text in found["ConfigMap"]["data"].items():
        (mounted / name).write_text(text)
    command = container["command"][2].replace("/memfit/files", str(mounted))
    known = {e["name"]: e["value"] for e in container["env"] if "value" in e} | {"HEAD_ADDR": "localhost"}
    for node in (0, 1):
        (tmp_path / str(node)).mkdir()
    _start(["bash", "-c", command], [tmp_path / "0", tmp_path / "1"], tmp_path / "told", known)


# Keys of a task and its resources: docs.skypilot.co, "Task YAML", SkyPilot 0.14.1, whose
# own schema (sky.utils.schemas) accepted these files on 2026-11-25.
TASK = {"name", "num_nodes", "workdir", "resources", "setup", "run"}
RESOURCES = {"accelerators", "cpus", "job_recovery"}


@pytest.mark.parametrize("given", [handover(nodes=2), scripted(gpu="H100")])
def test_the_skypilot_task_has_only_known_keys(given: Handover) -> None:
    task = yaml.safe_load(bundle("skypilot", given)["task.yaml"])
    assert task.keys() == TASK
    assert task["resources"].keys() <= RESOURCES
    assert task["num_nodes"] == 2


@pytest.mark.parametrize(
    ("engine", "packages"),
    [
        ("native", "torch, memfit"),
        ("replay", "torch, memfit"),
        ("fairscale", "torch, memfit, fairscale"),
        ("colossalai", "torch, memfit, colossalai"),
        ("megatron", "torch, memfit, megatron.core"),
    ],
)
def test_the_default_setup_imports_the_engines_package(engine: str, packages: str) -> None:
    task = yaml.safe_load(bundle("skypilot", handover(engine=engine))["task.yaml"])
    assert task["setup"] == f"python -c 'import {packages}'\n"


def test_the_skypilot_task_starts_its_share_of_the_ranks(tmp_path: Path) -> None:
    write(tmp_path / "out", bundle("skypilot", scripted(gpu="H100")))
    task = yaml.safe_load((tmp_path / "out" / "task.yaml").read_text())
    known = {"SKYPILOT_NODE_IPS": "127.0.0.1\n127.0.0.1", "SKYPILOT_TASK_ID": "a-b"}
    _start(["bash", "-c", task["run"]], [tmp_path / "out"] * 2, tmp_path / "told", known)


def _start(command: list[str], folders: list[Path], told: Path, known: dict[str, str]) -> None:
    """Start one process per node, all on this machine."""
    told.mkdir()
    port = str(20000 + os.getpid() % 20000)
    here = {"PYTHON": sys.executable, "LOCAL_ADDR": "127.0.0.1", "TOLD": str(told)}
    nodes = [
        subprocess.Popen(
            command,
            cwd=folder,
            env={
                **os.environ,
                **here,
                **known,
                "HEAD_PORT": port,
                "NODE_RANK": str(node),
                "SKYPILOT_NODE_RANK": str(node),
            },
        )
        for node, folder in enumerate(folders)
    ]
    assert [node.wait(100) for node in nodes] == [0, 0]
    assert {f.name: f.read_text() for f in told.iterdir()} == dict.fromkeys("01", "2 1 127.0.0.1")


def test_pods_keep_checkpoints_on_a_persistent_volume_claim() -> None:
    def kept(save: str, claim: str) -> Handover:
        given = handover()
        spec = dataclasses.replace(given.config.spec, keep=CheckpointSettings(save=save, resume=save))
        return Handover(config=render(spec), image="a/b:1", claim=claim)

    pod = documents(kept("/kept", "disk"))["Job"]["spec"]["template"]["spec"]
    assert {"name": "kept", "persistentVolumeClaim": {"claimName": "disk"}} in pod["volumes"]
    assert {"name": "kept", "mountPath": "/kept"} in pod["containers"][0]["volumeMounts"]
    for save, claim in (("/kept", ""), ("kept", "disk")):
        with pytest.raises(UserError, match="needs --claim and must be an absolute path"):
            documents(kept(save, claim))
    with pytest.raises(UserError, match="--claim needs --save"):
        documents(kept("", "disk"))


@pytest.mark.parametrize(
    ("target", "given", "said"),
    [
        ("k8s", handover(nodes=2), "--image is missing"),
        ("k8s", handover(nodes=2, image="a b"), "'a b' is no image"),
        ("skypilot", handover(nodes=2, script=("own.py",)), "--gpu is missing"),
        (
            "k8s",
            Handover(config=handover().config, image="a", own_files={"x": "y" * 2_000_000}),
            "too many for a ConfigMap; allowed: at most 1000000 bytes",
        ),
    ],
)
def test_missing_options_and_too_large_files_are_refused(target: str, given: Handover, said: str) -> None:
    with pytest.raises(UserError, match=said):
        bundle(target, given)


def test_plain_training_on_one_node_can_be_exported() -> None:
    assert documents(handover(Plan(), image="a/b:1"))["Job"]["spec"]["completions"] == 1
