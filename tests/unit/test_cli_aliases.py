"""Old names of commands: each works in this version and names its new form."""

from __future__ import annotations

import json
import shlex

import pytest

from memfit.cli import app, main
from memfit.cli.aliases import ALIASES, rewrite


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("explain", "estimate protein-ss"),
        ("explain --recommended char-lm --html a.html", "estimate char-lm --recommended --html a.html"),
        ("explain a.yaml b.yaml", "estimate a.yaml b.yaml"),
        ("engines char-lm --plan p.yaml", "estimate char-lm --plan p.yaml --engines"),
        ("engines --on=2xL4", "estimate protein-ss --on 2xL4 --engines"),
        (
            "lengths --memory 1GiB n.csv --job char-lm --batch 4",
            "estimate char-lm --lengths n.csv --memory 1GiB --batch 4",
        ),
        ("lengths n.csv", "estimate --lengths n.csv"),
        ("jobs --json", "list jobs --json"),
        ("techniques", "list techniques"),
        ("machines --json H100-SXM", "list machines H100-SXM --json"),
        ("engine", "list engines"),
        ("engine list --json", "list engines --json"),
        ("engine install colossalai --into d", "doctor --install colossalai --into d"),
        ("compare --json a.json b", "record --compare a.json b --json"),
        ("scale --lang ja", "decide --lang ja --gates default"),
        ("scale r.json --pilot L4", "decide r.json --pilot L4"),
        ("scale --help", "decide --help"),
        ("plan jobs", "plan jobs"),
        ("", ""),
    ],
)
def test_an_old_name_is_rewritten_to_its_new_form(old: str, new: str) -> None:
    assert rewrite(shlex.split(old)) == shlex.split(new)


@pytest.mark.parametrize("old", ALIASES)
def test_an_old_name_is_hidden_and_prints_one_line_with_the_new_form(
    old: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([old, "--help"]) == 0
    out, err = capsys.readouterr()
    form = ALIASES[old][0]
    assert err == f"memfit: `memfit {old}` is now `{form}`; the old name works in this version only\n"
    assert old not in [name for commands in app.COMMANDS.values() for name in commands]
    assert out.startswith(f"Usage: {' '.join(form.split()[:2])} ") or old == "engine"


def test_an_old_name_gives_the_answer_of_its_new_form(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["machines", "L4", "--json"]) == 0
    old = json.loads(capsys.readouterr().out)
    assert main(["list", "machines", "L4", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == old


@pytest.mark.parametrize(
    ("typed", "hint"),
    [
        ("explian", "did you mean `memfit estimate JOB` (formerly explain)?"),
        ("machnies", "did you mean `memfit list machines` (formerly machines)?"),
        ("esitmate", "did you mean 'estimate'?"),
        ("zzzz", ""),
    ],
)
def test_a_mistyped_name_is_answered_with_the_nearest_one_and_an_old_one_with_its_new_form(
    typed: str, hint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([typed]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"memfit: unknown command: '{typed}'; allowed: ")
    assert err.endswith(f"; {hint}\n") if hint else "did you mean" not in err


def test_an_unknown_entry_of_the_catalog_gets_one_suggestion(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", "machines", "H900"]) == 2
    assert capsys.readouterr().err.endswith("did you mean H800-SXM, H200-SXM or GH200-96GB?\n")
