"""Print the decision in a terminal: the four answers, the options side by side, and the missing inputs."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.text import Text

from memfit.report.decision import decision_view
from memfit.report.decision_answers import gate_words
from memfit.report.decision_rows import DecisionView, StageRow
from memfit.report.quantities import Figure, figure_text, sentence_text, value_text
from memfit.report.terminal import new_table
from memfit.report.words import Words, load_words
from memfit.types.decision import Decision, Stage
from memfit.types.result import Poc

_COLUMNS = ("initial", "running_per_year", "present_cost", "cost_per_run")


def print_decision(poc: Poc, decision: Decision, *, console: Console, lang: str) -> None:
    """Print, in this order: the answers to the four questions; for which work the options are priced, the
    table of options, how certain the saving is, and what the best option brings, all only if there is a best
    option; and which inputs are missing, if any. Raises UserError for an unknown ``lang``."""
    words, view = load_words(lang), decision_view(poc, decision)
    for name, sentences in view.questions.items():
        console.print(Text(words.get(f"decide.{name}_q"), style="bold"))
        for sentence in sentences:
            text = sentence_text(sentence, words, plans_in_words=True)
            console.print(Text(f"  {text.strip()}"))
    if view.best is not None:
        console.print(Text(_work(decision, words), style="dim"))
        _print_ways(view, console, words)
    for sentence in view.gains:
        console.print(Text(sentence_text(sentence, words)))
    if decision.asked:
        console.print(Text(words.get("decide.asked"), style="bold"))
        for key in decision.asked:
            console.print(Text(f"  {words.get(f'ask.{key}')}  ({key})"))
        console.print(Text(words.get("lead.terms"), style="dim"))


def _work(decision: Decision, words: Words) -> str:
    """Return the text that says for which work all options are priced: size of the job, runs per year, steps
    of a run, and years."""
    amounts = {
        "runs": decision.terms.runs_per_year,
        "steps": decision.steps_per_run,
        "years": decision.terms.years,
    }
    figures = {name: f"{value:,.10g}" for name, value in amounts.items()}
    return words.get("lead.money", size=decision.size or "–", **figures)


def print_gates(gates: Sequence[tuple[str, str, str, bool]], *, console: Console, lang: str) -> None:
    """Print a table with one row for each of ``gates``, which are (name, what was found, limit, whether it
    holds). Raises UserError for an unknown ``lang``."""
    words = load_words(lang)
    columns = ("gate", "found", "limit", "holds")
    table = new_table([words.get(f"gate_column.{name}") for name in columns], left=len(columns))
    for gate in gates:
        result = words.get("stages.holds" if gate[3] else "stages.fails")
        table.add_row(*map(Text, _gate(gate, words)), Text(result, style="" if gate[3] else "red"))
    console.print(table)


def print_gate_end(
    gates: Sequence[tuple[str, str, str, bool]], *, predicted: bool, console: Console, lang: str
) -> None:
    """Print which of ``gates`` (name, what was found, limit, whether it holds) failed, so that the roll-out
    stops. If none failed, print that all hold; and how to have the next stages predicted, unless
    ``predicted`` says that this is already done. Raises UserError for an unknown ``lang``."""
    words = load_words(lang)
    failed = [_gate(gate, words) for gate in gates if not gate[3]]
    if failed:
        reasons = words.get("plan.separator").join(
            words.get("scale.reason", gate=name, found=result) for name, result, _ in failed
        )
        console.print(Text(words.get("scale.stopped", reasons=reasons), style="red"))
    else:
        console.print(Text(words.get("scale.holds")))
        if not predicted:
            console.print(Text(words.get("scale.ask_machines")))


def _gate(gate: tuple[str, str, str, bool], words: Words) -> list[str]:
    return [value_text(part, words) for part in gate_words(gate)]


def print_stages(poc: Poc, decision: Decision, *, console: Console, lang: str) -> None:
    """Print each stage with its machine and plan, its engine, memory and step time if these are known, and
    its money; for the stages after the PoC also when to stop, what to go back to and what to watch. Of a
    stage without a machine, print only that it is not known. Print nothing if the decision has no stages.
    Raises UserError for an unknown ``lang``."""
    words = load_words(lang)
    for row in decision_view(poc, decision).stages:
        stage = row.stage
        state = words.get(f"stage_state.{stage.state}")
        title = words.get("text.with_note", text=words.get(f"stages.{stage.name}"), note=state)
        console.print(Text(title, style="bold"))
        if not stage.machine:
            console.print(Text(f"  {words.get('stages.unknown')}"))
            continue
        colon = words.get("text.colon")
        lines = [("machine", f"{words.of(stage.machine)}{colon}{stage.plan}")]
        lines += [("engine", stage.engine)] if stage.engine else []
        lines += [("memory", _span(row.memory, words))] if stage.memory_bytes else []
        lines += [("step", _span(row.step, words))] if stage.step_s else []
        if stage.name == "poc":
            lines.append(("spent", _amount(figure_text(row.spent, words), stage, words)))
        else:
            is_range = stage.most is not None and stage.most > (stage.to_spend or 0.0)
            amount = _span((row.to_spend, row.most), words) if is_range else figure_text(row.to_spend, words)
            lines.append(("to_spend", _amount(amount, stage, words)))
            lines += [("stop", _stop(row, words))]
            way_back = words.get("stages.back_text")
            if row.back:
                way_back = words.get("stages.back_known", back=sentence_text(row.back, words))
            lines += [("back", way_back), ("watch", words.get("stages.watch_text"))]
        for name, text in lines:
            console.print(Text(f"  {words.get(f'stages.{name}')}{colon}{text}"))


def _amount(amount: str, stage: Stage, words: Words) -> str:
    """Return an amount of money, with a note if it is without labour."""
    note = words.get("stages.without_labour")
    return words.get("text.with_note", text=amount, note=note) if stage.unpaid else amount


def _stop(row: StageRow, words: Words) -> str:
    memory, step = row.stop, row.step[1]
    if memory.value is None or step.value is None:
        return words.get("stages.stop_text")
    placeholders = {"memory": figure_text(memory, words), "step": figure_text(step, words)}
    return words.get("stages.stop_numbers", **placeholders)


def _span(ends: tuple[Figure, Figure], words: Words) -> str:
    return " – ".join(figure_text(end, words) for end in ends)


def _print_ways(view: DecisionView, console: Console, words: Words) -> None:
    names = ("way", *_COLUMNS)
    table = new_table([*(words.get(f"money.{name}") for name in names), words.get("money.saved")])
    for row in (w for w in view.ways if not w.again):
        name = sentence_text(row.name, words)
        notes = [
            words.get("way.plain") if row.plain else row.plan,
            *([f"{words.get('way.untried')} {', '.join(row.untried)}"] if row.untried else []),
            *([words.get("way.best")] if row.best else []),
            *([words.get("way.reference")] if row.reference else []),
            *([] if row.enough else [words.get("way.not_enough")]),
        ]
        if row.slot != "nothing":
            name = words.get("text.with_note", text=name, note=words.get("plan.detail_separator").join(notes))
        figures = [figure_text(row.money[column], words) for column in _COLUMNS]
        saved = "–" if row.saved.value is None else figure_text(row.saved, words)
        table.add_row(Text(name), *map(Text, figures), Text(saved), style="bold" if row.best else "")
    console.print(table)
    if view.best is not None and view.reference is not None and view.best.index == view.reference.index:
        console.print(Text(words.get("uncertainty.same")))
        return
    if view.saved_low.value is not None:
        placeholders = {
            "saved": view.saved,
            "low": view.saved_low,
            "high": view.saved_high,
            "chance": view.chance,
        }
        line = words.get(
            "uncertainty.interval", **{k: figure_text(f, words) for k, f in placeholders.items()}
        )
        console.print(Text(line))
    if view.payback is not None:
        console.print(Text(sentence_text(view.payback, words)))
