"""The guides of docs/guides do what they say: every command of every console block is run, in order.

How a page is followed is in page_reader. A whole command inside a sentence is run after its guide. Blocks
marked ``text`` need a cluster or a GPU: their shell commands are run with stand-ins for Slurm and for torch's
launcher.

All guides in one language share one folder and one store. Two things differ from what a reader does.
A `memfit poc` that an earlier guide ran with the same arguments is not run again: its first output is checked
again. And the managers' guides begin after a PoC that takes minutes, which another test runs
(tests/cpu/test_managers_proof.py): here it is replaced by a record and offers made by hand (report_fixture),
so that the lines of the guides do not change. The file `theirs.json`, which another group would send, is
that record too.
"""

from __future__ import annotations

import dataclasses
import shutil
import sys
from pathlib import Path

import pytest
import report_fixture
from page_reader import Reader, is_whole, missing, steps

from memfit.store import Store, default_path, exchange
from memfit.types.result import Interval, Offer, Poc
from memfit.types.units import GIB

GUIDES = Path(__file__).parents[2] / "docs" / "guides"
MADE = (  # in this order: a platform engineer's guide uses the files of the scientist's
    "scientist.md",
    "platform-engineer.md",
    "scientist.ja.md",
    "platform-engineer.ja.md",
)
MANAGERS = ("manager.md", "manager.ja.md")


def text(guide: str) -> str:
    return (GUIDES / guide).read_text(encoding="utf-8")


def made_by_hand() -> Poc:
    """One 24 GB card that plain training does not fit, and larger ones that it fits."""

    def offer(machine: str, *, plain: bool, fits: bool, step_s: float, power_w: float) -> Offer:
        memory = Interval(value=20.0 * GIB, low=19.0 * GIB, high=21.0 * GIB)
        step = Interval(value=step_s, low=0.9 * step_s, high=1.1 * step_s)
        plan = "plain training" if plain else "checkpointing"
        return Offer(
            machine=machine,
            size="650M",
            plan=plan,
            plain=plain,
            fits=fits,
            memory_bytes=memory,
            step_s=step,
            power_w=power_w,
        )

    offers = (
        offer("RTX-4090", plain=True, fits=False, step_s=1.0, power_w=550.0),
        offer("RTX-4090", plain=False, fits=True, step_s=1.4, power_w=560.0),
        offer("RTX-A6000", plain=True, fits=True, step_s=1.3, power_w=420.0),
        offer("RTX-A6000", plain=False, fits=True, step_s=1.8, power_w=420.0),
        offer("H100-SXM", plain=True, fits=True, step_s=0.3, power_w=1000.0),
        offer("H100-SXM", plain=False, fits=True, step_s=0.4, power_w=1010.0),
    )
    return dataclasses.replace(report_fixture.full_poc(), offers=offers)


@pytest.mark.long
@pytest.mark.timeout(600)  # a proof of concept, on a machine that runs other tests too
@pytest.mark.skipif(sys.platform != "linux", reason="the user's data folder is moved as Linux has it")
def test_every_command_of_the_guides_exits_and_prints_as_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert {p.name for p in GUIDES.glob("*.md")} == {*MADE, *MANAGERS}
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    monkeypatch.setenv("COLUMNS", "110")
    by_hand, reader = made_by_hand(), Reader(capsys)
    folders = {
        language: tmp_path / language for language in ("en", "ja")
    }  # both save files of the same names
    for folder in folders.values():
        folder.mkdir()
        (folder / "theirs.json").write_text(exchange.text(exchange.of_poc(by_hand)), encoding="utf-8")
    in_sentences = 0
    for guide in MADE:
        monkeypatch.chdir(folders["ja" if ".ja." in guide else "en"])
        if guide == "scientist.ja.md":  # the Japanese guides begin where the English ones began
            monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data.ja"))
        reader.follow(guide, text(guide))
        in_sentences += reader.run_those_in_sentences(guide, text(guide))
        if guide == "scientist.md":
            shutil.copytree(tmp_path / "data", tmp_path / "data.ja")
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    assert len(reader.proofs) == 1, "one proof of concept is shared, so that the test is quick"
    for guide in MANAGERS:  # each begins after a PoC of its own
        monkeypatch.chdir(folders["ja" if ".ja." in guide else "en"])
        proof = dataclasses.replace(by_hand, poc_id=f"by-hand-{guide}")
        for kind in ("begin", "poc"):
            Store(default_path()).append(proof.poc_id, kind, proof)
        reader.follow(guide, text(guide))
        in_sentences += reader.run_those_in_sentences(guide, text(guide))
    assert in_sentences >= len(MADE) + len(MANAGERS)


def test_the_guide_reader_finds_missing_output_and_parses_exit_codes() -> None:
    asked = ("doctor", "plan a.py:job --from b.yaml", "decide --gates default", "run --save")
    assert [is_whole(c.split()) for c in asked] == [True, True, False, False]
    assert missing("Peak  3\nGiB, 5 ms", ["Peak 3 GiB ... ms"]) == []
    assert missing("Peak 3 GiB", ["Peak 4 GiB", "GiB"]) == ["Peak 4 GiB"]
    assert list(steps("$ memfit lint a    # exit code 1\nbad\n$ memfit list jobs\n")) == [
        ("memfit lint a", 1, ["bad"]),
        ("memfit list jobs", 0, []),
    ]
