"""A record that is shared says nothing about where it was made, and an ID from a store names no other
folder."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from report_fixture import full_poc

from memfit.cli.app import main
from memfit.report.html import render_html
from memfit.report.words import LANGUAGES
from memfit.store import Store, exchange
from memfit.store.exchange.anonymous import anonymous_command, anonymous_text


@pytest.mark.parametrize(
    ("command", "shared"),
    [
        ("memfit poc /home/alice/secret/train.py:job --seeds 3", "memfit poc train.py:job --seeds 3"),
        ("memfit poc client/train.py:job --out=~/x/r.html", "memfit poc train.py:job --out=r.html"),
        (
            "memfit poc hf:meta-llama/Llama-3.1-8B --memory 2GiB",
            "memfit poc hf:meta-llama/Llama-3.1-8B --memory 2GiB",
        ),
        ("memfit poc hf:/data/bob/model", "memfit poc hf:model"),
        ("memfit poc protein-ss --store 'C:\\Users\\eve\\s.db'", "memfit poc protein-ss --store s.db"),
        ("memfit poc --data alice@node17:/x/d.fa", "memfit poc --data d.fa"),
        ("memfit poc char-lm --note '", "memfit poc char-lm --note '"),
    ],
)
def test_a_shared_command_line_has_no_folders(command: str, shared: str) -> None:
    assert anonymous_command(command) == shared


def test_a_shared_text_has_no_folders_and_no_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.node", lambda: "node17.cluster.example.org")
    text = (
        "read /home/alice/d.fa on node17.cluster.example.org at 3 tokens/s, and/or 1/2 of ~/b.txt; eve@node17"
    )
    assert anonymous_text(text) == "read d.fa on HOST at 3 tokens/s, and/or 1/2 of b.txt; USER@HOST"


def test_the_record_and_the_report_of_a_proof_of_concept_name_no_folder() -> None:
    poc = full_poc()
    first = poc.runs[0]
    failed = dataclasses.replace(first.measurement, reason="cannot read /home/alice/x.fa")
    poc = dataclasses.replace(
        poc,
        runs=(dataclasses.replace(first, measurement=failed), *poc.runs[1:]),
        command="memfit poc /home/alice/train.py:job",
        data_source="sequences of /home/alice/x.fa",
        notes=("the batch of /home/alice/train.py was halved",),
        environment={**poc.environment, "env CUDA_VISIBLE_DEVICES": "/home/alice/mig"},
    )
    text = exchange.text(exchange.of_poc(poc))
    for shared in (text, *(render_html(poc, lang=lang) for lang in LANGUAGES)):
        assert "alice" not in shared
        assert "memfit poc train.py:job" in shared


@pytest.mark.parametrize("poc_id", ["/../../outside", "../x", ".hidden", "a/b", "x" * 81, ""])
def test_an_id_from_a_store_cannot_name_another_folder(
    poc_id: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "in" / "ner"
    folder.mkdir(parents=True)
    monkeypatch.chdir(folder)
    Store(tmp_path / "s.sqlite3").append("p1", "poc", dataclasses.replace(full_poc(), poc_id=poc_id))
    assert main(["report", "--poc", "p1", "--store", str(tmp_path / "s.sqlite3")]) == 2
    assert "allowed: 1 to 80 letters" in capsys.readouterr().err
    assert [p.name for p in tmp_path.rglob("*.html")] == []
