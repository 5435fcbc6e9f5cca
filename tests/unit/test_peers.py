"""The table of other predictors: who is scored on which rows, and how a peer's process answers."""

from __future__ import annotations

import dataclasses
import subprocess
from pathlib import Path
from typing import Any

import peers_memory
import pytest
from peers import adapters
from peers.facts import Facts, Question, from_json, to_json
from peers.install import CAVEATS, PEERS, Peer
from peers.table import error, page, score


def _row(name: str, group: str, memfit: int | None, **peers: Any) -> dict[str, Any]:
    """Measured: 100 bytes. A peer's answer: a number, (number, what is missing), or why it has none."""
    told: dict[str, Any] = {"memfit": {"bytes": memfit, "missing": []} if memfit else {"refused": "not yet"}}
    for peer, answer in peers.items():
        if isinstance(answer, str):
            told[peer] = {"refused": answer}
        else:
            number, missing = answer if isinstance(answer, tuple) else (answer, [])
            told[peer] = {"bytes": number, "missing": missing}
    return {"name": name, "group": group, "measured_bytes": 100, "answers": told}


ROWS = [
    _row("a", "one", 101, fake=150),
    _row("b", "one", 98, fake=90),
    _row("c", "ranks", 104, fake=(500, ["prefetch"])),
    _row("d", "published", 150, fake="knows one device only"),
    _row("e", "published", None, fake=1000),
]


def test_errors_count_only_where_both_express_the_row_in_full() -> None:
    s = score("fake", ROWS)
    assert (s.full, s.part, s.none, s.both) == (3, 1, 1, 2)
    assert s.memfit_worst == pytest.approx(0.02)  # not 0.5 of d, which the peer refuses
    assert s.peer_worst == pytest.approx(0.5)  # not 9 of e, which memfit refuses, nor 4 of c
    assert s.memfit_median == pytest.approx(0.015)
    assert s.peer_median == pytest.approx(0.3)
    assert s.ratio == pytest.approx(0.04)


def test_a_peer_without_rows_has_no_score() -> None:
    s = score("absent", ROWS)
    assert (s.full, s.part, s.none, s.both, s.ratio) == (0, 0, 5, 0, None)
    assert error(ROWS[0], "absent") is None


def test_the_page_tells_a_goal_that_is_not_met_and_a_peer_that_is_not_installed() -> None:
    rows = [*ROWS, _row("f", "one", 120, fake=100)]
    named = [
        {"name": "fake", "version": "1", "failed": ""},
        {"name": "gone", "version": "", "failed": "not installed: x"},
    ]
    record = {"created": "now", "environment": {}, "peers": named, "rows": rows}
    text = page(record, [Peer(name="fake", says="all", called="by name")], ["first"], "run me")
    lines = text.splitlines()
    assert "| fake | 3 | 20.00 % | 20.00 % | 50.0 % | 0.400 | 2.00 % | 10.0 % | 0.2 | **no** |" in lines
    assert "| gone | 0 | - | - | - | - | - | - | 0.2 | - |" in lines
    assert "| fake | 1 | 4 | 1 | 1 | knows one device only (1); prefetch (1) |" in lines
    assert "| gone |  | 0 | 0 | 6 | not installed: x |" in lines
    assert "| memfit |  | 5 | 0 | 1 | not yet (1) |" in lines
    assert "| c | 100 B | +4.00 % | (+400 %) |" in lines
    assert "| e | 100 B | refused | +900.0 % |" in lines


def test_memtracker_need_not_be_beaten_by_five() -> None:
    rows = [_row("a", "one", 101, MemTracker=102, other=102)]
    named = [{"name": n, "version": "", "failed": ""} for n in ("MemTracker", "other")]
    text = page({"created": "", "environment": {}, "peers": named, "rows": rows}, [], [], "")
    assert "| MemTracker | 1 | 1.00 % | 1.00 % | 2.0 % | 0.500 | 1.00 % | 2.0 % | 1 | yes |" in text
    assert "| other | 1 | 1.00 % | 1.00 % | 2.0 % | 0.500 | 1.00 % | 2.0 % | 0.2 | **no** |" in text


def test_questions_cross_the_process_boundary_unchanged() -> None:
    facts = Facts(
        params=1,
        block_params=1,
        layers=1,
        hidden=1,
        heads=1,
        kv_heads=1,
        head_dim=1,
        ffn=1,
        vocab=1,
        gated=True,
        causal=True,
        length=1,
        batch=1,
        lora_targets=("q", "v"),
    )
    for given in (facts, None):
        question = Question(
            name="x",
            build=("cpu", "x"),
            techniques=("lora",),
            compute="float32",
            batch=2,
            shape=(3, 4),
            facts=given,
        )
        assert from_json(to_json(question)) == question


def test_a_peer_that_refuses_or_fails_gives_no_number(monkeypatch: pytest.MonkeyPatch) -> None:
    def fake(question: Question, source: str) -> adapters.Answer:
        if question.ranks > 1:
            raise adapters.Refused("knows one device only")
        return 1000 // question.batch, adapters.lacking(question, "lora")

    monkeypatch.setitem(adapters.PEERS, "fake", fake)
    plain = Question(name="c", build=("cpu", "x"), techniques=(), compute="float32", batch=0)
    asked = [
        dataclasses.replace(plain, name="a", techniques=("lora", "offload", "ddp"), batch=10),
        dataclasses.replace(plain, name="b", ranks=2),
        plain,
    ]
    full, refused, failed = adapters.answers("fake", "", asked)
    assert (full["bytes"], full["missing"]) == (100, ["offload"])
    assert refused == {"name": "b", "refused": "knows one device only"}
    assert failed["refused"].startswith("ZeroDivisionError")


def test_every_peer_is_asked_and_told_of() -> None:
    assert {p.name for p in PEERS} == {
        p for p in adapters.PEERS if p != "truth" and not p.startswith("memfit")
    }
    assert all(p.says and p.called for p in PEERS)
    assert CAVEATS


def test_states_are_scored_apart_and_predictions_without_kernels_are_shown() -> None:
    rows = [_row("a", "ranks", 101, fake=150), _row("a", "states", 102, fake=110)]
    rows[0]["answers"]["memfit-unprobed"] = {"bytes": 90, "missing": []}
    named = [{"name": n, "version": "1", "failed": ""} for n in ("fake", "idle")]
    text = page({"created": "", "environment": {}, "peers": named, "rows": rows}, [], [], "")
    assert "| fake | 1 | 1.00 % | 10.00 % | 50.0 % | 0.020 | 1.00 % | 50.0 % | 0.2 | yes |" in text
    assert "| · states | 1 | 2.00 % | 2.00 % | 10.0 % | 0.200 | 2.00 % | 10.0 % | 0.2 | yes |" in text
    assert "| fake | 1 | 1 | 0 | 0 |  |" in text  # coverage: of runs, each once
    assert "| run | measured | memfit | no kernel run | fake |" in text  # no column for who says nothing


def test_a_peer_that_cannot_be_installed_is_told_with_the_reason(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    told = "Looking in links\nERROR: No matching distribution found for fake\n\nhint: see above\n"

    def refuse(command: list[str], **_: Any) -> None:
        raise subprocess.CalledProcessError(1, command, stderr=told)

    monkeypatch.setattr(subprocess, "run", refuse)
    peer = Peer(name="fake", says="", called="", packages=["fake"])
    assert peers_memory._with(peer, "", tmp_path, [])["failed"] == (
        "not installed: ERROR: No matching distribution found for fake"
    )
    needed = peers_memory._with(dataclasses.replace(peer, source="needed"), "", tmp_path, [])
    assert needed["failed"].startswith("not installed: its repository is not a package")
