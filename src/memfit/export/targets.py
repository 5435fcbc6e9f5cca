"""Every target, by name, and the folder that it makes."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from memfit.export import kubernetes, openfold, skypilot, slurm, torchrun, torchtitan, trainer
from memfit.export.base import Files, Handover
from memfit.export.readme import NAME, readme
from memfit.types.errors import UserError

TARGETS: Mapping[str, Callable[[Handover], Files]] = {
    "torchrun": torchrun.files,
    "slurm": slurm.files,
    "k8s": kubernetes.files,
    "skypilot": skypilot.files,
    "trainer": trainer.files,
    "torchtitan": torchtitan.files,
    "openfold": openfold.files,
}


def bundle(target: str, handover: Handover) -> Files:
    """All files of the folder, name -> text."""
    files = {**TARGETS[target](handover)}
    files[NAME] = readme(target, handover, files)
    changed = sorted(n for n, text in handover.own_files.items() if files[n] != text)
    if changed:
        raise UserError(f"{', '.join(changed)} is what memfit calls its own file", hint="rename yours")
    return files
