"""What an earlier version of memfit wrote is still read: store, record, plan file, and public imports."""

from __future__ import annotations

import gzip
import importlib
from pathlib import Path

import pytest

from memfit.cli import main
from memfit.techniques.plan_file import read_plan

DATA = Path(__file__).parents[1] / "data" / "earlier_version"


@pytest.fixture
def store(tmp_path: Path) -> Path:
    path = tmp_path / "store.sqlite3"
    path.write_bytes(gzip.decompress((DATA / "store.sqlite3.gz").read_bytes()))
    return path


@pytest.mark.parametrize("lang", ["en", "ja"])
def test_a_store_of_an_earlier_version_makes_a_report(store: Path, tmp_path: Path, lang: str) -> None:
    page = tmp_path / "report.html"
    assert main(["report", "--store", str(store), "--lang", lang, "--out", str(page)]) == 0
    assert "optimizer-in-backward" in page.read_text(encoding="utf-8")


def test_a_store_of_an_earlier_version_gives_the_same_record(store: Path, tmp_path: Path) -> None:
    assert main(["record", "--store", str(store), "--out", str(tmp_path / "record.json")]) == 0
    assert (tmp_path / "record.json").read_text() == (DATA / "record.json").read_text()


def test_records_of_an_earlier_version_are_compared(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["record", "--compare", str(DATA / "record.json"), str(DATA / "record.json")]) == 0
    assert "optimizer-in-backward" in capsys.readouterr().out


def test_a_plan_file_of_an_earlier_version_is_read() -> None:
    assert read_plan(DATA / "plan.yaml").label == "optimizer-in-backward"


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("memfit", "Job"),
        ("memfit", "Metric"),
        ("memfit", "estimate"),
        ("memfit", "assert_fits"),
        ("memfit", "from_trainer"),
        ("memfit", "conform"),
        ("memfit.techniques.axial", "Axial"),
        ("memfit.integrations.transformers", "MemfitCallback"),
        ("memfit.integrations.lightning", "trainer_arguments"),
        ("memfit.types.plan", "Plan"),
        ("memfit.types.job", "Job"),
    ],
)
def test_public_names_of_an_earlier_version_can_still_be_imported(module: str, name: str) -> None:
    assert hasattr(importlib.import_module(module), name)
