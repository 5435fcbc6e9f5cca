"""A checkpoint that was damaged is never loaded, and one that a stranger made runs nothing."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import pickle
import random
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from memfit.jobs import checkpoints
from memfit.types.errors import MemfitError, UserError
from memfit.types.launch import CheckpointSettings
from memfit.types.plan import Plan

_spec = importlib.util.spec_from_file_location(
    "checkpoint_ranks", Path(__file__).with_name("checkpoint_ranks.py")
)
assert _spec is not None
assert _spec.loader is not None
ranks: Any = importlib.util.module_from_spec(_spec)
sys.modules["checkpoint_ranks"] = ranks
_spec.loader.exec_module(ranks)


def alone(keep: CheckpointSettings, folder: Path) -> Any:
    """One process's plain training."""
    return ranks.Training(dataclasses.replace(ranks.spec(Plan(), keep)), ranks.small(), folder)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the checkpoints after steps 1 and 2."""
    folder = tmp_path_factory.mktemp("saved")
    training = alone(CheckpointSettings(save=str(folder)), folder)
    for done in (1, 2):
        training.losses(done - 1, 1)
        training.keeper.save(done)
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    shutil.copytree(saved, tmp_path / "copy")
    return tmp_path / "copy"


def flip(file: Path, bit: int) -> None:
    data = bytearray(file.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    file.write_bytes(data)


@pytest.mark.parametrize("name", ["__0_0.distcp", ".metadata", "memfit.json"])
def test_every_flipped_bit_is_seen_and_an_older_checkpoint_is_used(folder: Path, name: str) -> None:
    file = folder / "step-00000002" / name
    draw, bits = random.Random(name), 8 * file.stat().st_size
    for _ in range(40):
        bit = draw.randrange(bits)
        flip(file, bit)
        assert checkpoints.why_incomplete(file.parent), f"bit {bit}"
        path, _, passed_over = checkpoints.find(folder)
        assert path.name == "step-00000001"
        assert name in passed_over[0]
        flip(file, bit)
    assert checkpoints.find(folder)[0] == file.parent


def test_a_block_of_zeros_is_seen(folder: Path) -> None:
    file = folder / "step-00000002" / "__0_0.distcp"
    with file.open("r+b") as stream:
        stream.seek(file.stat().st_size // 2)
        stream.write(bytes(512))
    with pytest.raises(UserError, match=r"__0_0\.distcp is damaged: its content is not what was saved"):
        checkpoints.find(file.parent)


def test_a_checkpoint_of_a_version_without_checksums_can_be_resumed(folder: Path) -> None:
    path = folder / "step-00000002"
    _change(path, lambda description: [description.pop(name) for name in ("files_sha256", "sha256")])
    training = alone(CheckpointSettings(resume=str(path)), folder)
    assert training.keeper.restore() == 2


def test_files_outside_the_folder_are_refused(folder: Path) -> None:
    path = folder / "step-00000002"
    _change(path, lambda d: (d["files_bytes"].update({"../x": 1}), d.pop("files_sha256"), d.pop("sha256")))
    assert "names files outside its folder" in checkpoints.why_incomplete(path)


class Attack:
    """Runs code when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.mark),)


@pytest.mark.parametrize("inside", [False, True])
def test_metadata_that_name_a_function_run_nothing(folder: Path, tmp_path: Path, inside: bool) -> None:
    path, mark = folder / "step-00000002", tmp_path / "mark"
    if inside:
        metadata = pickle.loads((path / ".metadata").read_bytes())
        metadata.planner_data = Attack(mark)
        _replace(path, ".metadata", pickle.dumps(metadata))
    else:
        _replace(path, ".metadata", pickle.dumps(Attack(mark)))
    training = alone(CheckpointSettings(resume=str(path)), folder)
    with pytest.raises(UserError, match=r"it names (posix|nt)\.mkdir; nothing in it was run"):
        training.keeper.restore()
    assert not mark.exists()


def test_values_that_name_a_function_run_nothing(folder: Path, tmp_path: Path) -> None:
    """Numbers of the optimizer are stored with torch.save; a stranger can store anything there."""
    import io

    from memfit.runtime.checkpoint_layout import PiecesLoadPlanner
    from memfit.types.errors import first_line

    stream = io.BytesIO()
    torch.save(Attack(tmp_path / "mark"), stream)
    stream.seek(0)
    planner = PiecesLoadPlanner()
    planner.state_dict = {}
    with pytest.raises(pickle.UnpicklingError) as refused:
        planner.load_bytes(_Item(), stream)
    assert "Weights only load failed" in first_line(refused.value)
    assert not (tmp_path / "mark").exists()


class _Item:
    dest_index = type("Index", (), {"fqn": "optimizer.param_groups.x.lr"})


def test_metadata_that_refer_to_another_file_are_refused(folder: Path) -> None:
    path = folder / "step-00000002"
    metadata = pickle.loads((path / ".metadata").read_bytes())
    first = next(iter(metadata.storage_data.values()))
    first.relative_path = "../../secret"
    _replace(path, ".metadata", pickle.dumps(metadata))
    training = alone(CheckpointSettings(resume=str(path)), folder)
    with pytest.raises(UserError, match=r"refers to '\.\./\.\./secret', which is no file of the checkpoint"):
        training.keeper.restore()


@pytest.mark.parametrize("name", [".metadata", "__0_0.distcp"])
def test_damage_that_no_checksum_shows_is_one_line(folder: Path, name: str) -> None:
    path = folder / "step-00000002"
    data = bytearray((path / name).read_bytes())
    data[: len(data) // 2] = bytes(len(data) // 2)
    _replace(path, name, bytes(data))
    training = alone(CheckpointSettings(resume=str(path)), folder)
    with pytest.raises(MemfitError) as refused:
        training.keeper.restore()
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < 800


def _replace(path: Path, name: str, data: bytes) -> None:
    """Put ``data`` into the checkpoint as a stranger would, who writes the description too."""
    (path / name).write_bytes(data)
    _change(
        path, lambda d: (d["files_bytes"].update({name: len(data)}), d.pop("files_sha256"), d.pop("sha256"))
    )


def _change(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    description = json.loads((path / "memfit.json").read_text())
    change(description)
    (path / "memfit.json").write_text(json.dumps(description))
