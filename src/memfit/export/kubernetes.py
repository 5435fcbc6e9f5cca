"""Export for Kubernetes without an operator: an Indexed Job, a ConfigMap with the files, and a headless
Service through which the pods find the first pod.

Fields are those of batch/v1 and core/v1 (Kubernetes 1.34). Pods of an Indexed Job are named NAME-INDEX.
"""

from __future__ import annotations

from typing import Any

from memfit.export import torchrun
from memfit.export.base import Files, Handover
from memfit.types.errors import UserError

JOB = "job.yaml"
_MOST_BYTES = 1_000_000  # a ConfigMap holds at most 1 MiB
_FILES, _WORK = "/memfit/files", "/memfit/work"
_PORT = 29400
_GPU = "nvidia.com/gpu"

Object = dict[str, Any]


def files(handover: Handover) -> Files:
    """Return the files of the export, name -> text: those of ``torchrun.files`` (torchrun.sh and what every
    node needs beside it), and job.yaml, which also contains their texts. Raises UserError if the container
    image is not one word; if the run saves checkpoints and no volume claim is given or the folder is not an
    absolute path; if a volume claim is given and the run saves no checkpoints; if the files have more than
    1,000,000 bytes together, too many for a ConfigMap; or if the engine's configuration cannot be passed to
    the user's script."""
    if len(handover.image.split()) != 1:
        raise UserError(
            f"--image {handover.image!r} is no image"
            if handover.image
            else "--image is missing, which --to k8s needs",
            allowed="a container image with Python, torch and the packages that the program imports",
            hint="for example --image registry/name:tag",
        )
    if (save_path := handover.config.spec.keep.save) and not (handover.claim and save_path.startswith("/")):
        raise UserError(
            f"with --to k8s, --save {save_path} needs --claim and must be an absolute path",
            allowed="--save /PATH --claim NAME, where NAME is a persistent volume claim that all pods can "
            "mount, at /PATH",
        )
    if handover.claim and not save_path:
        raise UserError(
            "--claim needs --save, as it names the volume for the checkpoints of --save",
            allowed="--save /PATH --claim NAME, or neither",
        )
    carried = torchrun.files(handover)
    if (total_bytes := sum(len(t.encode()) for t in carried.values())) > _MOST_BYTES:
        raise UserError(
            f"--to k8s puts all files of the export into a ConfigMap, but they have {total_bytes} bytes "
            "together, too many for a ConfigMap",
            allowed=f"at most {_MOST_BYTES} bytes",
            hint="--to torchrun, slurm and skypilot have no such limit",
        )
    return {**carried, JOB: text(objects(handover, carried))}


def text(documents: list[Object]) -> str:
    """Return ``documents`` as one YAML text, in their order and without aliases. Strings of several lines are
    written as literal blocks (``|``)."""
    import yaml

    class Dumper(yaml.SafeDumper):
        def ignore_aliases(self, data: Any) -> bool:
            return True

    def block(dumper: yaml.SafeDumper, value: str) -> yaml.ScalarNode:
        style = "|" if "\n" in value else None
        return dumper.represent_scalar("tag:yaml.org,2002:str", value, style=style)

    Dumper.add_representer(str, block)
    return yaml.dump_all(documents, Dumper=Dumper, sort_keys=False, width=1000)


def objects(handover: Handover, carried: Files) -> list[Object]:
    """Return the Kubernetes objects, in this order: a ConfigMap with the files ``carried`` (name -> text), a
    Service and a Job, all named ``handover.name``."""
    name = handover.name
    labels = {"app.kubernetes.io/name": name, "app.kubernetes.io/created-by": "memfit"}
    meta = {"name": name, "labels": labels}
    documents: list[Object] = [
        {"apiVersion": "v1", "kind": "ConfigMap", "metadata": meta, "data": dict(carried)},
        {
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": meta,
            "spec": {
                "clusterIP": "None",  # the service only gives names to pods and has no address
                "publishNotReadyAddresses": True,  # the first pod must be found before it is ready
                "selector": labels,
                "ports": [{"name": "rendezvous", "port": _PORT}],
            },
        },
        {"apiVersion": "batch/v1", "kind": "Job", "metadata": meta, "spec": _job(handover, labels)},
    ]
    return documents


def _job(handover: Handover, labels: dict[str, str]) -> Object:
    return {
        "completionMode": "Indexed",
        "completions": handover.nodes,
        "parallelism": handover.nodes,
        # A failed pod is created again under its name and joins the others, which torchrun restarts.
        "backoffLimit": handover.max_restarts * handover.nodes,
        "template": {"metadata": {"labels": labels}, "spec": _pod(handover)},
    }


def _pod(handover: Handover) -> Object:
    name = handover.name
    claim_volume = {"name": "kept", "persistentVolumeClaim": {"claimName": handover.claim}}
    return {
        "subdomain": name,
        "restartPolicy": "OnFailure",
        "containers": [_container(handover)],
        "volumes": [
            {"name": "files", "configMap": {"name": name}},
            {"name": "work", "emptyDir": {}},
            *([claim_volume] if handover.claim else []),
            # NCCL and data loaders need more shared memory than a container's 64 MiB
            {"name": "shm", "emptyDir": {"medium": "Memory"}},
        ],
    }


def _container(handover: Handover) -> Object:
    name = handover.name
    index = {"fieldRef": {"fieldPath": "metadata.annotations['batch.kubernetes.io/job-completion-index']"}}
    limits = {_GPU: str(handover.per_node)} if handover.on_gpus else {"cpu": str(handover.cpus_per_node)}
    return {
        "name": "node",
        "image": handover.image,
        "workingDir": _WORK,
        # A ConfigMap is read-only and its files are links, so they are copied.
        "command": ["bash", "-c", f"cp -L {_FILES}/* . && exec bash {torchrun.SCRIPT}"],
        "env": [
            {"name": "NODE_RANK", "valueFrom": index},
            {"name": "HEAD_ADDR", "value": f"{name}-0.{name}"},
            {"name": "HEAD_PORT", "value": str(_PORT)},
            {"name": "RUN_ID", "value": name},
        ],
        "resources": {"limits": limits, "requests": limits},
        "volumeMounts": [
            {"name": "files", "mountPath": _FILES, "readOnly": True},
            {"name": "work", "mountPath": _WORK},
            *([{"name": "kept", "mountPath": handover.config.spec.keep.save}] if handover.claim else []),
            {"name": "shm", "mountPath": "/dev/shm"},
        ],
    }
