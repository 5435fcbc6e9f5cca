"""The lessons run from start to end, and their questions accept the right answer and no other."""

from __future__ import annotations

import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

LESSONS = Path(__file__).parents[2] / "lessons"
# What a lesson must find when it runs. The letters are decided by what it measures, not written in it.
RIGHT = {
    "01_bet_on_the_peak": "b",
    "02_precision": "b",
    "03_recomputation": "a",
    "04_sharding": "b",
    "05_offload_and_science": "a",
    "06_money_and_reading_a_report": "a",
    "07_operating_a_long_run": "b",
    "08_when_it_dies": "c",
}


@pytest.fixture(autouse=True)
def _as_a_script(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(LESSONS))
    monkeypatch.setattr("sys.argv", ["lesson.py"])


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[] if n.startswith("08") else pytest.mark.long) for n in RIGHT]
)
def test_a_lesson_runs_and_its_question_tells_right_from_wrong(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    import lesson

    question = runpy.run_path(str(LESSONS / f"{name}.py"))["question"]
    assert "Your answer? / 答えは？" in capsys.readouterr().out
    assert question.truth == RIGHT[name], question.because
    assert [question.grade(letter) for letter in lesson.CHOICES] == [
        letter == RIGHT[name] for letter in lesson.CHOICES
    ]
    said = capsys.readouterr().out
    assert said.count("Not right / 不正解") == len(lesson.CHOICES) - 1
    assert question.because in said


def test_a_wrong_answer_ends_a_script_with_exit_code_1_and_no_answer_does_not() -> None:
    import lesson

    question = lesson.Question(truth="a", because="measured")
    lesson.finish(question, None)
    lesson.finish(question, "a")
    with pytest.raises(SystemExit, match="1"):
        lesson.finish(question, "b")
    with pytest.raises(SystemExit, match="1"):
        lesson.finish(question, "z")
    assert question.grade("A")


@pytest.mark.parametrize("given", [["z"], ["answer"], ["a", "b"], [""]], ids=" ".join)
def test_what_is_no_answer_ends_a_script_with_one_line_before_its_lesson_runs(given: list[str]) -> None:
    ended = subprocess.run(
        [sys.executable, str(LESSONS / "08_when_it_dies.py"), *given],
        capture_output=True,
        encoding="utf-8",
        timeout=120,
        check=False,
    )
    assert (ended.returncode, ended.stdout) == (1, "")
    assert ended.stderr.startswith(f"{' '.join(given)!r} is no answer: give one of a, b, c")
    assert ended.stderr.count("\n") == 1


def test_an_answer_may_be_a_capital_letter_and_arguments_of_a_notebook_are_none(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import lesson

    monkeypatch.setattr("sys.argv", [str(LESSONS / "08_when_it_dies.py"), "B"])
    assert lesson.answer() == "b"
    monkeypatch.setattr("sys.argv", ["/usr/lib/ipykernel_launcher.py", "-f", "kernel.json"])
    assert lesson.answer() is None


def test_every_lesson_says_the_same_in_both_languages_and_ends_with_a_question() -> None:
    assert sorted(p.stem for p in LESSONS.glob("[0-9]*.py")) == sorted(RIGHT)
    for name in RIGHT:
        text = (LESSONS / f"{name}.py").read_text(encoding="utf-8")
        languages = re.findall(r'^# %% \[markdown\] lang="(\w+)"$', text, re.MULTILINE)
        assert languages == ["en", "ja"] * (len(languages) // 2), name
        assert len(languages) >= 4, name
        assert "# ## Question\n" in text, name
        assert "# ## 問題\n" in text, name
        assert text.endswith("lesson.finish(question, lesson.answer())\n"), name
