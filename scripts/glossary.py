"""Writes docs/glossary.md from the words of the report: python scripts/glossary.py"""

from __future__ import annotations

from pathlib import Path

from memfit.report.words import Words, load_words
from memfit.techniques.registry import TECHNIQUES

PAGE = Path(__file__).parents[1] / "docs" / "glossary.md"
HEAD = """# Glossary

What the report calls things, in English and Japanese, with one sentence on each technique for readers who do
not train models. The report lists those that occur in it. `scripts/glossary.py` writes this page from the
report's words.

レポートの用語と、各手法についての一文の説明です（学習の技術者でない読者向け）。
"""


def page() -> str:
    """Return the page as Markdown: a list of terms and a table of techniques, in both languages."""
    english, japanese = load_words("en"), load_words("ja")
    terms = zip(english.all("glossary.term"), japanese.all("glossary.term"), strict=True)
    rows = [f"| `{name}` | {_cell(name, english)} | {_cell(name, japanese)} |" for name in TECHNIQUES]
    return "\n".join(
        [
            HEAD,
            "## Terms / 用語\n",
            *(f"- {term}\n  {term_ja}" for term, term_ja in terms),
            "\n## Techniques / 手法\n",
            "| identifier | in words | 日本語 |",
            "|---|---|---|",
            *rows,
            "",
        ]
    )


def _cell(name: str, words: Words) -> str:
    title, picture = (words.get(f"technique.{name}.{part}") for part in ("name", "picture"))
    return f"**{title}**: {picture}" if words.lang == "en" else f"**{title}**：{picture}"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
