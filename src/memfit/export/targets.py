"""All export targets by name, and the folder of files that each makes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path

from memfit.export import kubernetes, openfold, skypilot, slurm, torchrun, torchtitan, trainer
from memfit.export.base import Files, Handover
from memfit.export.readme import NAME, readme
from memfit.export.user_settings import with_engine_settings, with_target_settings
from memfit.techniques.rank_mesh import split_batch
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


# Targets for which the library's own program trains, not memfit's worker.
LIBRARIES = frozenset({"trainer", "torchtitan", "openfold"})


def bundle(target: str, handover: Handover) -> Files:
    """Return all files of the export folder, name -> text: those of the target, README.md, and, if the
    script's command line names configuration files of the user, copies of the exported ones under these
    names.

    Raises UserError if the target cannot express the plan or lacks an option that it needs, such as a
    container image; if the batch cannot be split equally over ranks and micro-batches; if the script is
    started with a configuration file of the user that the export does not replace; if a file of the user
    names another file of settings that does not exist; and if one of ``handover.own_files`` has the name of a
    file that memfit writes with another content.
    """
    if handover.config.spec.batch_size:
        split_batch(handover.plan, handover.config.spec.batch_size)
    handover = _without_folders(with_engine_settings(handover))
    files = {**TARGETS[target](handover)}
    if handover.user_files is not None and target in LIBRARIES:
        handover = with_target_settings(handover, TARGETS[target])
        assert handover.kept is not None
        files |= {name: handover.kept.files[name] for name in files}
    files |= _copies_for_script(handover, files)
    files[NAME] = readme(target, handover, files)
    clashing = sorted(n for n, text in handover.own_files.items() if files[n] != text)
    if clashing:
        raise UserError(
            f"your files {', '.join(clashing)} have names of files that memfit writes into the export",
            hint="rename your files",
        )
    return files


def _without_folders(handover: Handover) -> Handover:
    """Return ``handover`` with the arguments of the script as they are inside the export folder, which has no
    subfolders: paths of the user's configuration files are cut to their file names, so that
    ``--config=conf/ds.json`` becomes ``--config=ds.json``. Other words stay."""
    paths = handover.user_files.setup.files if handover.user_files is not None else ()

    def shortened(word: str) -> str:
        return next((Path(path).name for path in paths if _is_path_of(word, path)), word)

    words = ("=".join(map(shortened, word.split("="))) for word in handover.script[1:])
    return dataclasses.replace(handover, script=(*handover.script[:1], *words))


def _is_path_of(word: str, path: str) -> bool:
    """Return whether ``word`` is a path of the file ``path``: its absolute path, or its name with any number
    of the folders directly above it, such as "ds.json" or "conf/ds.json". Parts ".." in ``word`` are
    ignored."""
    parts = tuple(part for part in Path(word).parts if part != "..")
    return bool(parts) and Path(path).absolute().parts[-len(parts) :] == parts


def _copies_for_script(handover: Handover, files: Files) -> Files:
    """Return the exported configurations that the script's arguments name as the user calls them: file name
    of the user's file -> text of the one among ``files`` that replaces it. A file is named by an argument, or
    by a part of one between "=", that equals its name, without folders. Empty if the user gave no files or
    the arguments name none. Raises UserError if an argument names a file of the user that the export does
    not replace."""
    sources = handover.kept.sources if handover.kept is not None else {}
    words = [part for word in handover.script[1:] for part in word.split("=")]
    user_paths = handover.user_files.setup.files if handover.user_files is not None else ()
    if missing := [Path(f).name for f in user_paths if Path(f).name in words and f not in sources.values()]:
        raise UserError(
            f"{handover.script[0]} is started with {missing[0]}, which engine {handover.config.engine} does "
            "not read: the export has no version of this file with the plan's settings, so the run would "
            "train without them",
            allowed="in the command line of --script, of the files given with --from, only those that "
            f"configure engine {handover.config.engine}; or a --to that exports this file",
        )
    return {
        word: files[name]
        for name, path in sources.items()
        for word in words
        if word == Path(path).name and name in files
    }
