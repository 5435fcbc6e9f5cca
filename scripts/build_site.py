"""Builds the documentation site in English and Japanese: python scripts/build_site.py [--out FOLDER]

Written by hand are the pages of docs/ and docs/site/. Everything that the code knows is generated here: pages
of techniques, engines, lint rules, jobs, integrations, commands and functions. The build fails if something
public has no docstring, if a text is missing in a language, or if a link or an anchor has no target.

The calculator and the gallery, pages of their own (scripts/memory_pages.py), are put into it.
"""

from __future__ import annotations

import argparse
import ast
import html
import inspect
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import memory_pages
import yaml

from memfit.catalog.load import engine_facts
from memfit.cli.app import COMMANDS, app
from memfit.engines.registry import ENGINES
from memfit.jobs.registry import describe
from memfit.lint.check import CHECKS, explain
from memfit.report.words import JAPANESE, LANGUAGES, Words, load_words
from memfit.techniques.registry import TECHNIQUES
from memfit.types.device_kind import device_kinds

ROOT = Path(__file__).parents[1]
DOCS, HAND = ROOT / "docs", ROOT / "docs" / "site"
OUT = ROOT / "build" / "site"
STATIC = ("calculator", "gallery")
TEXTS: Mapping[str, Mapping[str, Any]] = tomllib.loads((HAND / "texts.toml").read_text(encoding="utf-8"))
Pages = dict[str, str]  # path in the site, such as "techniques/lora.md" -> Markdown


class SiteError(Exception):
    """What keeps the site from being built, one fault a line."""


# -- pages written by hand -----------------------------------------------------------------------------------


def hand_written() -> dict[Path, tuple[str, str]]:
    """Return file of the repository -> (language, path in that language's site), for every page that is
    written by hand."""
    places = {ROOT / "README.md": ("en", "overview.md")}
    for name in ("CHANGELOG", "CONTRIBUTING", "SECURITY"):
        places[ROOT / f"{name}.md"] = ("en", f"project/{name.lower()}.md")
    for folder, place in ((".", "manual"), ("decisions", "decisions"), ("guides", "guides")):
        for file in sorted((DOCS / folder).glob("*.md")):
            language = "ja" if file.name.endswith(".ja.md") else "en"
            places[file] = (language, f"{place}/{file.name.replace('.ja.md', '.md')}")
    for file in sorted(ROOT.glob("benchmarks/**/*.md")):
        places[file] = ("en", f"evidence/{file.relative_to(ROOT / 'benchmarks').as_posix()}")
    for language in LANGUAGES:
        for file in sorted((HAND / language).rglob("*.md")):
            places[file] = (language, file.relative_to(HAND / language).as_posix())
    return places


def relinked(file: Path, places: Mapping[Path, tuple[str, str]], known: Mapping[str, set[str]]) -> str:
    """Return the text of a page written by hand with links that fit the site.

    Pages of docs/site link as the site is laid out, all others as the repository is. A link to a file that is
    no page, such as a module, becomes its label. A page that only the other language has is linked there.
    """
    language, here = places[file]

    def link(match: re.Match[str]) -> str:
        label, target, anchor = match[2], match[3], match[4] or ""
        if not target or re.match(r"[a-z]+:", target):
            return match[0]
        in_site = os.path.normpath(Path(here).parent / target)
        goal = Path(os.path.normpath(file.parent / unquote(target)))
        if HAND not in file.parents:
            if goal in places:
                return f"[{label}]({linked(*places[goal], language, here)}{anchor})"
            if goal.suffix == ".png":
                return f"![{label}]({relative(f'images/{goal.name}', here)})"
            return label if goal.exists() else match[0]
        others = [name for name in LANGUAGES if in_site in known[name] and in_site not in known[language]]
        return f"[{label}]({linked(others[0], in_site, language, here)}{anchor})" if others else match[0]

    pattern = re.compile(r"!?\[((?:[^\[\]]|!?\[[^\]]*\]\([^)]*\))*)\]\(([^)#\s]*)(#[^)\s]*)?\)")
    pattern = re.compile(pattern.pattern.replace("!?", "(!?)", 1))
    fenced = re.split(r"(^```.*?^```)", file.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    return "".join(part if part.startswith("```") else pattern.sub(link, part) for part in fenced)


def relative(path: str, here: str) -> str:
    """Return the link to ``path`` in a page at ``here``; both are paths in the site."""
    return os.path.relpath(path, Path(here).parent)


def linked(to_language: str, path: str, language: str, here: str) -> str:
    """Return the link to a page of either language. One to the other language is a placeholder that `build`
    replaces in the finished site, as each language is built on its own."""
    if to_language == language:
        return relative(path, here)
    return f"https://{to_language}.memfit.invalid/{built_name(path)}"


# -- pages generated from the code ---------------------------------------------------------------------------


class Writer:
    """Generates the pages of one language."""

    def __init__(self, language: str) -> None:
        self.language = language
        self.texts = TEXTS[language]
        self.words = load_words(language)
        self.pages: Pages = {}

    def say(self, key: str, **values: object) -> str:
        return str(self.texts["label"][key]).format(**values)

    def add(self, path: str, title: str, *parts: str) -> None:
        self.pages[path] = f"# {title}\n\n" + "\n\n".join(part for part in parts if part) + "\n"

    def index(self, folder: str, rows: Sequence[Sequence[str]], *more: str) -> None:
        """Add the page that lists the pages of a folder: a lead and a table."""
        section = self.texts["section"][folder]
        self.add(
            f"{folder}/index.md", section["title"], section["lead"], table(section["columns"], rows), *more
        )

    # -- techniques

    def techniques(self) -> None:
        rows = []
        for t in TECHNIQUES.values():
            name = title_of(self.words, t.name)
            effect = f"{t.effect.label}: {self.words.get(f'effect.{t.effect.label}')}"
            rows.append((f"[{name}]({t.name}.md)", f"`{t.name}`", effect))
            knobs = [
                (f"`{k.name}`", f"`{k.default}`" if k.default != "" else "", cell(k.allowed), cell(k.doc))
                for k in t.knobs
            ]
            forbids = ", ".join(
                f"[`{other}`]({other}.md)" if other in TECHNIQUES else f"`{other}`" for other in t.forbids
            )
            engines = ", ".join(
                f"[`{e.name}`](../engines/{e.name}.md)" for e in ENGINES.values() if t.name in e.known
            )
            kinds = [kind.name for kind in device_kinds() if t.supports(kind)]
            facts = [
                (self.say("plan_name"), f"`{t.name}`"),
                (self.say("effect"), f"[{effect}](../concepts.md#{self.say('effect_anchor')})"),
                (self.say("needs"), ", ".join(f"`{p}`" for p in t.needs)),
                (self.say("forbids"), forbids),
                (self.say("devices"), ", ".join(kinds) if len(kinds) < len(device_kinds()) else ""),
                (self.say("engines"), engines),
            ]
            self.add(
                f"techniques/{t.name}.md",
                name,
                self.words.get(f"technique.{t.name}.picture"),
                f"*{self.say('summary')}*: {t.summary}.",
                self.measured(t.name),
                f"## {self.say('avoid')}\n\n{self.words.get(f'technique.{t.name}.avoid')}",
                f"## {self.say('facts')}\n\n" + listed(facts),
                f"## {self.say('settings')}\n\n" + table(self.texts["settings_columns"], knobs)
                if knobs
                else "",
                f"## {self.say('try')}\n\n```yaml\n# plan.yaml\n{plan_text(t.name)}```\n\n```sh\n"
                f"memfit estimate {tried_on(t.name)} --plan plan.yaml\n```",
            )
        self.index("techniques", rows)

    def measured(self, name: str) -> str:
        """Return the section on what was measured with a technique alone."""
        memory, ranks, times = records_of(name)
        parts = self.measured_alone(name)
        if memory:
            rows = [
                (
                    architecture,
                    plan,
                    mib(plain),
                    mib(peak),
                    bar(peak / plain, self.say("of_plain", share=percent(peak / plain))),
                )
                for architecture, plan, plain, peak in memory
            ]
            parts += [self.say("measured_memory"), table(self.texts["memory_columns"], rows)]
        if ranks:
            rows = [(job, plan, mib(measured), mib(predicted)) for job, plan, measured, predicted in ranks]
            parts += [self.say("measured_ranks"), table(self.texts["ranks_columns"], rows)]
        if times:
            rows = [
                (architecture, what, percent(share), f"{ratio:.2f}")
                for architecture, what, share, ratio in times
            ]
            parts += [self.say("measured_time"), table(self.texts["time_columns"], rows)]
        return "\n\n".join([f"## {self.say('measured')}", *parts])

    def measured_alone(self, name: str) -> list[str]:
        """Return a sentence and a picture of the peaks of each phase without and with the technique; or the
        sentence that says why it cannot run on a processor, or that there is no record of it."""
        row = next((r for r in reversed(records("techniques")) if r["technique"] == name), None)
        if row is None:
            return [self.say("not_measured")]
        if "error" in row:
            return [self.say("cannot_run", reason=escaped(row["error"]))]
        plain_s, step_s = row["step_s"]
        plain, plan = row["plans"]
        sentence = self.say(
            "measured_alone", job=row["job"], plain=plain, plan=plan, ratio=f"{step_s / plain_s:.2f}"
        )
        most = max(row["peak_bytes"])
        rows = [
            (
                self.say(f"phase_{phase}"),
                *(bar(side[phase] / most, mib(side[phase])) for side in row["phase_bytes"]),
            )
            for phase in row["phase_bytes"][0]
        ]
        return [sentence, table(self.texts["phase_columns"], rows)]

    # -- engines, jobs, rules

    def engines(self) -> None:
        rows = []
        for e in ENGINES.values():
            summary = e.summary if self.language == "en" else self.texts["engine"][e.name]
            rows.append((f"[`{e.name}`]({e.name}.md)", cell(summary)))
            applied = [(self.say("carries"), e.carries), (self.say("by_memfit"), e.applied_by_memfit)]
            facts = [
                (
                    self.say("tested"),
                    self.say("range", low=e.tested[0], high=e.tested[1]) if e.tested[0] else "",
                ),
                (self.say("install"), f"`{e.install}`" if e.install else ""),
                (self.say("saves"), self.say("yes") if e.saves else self.say("no")),
                (self.say("tried_on"), ", ".join(sorted(e.tried_on))),
                *(
                    (label, ", ".join(f"[`{n}`](../techniques/{n}.md)" for n in TECHNIQUES if n in names))
                    for label, names in applied
                ),
            ]
            upkeep = [
                (self.texts["fact"].get(key, key), cell(self.upkeep(key, value)), f"{cell(source)} ({date})")
                for key, (value, source, date) in engine_facts(e.name).items()
            ]
            job = "char-lm" if e.name == "megatron" else "protein-lm"  # which trains a GPT of its own kind
            self.add(
                f"engines/{e.name}.md",
                f"`{e.name}`",
                self.say("sentence", text=summary),
                listed(facts),
                f"## {self.say('upkeep')}\n\n" + table(self.texts["upkeep_columns"], upkeep)
                if upkeep
                else "",
                f"## {self.say('use')}\n\n```sh\nmemfit estimate {job} --engines\n"
                f"memfit run {job} --engine {e.name}\n```",
            )
        self.index("engines", rows)

    def upkeep(self, key: str, value: str) -> str:
        """Return a fact of an engine's release in the language of the pages: the catalog's words translated,
        numbers and names as they are. Raises SiteError for words without a translation."""
        if self.language == "en" or key not in ("status", "builds"):
            return value
        if value not in (known := self.texts["engine_upkeep"]):
            raise SiteError(f"docs/site/texts.toml has no [{self.language}.engine_upkeep] for: {value}")
        return str(known[value])

    def jobs(self) -> None:
        rows = []
        for job in describe():
            title = self.words.of(job.title)
            rows.append((f"[`{job.name}`]({job.name}.md)", cell(title)))
            self.add(
                f"jobs/{job.name}.md",
                f"`{job.name}`",
                self.say("sentence", text=title),
                listed(
                    [
                        (self.say("data"), escaped(self.words.of(job.data_source))),
                        (self.say("sizes"), ", ".join(f"`{size}`" for size in job.sizes)),
                    ]
                ),
                f"```sh\nmemfit estimate {job.name}\nmemfit poc {job.name} --seeds 1\n```",
                self.say("job_evidence"),
            )
        self.index("jobs", rows)

    def rules(self) -> None:
        rows = []
        for name in CHECKS:
            rule = explain(name, lang=self.language)
            severity = self.words.get(f"lint.{rule.severity}")
            rows.append((f"[`{name}`]({name}.md)", severity, cell(rule.says)))
            self.add(
                f"lint/{name}.md",
                f"`{name}`",
                f"**{severity}** ({', '.join(rule.kinds)}): {escaped(rule.says)}",
                f"{escaped(rule.do)}",
                f"## {self.say('when')}\n\n{rule.when}",
                f"## {self.say('links')}\n\n" + "\n".join(f"- <{link}>" for link in rule.links),
                f"```sh\nmemfit lint --explain {name}\n```",
            )
        self.index("lint", rows)

    # -- integrations, commands, functions

    def integrations(self) -> None:
        rows = []
        for file in sorted((ROOT / "src/memfit/integrations").glob("[a-z]*.py")):
            if file.stem == "record":  # the common part of the callbacks
                continue
            text = self.texts["integration"][file.stem]
            rows.append((f"[{text['title']}]({file.stem}.md)", f"`memfit.integrations.{file.stem}`"))
            module = ast.parse(file.read_text(encoding="utf-8"))
            public = [n for n in module.body if is_public(n)]
            self.add(
                f"integrations/{file.stem}.md",
                text["title"],
                text["lead"],
                prose(docstring(module, file.stem)),
                f"## {self.say('reference')}" if public else "",
                *(described(node, f"memfit.integrations.{file.stem}") for node in public),
            )
        self.index("integrations", rows, self.say("more_integrations"))

    def commands(self) -> None:
        import typer.main

        group, rows = typer.main.get_command(app), []
        for task, commands in COMMANDS.items():
            for name, (_, line) in commands.items():
                command = group.commands[name]  # type: ignore[attr-defined]
                rows.append((f"[`memfit {name}`]({name}.md)", task, cell(line)))
                parameters = [
                    (
                        " ".join(f"`{part}`" for part in spelling(p) if part),
                        cell(getattr(p, "help", "") or ""),
                    )
                    for p in command.params
                ]
                self.add(
                    f"commands/{name}.md",
                    f"memfit {name}",
                    prose(command.help or ""),
                    table(("option", "what it does"), parameters),
                )
        self.index("commands", rows)

    def functions(self) -> None:
        rows = []
        for title, module, names in API:
            for name in names or public_names(module):
                node = definition(module, name)
                first = prose(docstring(node, name)).split("\n\n")[0].replace("\n", " ").replace("|", "\\|")
                rows.append((f"[`{title}.{name}`](#{name.lower()})", first))
        self.index(
            "api",
            rows,
            *(
                described(definition(m, n), t, heading=True)
                for t, m, names in API
                for n in names or public_names(m)
            ),
        )


# The names of an empty tuple are those of the module's __all__.
API: Sequence[tuple[str, str, tuple[str, ...]]] = (
    ("memfit", "memfit", ()),
    ("memfit.types.result", "memfit.types.result", ("Estimate", "Interval")),
    ("memfit.monitoring.record", "memfit.monitoring.record", ("read_records",)),
)
Definition = ast.ClassDef | ast.FunctionDef


def spelling(parameter: Any) -> tuple[str, ...]:
    """Return how a parameter is written: the names of an option and its value, or an argument."""
    is_option = parameter.param_type_name == "option"
    return (" ".join(parameter.opts + parameter.secondary_opts) if is_option else "", parameter.metavar or "")


def source(module: str) -> ast.Module:
    path = ROOT / "src" / module.replace(".", "/")
    file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    return ast.parse(file.read_text(encoding="utf-8"))


def public_names(module: str) -> list[str]:
    for node in source(module).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return list(ast.literal_eval(node.value))
    raise SiteError(f"{module} has no __all__")


def definition(module: str, name: str) -> Definition:
    """Return the class or function that a module means by a name, wherever it is defined."""
    for node in ast.walk(source(module)):
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name == name:
            return node
        if (
            isinstance(node, ast.ImportFrom)
            and node.module
            and name in {a.asname or a.name for a in node.names}
        ):
            return definition(node.module, name)
    raise SiteError(f"{module}.{name} is not defined")


def is_public(node: ast.AST) -> bool:
    return isinstance(node, Definition) and not node.name.startswith(("_", "on_", "pytest_"))


def docstring(node: Definition | ast.Module, name: str) -> str:
    text = ast.get_docstring(node)
    if not text:
        raise SiteError(f"{name} has no docstring")
    return text


def described(node: Definition, title: str, *, heading: bool = False) -> str:
    """Return heading, signature and docstring of a class or function, with the public methods of a class."""
    head = f"## {title}.{node.name} {{#{node.name.lower()}}}" if heading else f"### {node.name}"
    parts = [head, f"```python\n{signature(node)}\n```", prose(docstring(node, f"{title}.{node.name}"))]
    for inner in node.body if isinstance(node, ast.ClassDef) else ():
        if is_public(inner):
            text = prose(docstring(inner, f"{title}.{node.name}.{inner.name}"))
            parts.append(f"```python\n{signature(inner)}\n```\n\n{text}")
    return "\n\n".join(parts)


def signature(node: Definition) -> str:
    """Return the line of a function without its body, or of a class with its public fields."""
    if isinstance(node, ast.FunctionDef):
        decorators = [f"@{d}\n" for d in map(ast.unparse, node.decorator_list) if d == "property"]
        returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
        line = f"def {node.name}({ast.unparse(node.args)}){returns}"
        if len(line) > 88:
            line = f"def {node.name}(\n    {split_arguments(ast.unparse(node.args))},\n){returns}"
        return "".join(decorators) + line
    fields = [
        ast.unparse(n)
        for n in node.body
        if isinstance(n, ast.AnnAssign) and not ast.unparse(n.target).startswith("_")
    ]
    return "\n    ".join([f"class {node.name}:", *fields]) if fields else f"class {node.name}"


def split_arguments(text: str) -> str:
    """Return arguments one a line: they are split at commas outside of brackets and quotes."""
    depth, quote, lines = 0, "", [""]
    for character in text:
        quote = "" if character == quote else quote or (character if character in "'\"" else "")
        depth += 0 if quote else (character in "([{") - (character in ")]}")
        if character == "," and not depth and not quote:
            lines.append("")
        else:
            lines[-1] += character
    return ",\n    ".join(line.strip() for line in lines)


def prose(text: str) -> str:
    """Return a docstring as Markdown: literal blocks lose the colons before them, lists get an empty line,
    and < and & outside of code are no HTML."""
    text = re.sub(r"(?m)^::$\n", "", inspect.cleandoc(text))
    text = re.sub(r"(?m)::$", ":", text)
    text = re.sub(r"(?m)^(?!- |  )(.+)\n(?=- )", r"\1\n\n", text)
    pieces = re.split(r"(``[^`]*``|`[^`]*`|^    .*$)", text, flags=re.MULTILINE)
    return "".join(
        piece if piece[:1] == "`" or piece[:4] == "    " else html.escape(piece, quote=False)
        for piece in pieces
    )


# -- records of measurements ---------------------------------------------------------------------------------


def records(name: str) -> list[dict[str, Any]]:
    text = (ROOT / "benchmarks" / "records" / f"{name}.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def records_of(
    name: str,
) -> tuple[
    list[tuple[str, str, int, int]], list[tuple[str, str, int, int]], list[tuple[str, str, float, float]]
]:
    """Return what was measured with the technique ``name`` alone: (architecture, plan, peak of plain
    training, peak); (job and ranks, plan, measured and predicted peak of the fullest rank); (architecture,
    plan, share of plain training's peak, step time by plain training's)."""
    rows = records("memory_truth")[-1]["rows"]
    plain = {r["architecture"]: r["measured_bytes"] for r in rows if r["plan"] == "plain"}
    memory = [
        (r["architecture"], f"`{r['plan']}`", plain[r["architecture"]], r["measured_bytes"])
        for r in rows
        if is_alone(r["plan"], name) and r["measured_bytes"] and r["architecture"] in plain
    ]
    latest = {r["name"]: r for r in records("memory_truth_ranks")}
    ranks = []
    for label, r in latest.items():
        job, _, plan = label.rpartition(": ")
        if is_alone(plan, name) and r.get("repeats"):
            measured = max(settled_peak(runs) for runs in r["repeats"])
            ranks.append((job, f"`{plan}`", measured, max(rank["peak"] for rank in r["predicted"])))
    times = []
    kind = {"activation-checkpointing": "every k-th block", "optimal-checkpointing": "memfit"}.get(name)
    for architecture in {r["architecture"]["name"]: r["architecture"] for r in records("recompute")}.values():
        plain_row = next(row for row in architecture["rows"] if row["label"] == "plain")
        rows = [row for row in architecture["rows"] if row["kind"] == kind]
        if rows:  # of several plans the one with the smallest peak
            row = min(rows, key=lambda row: row["peak_bytes"])
            ratio = statistics.median(row["step_s"]) / statistics.median(plain_row["step_s"])
            times.append(
                (architecture["name"], row["label"], row["peak_bytes"] / plain_row["peak_bytes"], ratio)
            )
    return memory, ranks, times


def settled_peak(runs: Sequence[Mapping[str, Any]]) -> int:
    """Return the peak of one rank as the benchmark's page has it: the median of the repeats in which gloo's
    threads had let go of their tensors."""
    settled = [run for run in runs if run["settled"]] or runs
    return int(statistics.median(run["peaks"]["peak"] for run in settled))


def is_alone(plan: str, name: str) -> bool:
    return re.fullmatch(re.escape(name) + r"(\([^)]*\))?", plan) is not None


def mib(size_bytes: float) -> str:
    return f"{size_bytes / 2**20:,.1f} MiB"


def percent(ratio: float) -> str:
    return f"{100 * ratio:.0f} %"


def bar(ratio: float, label: str) -> str:
    """Return a bar whose length is a share of plain training's, with its label."""
    width = f"{100 * min(ratio, 1):.0f}%"
    return f'<span class="share"><i style="width:{width}"></i></span> {label}'


# -- Markdown ------------------------------------------------------------------------------------------------


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) if rows else ""


def listed(facts: Sequence[tuple[str, str]]) -> str:
    """Return a list of those facts, (name, value), that have a value."""
    return "\n".join(f"- **{name}**: {value}" for name, value in facts if value)


def escaped(text: str) -> str:
    return re.sub(r"([*_\[\]`])", r"\\\1", html.escape(text, quote=False))


def cell(text: str) -> str:
    return escaped(text).replace("|", "\\|").replace("\n", " ")


def title_of(words: Words, technique: str) -> str:
    """Return the name of a technique as a heading."""
    name = words.get(f"technique.{technique}.name")
    return name[:1].upper() + name[1:] if words.lang == "en" else name


def plan_text(name: str) -> str:
    from memfit.techniques.rank_mesh import SEVERAL

    ranks = "ranks: 2\n" if name in SEVERAL else ""
    samples = "  ddp: {}\n" if name == "expert-parallel" else ""  # each rank has samples of its own
    return f"{ranks}techniques:\n  {name}: {{}}\n{samples}"


def tried_on(name: str) -> str:
    """Return a job that has what the technique acts on."""
    jobs = {"axial-parallel": "alphafold2", "expert-parallel": '"hf:mixtral?num_hidden_layers=2"'}
    return jobs.get(name, "protein-lm")


# -- lessons -------------------------------------------------------------------------------------------------


def lesson_page(file: Path, language: str) -> str:
    """Return a lesson as Markdown: the text cells of one language, and the code."""
    parts = []
    for cell_text in re.split(r"^# %%", file.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]:
        head, _, body = cell_text.partition("\n")
        if "[markdown]" not in head:
            parts.append(f"```python\n{body.strip()}\n```")
        elif f'lang="{language}"' in head:
            parts.append(re.sub(r"(?m)^# ?", "", body.strip()))
    return "\n\n".join(parts) + "\n"


def joined(text: str) -> str:
    """Return a Japanese page without the line breaks inside sentences, which browsers show as spaces."""
    character = JAPANESE.pattern
    parts = re.split(r"(^```.*?^```)", text, flags=re.MULTILINE | re.DOTALL)
    pattern = rf"(?<={character})\n *(?={character})|(?<=[、。：）])\n *(?=[A-Za-z`\[]|\*\*)"
    return "".join(part if part.startswith("```") else re.sub(pattern, "", part) for part in parts)


# -- the site ------------------------------------------------------------------------------------------------


def all_pages() -> dict[str, Pages]:
    """Return language -> all its pages. Raises SiteError for something public without a docstring, and for a
    link to a page that does not exist."""
    sites: dict[str, Pages] = {}
    for language in LANGUAGES:
        writer = Writer(language)
        for part in (writer.techniques, writer.engines, writer.rules, writer.jobs, writer.integrations):
            part()
        if language == "en":  # from docstrings and help, which are in English
            writer.commands()
            writer.functions()
        for file in sorted((ROOT / "lessons").glob("[0-9]*.py")):
            writer.pages[f"lessons/{file.stem}.md"] = lesson_page(file, language)
        sites[language] = writer.pages
    places = hand_written()
    known = {
        language: set(pages) | {path for to, path in places.values() if to == language}
        for language, pages in sites.items()
    }
    for language, pages in sites.items():
        for path, text in pages.items():
            pages[path] = across_languages(text, path, language, known)
    for file, (language, path) in places.items():
        sites[language][path] = relinked(file, places, known)
    sites["ja"] = {path: joined(text) for path, text in sites["ja"].items()}
    faults = [fault for language, pages in sites.items() for fault in missing_pages(language, pages)]
    if faults:
        raise SiteError("\n".join(faults))
    return sites


LINK = re.compile(r"\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)#\s]+)(#[^)\s]*)?\)")


def across_languages(text: str, here: str, language: str, known: Mapping[str, set[str]]) -> str:
    """Return a page whose links to pages that only the other language has lead there."""

    def link(match: re.Match[str]) -> str:
        path = os.path.normpath(Path(here).parent / match[2])
        others = [name for name in LANGUAGES if path in known[name] and path not in known[language]]
        return (
            f"[{match[1]}]({linked(others[0], path, language, here)}{match[3] or ''})" if others else match[0]
        )

    return LINK.sub(link, text)


def missing_pages(language: str, pages: Pages) -> Iterator[str]:
    """Yield a line for each link to a page that the site does not have; anchors are checked in the built
    site."""
    for here, text in pages.items():
        prose_only = re.sub(r"^```.*?^```|`[^`\n]+`", "", text, flags=re.MULTILINE | re.DOTALL)
        for _, target, _ in LINK.findall(prose_only):
            path = os.path.normpath(Path(here).parent / target)
            if not re.match(r"[a-z]+:|<", target) and path not in pages and not path.startswith("images/"):
                yield f"{language}/{here}: no such page: {target}"


def navigation(language: str, pages: Pages) -> list[Any]:
    """Return the navigation: headings, and under them the pages in the order of the site."""
    titles = TEXTS[language]["nav"]

    def of(folder: str, *first: str) -> list[str]:
        inside = sorted(
            p for p in pages if p.startswith(f"{folder}/") and p.count("/") == folder.count("/") + 1
        )
        return [*(p for p in first if p in pages), *(p for p in inside if p not in first)]

    def section(folder: str) -> dict[str, list[str]]:
        return {TEXTS[language]["section"][folder]["title"]: of(folder, f"{folder}/index.md")}

    reference: list[Any] = [section(f) for f in ("techniques", "engines", "jobs", "integrations")]
    reference += ["lint/index.md"]
    reference += [section("commands"), "api/index.md"] if language == "en" else []
    menu: list[tuple[str, list[Any]]] = [
        (
            "start",
            [
                "index.md",
                "first-steps.md",
                *([{titles["overview"]: "overview.md"}] if language == "en" else []),
            ],
        ),
        ("symptoms", of("symptoms", "symptoms/index.md")),
        ("guides", of("guides")),
        ("lessons", of("lessons", "lessons/index.md")),
        (
            "understand",
            [p for p in ("concepts.md", "report.md", "manual/tour.md", "manual/glossary.md") if p in pages],
        ),
        ("reference", reference),
        ("manual", of("manual")),
        ("evidence", ["manual/evidence.md", *of("evidence")] if language == "en" else []),
        ("project", [*of("project"), {titles["decisions"]: of("decisions")}] if language == "en" else []),
    ]
    static = [{titles[n]: f"https://static.memfit.invalid/{n}/index.html"} for n in STATIC]
    return [{titles[name]: entries} for name, entries in menu if entries] + static


def write_sources(folder: Path) -> dict[str, Path]:
    """Write pages, images and a configuration for each language to ``folder``; return the configurations."""
    configurations = {}
    shutil.rmtree(folder, ignore_errors=True)
    for language, pages in all_pages().items():
        docs = folder / language / "docs"
        for path, text in pages.items():
            (docs / path).parent.mkdir(parents=True, exist_ok=True)
            (docs / path).write_text(text, encoding="utf-8")
        shutil.copytree(DOCS / "images", docs / "images")
        for name in ("site.css", "site.js"):
            shutil.copy(HAND / name, docs / name)
        own = {
            "site_name": TEXTS[language]["name"],
            "site_description": TEXTS[language]["description"],
            "docs_dir": "docs",
            "site_dir": "built",
            "nav": navigation(language, pages),
            "extra": {
                "generator": False,
                "homepage": f"https://{language}.memfit.invalid/index.html",  # by default a folder
                "alternate": [
                    {
                        "name": TEXTS[to]["language"],
                        "lang": to,
                        "link": f"https://{to}.memfit.invalid/index.html",
                    }
                    for to in LANGUAGES
                ],
            },
        }
        shared = (HAND / "mkdocs.yml").read_text(encoding="utf-8").replace("LANGUAGE", language)
        configurations[language] = folder / language / "mkdocs.yml"
        configurations[language].write_text(
            yaml.safe_dump(own, allow_unicode=True, sort_keys=False) + shared, encoding="utf-8"
        )
    return configurations


def build(out: Path) -> None:
    """Build the site in ``out``, in place of an earlier one. Raises SiteError for whatever is wrong with it,
    and if the folder has something other than a site."""
    if out.is_dir() and not (out / "llms.txt").is_file() and {p.name for p in out.iterdir()} - {*STATIC}:
        raise SiteError(f"{out} is no earlier site: give an empty folder or a new one")
    shutil.rmtree(out, ignore_errors=True)
    memory_pages.build(out, in_site=True)
    folder = ROOT / "build" / "site-sources"
    for language, configuration in write_sources(folder).items():
        run = subprocess.run(
            [
                sys.executable,
                "-m",
                "zensical",
                "build",
                "--clean",
                "--strict",
                "--config-file",
                str(configuration),
            ],
            cwd=configuration.parent,
            capture_output=True,
            text=True,
            check=False,
        )
        if run.returncode:
            raise SiteError(f"zensical ({language}):\n{run.stdout}{run.stderr}")
        target = out if language == "en" else out / language
        shutil.copytree(configuration.parent / "built", target, dirs_exist_ok=True)
    for file in out.rglob("*.html"):
        if file.relative_to(out).parts[0] not in STATIC:
            text = file.read_text(encoding="utf-8")
            up = "" if file.name == "404.html" else os.path.relpath(out, file.parent)
            path = file.relative_to(out).as_posix()
            page = path.removeprefix("ja/")
            own_language = "en" if page == path else "ja"  # the calculator and the gallery are in both
            text = re.sub(r"(https://static\.memfit\.invalid/[^\"?]*)", rf"\1?lang={own_language}", text)
            # The switch of languages keeps the page. Beside the targets of <link>, the theme wants a sitemap.
            for language, site in (("en", out), ("ja", out / "ja")):
                if (site / page).is_file():
                    start = f'<a href="https://{language}.memfit.invalid'
                    text = text.replace(f'{start}/index.html" hreflang', f'{start}/{page}" hreflang')
            text = text.replace("https://ja.memfit.invalid/", f"{up}/ja/")
            for host in ("en", "static"):
                text = text.replace(f"https://{host}.memfit.invalid/", f"{up}/")
            file.write_text(text, encoding="utf-8")
    docs = folder / "en" / "docs"
    english = {f.relative_to(docs).as_posix(): f.read_text(encoding="utf-8") for f in docs.rglob("*.md")}
    (out / "llms.txt").write_text(summary_for_models(english), encoding="utf-8")
    shutil.copytree(ROOT / "skills", out / "skills", dirs_exist_ok=True)
    if faults := broken_links(out):
        raise SiteError("\n".join(faults))


def summary_for_models(pages: Pages) -> str:
    """Return llms.txt: what memfit is, and each of the English ``pages`` with its first sentence. Pages of
    evidence and decisions have only their titles, because they begin with how they were made, or when."""
    lines = [f"# memfit\n\n> {TEXTS['en']['description']}\n"]
    for heading, folders in (
        ("Start", ("", "symptoms", "guides", "lessons")),
        ("Reference", ("commands", "api", "techniques", "engines", "jobs", "lint", "integrations")),
        ("Manual", ("manual",)),
        ("Evidence", ("evidence",)),
        ("Project", ("project", "decisions")),
    ):
        lines.append(f"## {heading}\n")
        for path in (p for f in folders for p in sorted(pages) if p.rpartition("/")[0].split("/")[0] == f):
            title = plain_text(pages[path].partition("\n")[0].removeprefix("# "))
            summary = "" if heading in ("Evidence", "Project") else first_sentence(pages[path])
            lines.append(f"- [{title}]({built_name(path)}){': ' if summary else ''}{summary}")
        lines.append("")
    titles = TEXTS["en"]["nav"]
    lines += ["## Tools\n", *(f"- [{titles[name]}]({name}/index.html)" for name in STATIC), ""]
    return "\n".join([*lines, "## Japanese\n", "- [日本語](ja/index.html): The site in Japanese.", ""])


def built_name(path: str) -> str:
    """Return the path that a page, such as ``manual/limits.md``, has in the built site."""
    return re.sub(r"README$", "index", path.removesuffix(".md")) + ".html"


def first_sentence(page: str) -> str:
    """Return the first sentence of a page in Markdown that is neither in a heading, code, a list, a table nor
    a quotation, as plain text; "" if there is none."""
    text = re.sub(r"^ *```.*?^ *```$|<!--.*?-->", "", page, flags=re.MULTILINE | re.DOTALL)
    for paragraph in re.split(r"\n\s*\n", text):
        plain = plain_text(" ".join(paragraph.split()))
        if plain and not re.match(r"\s*(#|\||>|<|[-*] |\d+\. )|    ", paragraph):
            sentence = re.split(r"(?<=[.?!]) (?=[^a-z0-9]|memfit)", plain, maxsplit=1)[0]
            return sentence if sentence.endswith(("?", "!")) else sentence.rstrip(".:") + "."
    return ""


def plain_text(text: str) -> str:
    """Return a line of Markdown without images, the targets of links, and marks of emphasis."""
    text = LINK.sub(r"\1", re.sub(r"!\[[^\]]*\]\([^)]*\)", "", text))
    pieces = re.split(r"(`[^`]*`)", text)
    pieces[::2] = [re.sub(r"(?<!\\)\*+", "", piece) for piece in pieces[::2]]
    return html.unescape(re.sub(r"\\([*_\[\]`|])", r"\1", "".join(pieces))).strip()


class _Links(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.targets: list[str] = []
        self.anchors: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name in ("id", "name") and value:
                self.anchors.add(value)
            if name in ("href", "src") and value and tag != "base":
                self.targets.append(value)


def broken_links(out: Path) -> list[str]:
    """Return a line for each link, image, style or script of the built site without a target, or with an
    anchor that its target lacks. A folder is no target: pages that are opened from a disk would show what is
    in it."""
    pages = {}
    for file in out.rglob("*.html"):
        if file.name == "404.html":  # a server shows it at any address, so that its links are absolute
            continue
        pages[file] = _Links()
        pages[file].feed(file.read_text(encoding="utf-8"))
    faults = []
    for file, page in pages.items():
        for target in set(page.targets):
            path, _, anchor = target.partition("#")
            if re.match(r"(https?|mailto|data|javascript):", path) and "memfit.invalid" not in path:
                continue
            goal = file if not path else Path(os.path.normpath(file.parent / unquote(path.partition("?")[0])))
            name = file.relative_to(out)
            if path.startswith("/") or not goal.is_file():
                faults.append(f"{name}: no such target: {target}")
            elif anchor and goal in pages and unquote(anchor) not in pages[goal].anchors:
                faults.append(f"{name}: no such anchor: {target}")
    return sorted(faults)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--out", type=Path, default=OUT, help=f"folder of the site (default: {OUT.relative_to(ROOT)})"
    )
    arguments = parser.parse_args()
    try:
        build(arguments.out.absolute())
    except SiteError as error:
        sys.exit(f"the site was not built:\n{error}")
    print(arguments.out / "index.html")


if __name__ == "__main__":
    main()
