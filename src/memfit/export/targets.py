"""Every target, by name, and the folder that it makes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from memfit.export import kubernetes, openfold, skypilot, slurm, torchrun, torchtitan, trainer
from memfit.export.base import Files, Handover
from memfit.export.readme import NAME, readme
from memfit.export.user_settings import with_engine_settings, with_target_settings
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


LIBRARIES = frozenset(
    {"trainer", "torchtitan", "openfold"}
)  # whose own program trains, no worker of memfit's


def bundle(target: str, handover: Handover) -> Files:
    """All files of the folder, name -> text."""
    handover = with_engine_settings(handover)
    files = {**TARGETS[target](handover)}
    if handover.user_files is not None and target in LIBRARIES:
        handover = with_target_settings(handover, TARGETS[target])
        assert handover.kept is not None
        files |= {name: handover.kept.files[name] for name in files}
    files |= _by_the_users_names(handover, files)
    files[NAME] = readme(target, handover, files)
    changed = sorted(n for n, text in handover.own_files.items() if files[n] != text)
    if changed:
        raise UserError(f"{', '.join(changed)} is what memfit calls its own file", hint="rename yours")
    return files


def _by_the_users_names(handover: Handover, files: Files) -> Files:
    """Configurations that the script's own command line names as the user's file is named. Raises UserError
    for one that is not among the files."""
    sources = handover.kept.sources if handover.kept is not None else {}
    words = [part for word in handover.script[1:] for part in word.split("=")]
    given = handover.user_files.setup.files if handover.user_files is not None else ()
    if missing := [Path(f).name for f in given if Path(f).name in words and f not in sources.values()]:
        raise UserError(
            f"{handover.script[0]} is started with {missing[0]}, which engine {handover.config.engine} does "
            "not read: it would not have the plan's settings",
            allowed=f"configurations of {handover.config.engine}, or another --to",
        )  # fmt: skip
    return {word: files[name] for name, path in sources.items() for word in words
            if word == Path(path).name and name in files}  # fmt: skip
