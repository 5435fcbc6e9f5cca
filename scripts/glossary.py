"""Writes docs/glossary.md and docs/glossary.ja.md from the words of the report: python scripts/glossary.py"""

from __future__ import annotations

from pathlib import Path

from memfit.report.words import Words, load_words
from memfit.techniques.registry import TECHNIQUES

DOCS = Path(__file__).parents[1] / "docs"
PAGES = {"en": DOCS / "glossary.md", "ja": DOCS / "glossary.ja.md"}
HEADS = {
    "en": """# Glossary

What the report calls things, in English and Japanese, with one sentence on each technique for readers who do
not train models. The report lists those that occur in it. `scripts/glossary.py` writes this page from the
report's words.

レポートの用語と、各手法についての一文の説明です（学習の技術者でない読者向け）。
""",
    "ja": """# 用語集

レポートで使う用語と、各手法の一文の説明を、日本語と英語で示します。
手法の説明は、学習の技術者でない方に向けたものです。レポートには、その中に現れるものだけが載ります。
このページは、`scripts/glossary.py` がレポートの文言から書き出しています。
""",
}
TERMS = {"en": "## Terms / 用語\n", "ja": "## 用語 / Terms\n"}
TECHNIQUE_HEADS = {
    "en": "\n## Techniques / 手法\n\n| identifier | in words | 日本語 |",
    "ja": "\n## 手法 / Techniques\n\n| 識別子 | 説明 | 英語 |",
}


def page(language: str) -> str:
    """Return the page as Markdown: a list of terms and a table of techniques, in both languages, that of the
    page first."""
    first, second = load_words(language), load_words("ja" if language == "en" else "en")
    terms = zip(first.all("glossary.term"), second.all("glossary.term"), strict=True)
    rows = [f"| `{name}` | {_cell(name, first)} | {_cell(name, second)} |" for name in TECHNIQUES]
    return "\n".join(
        [
            HEADS[language],
            TERMS[language],
            *(f"- {term}\n  {translated}" for term, translated in terms),
            TECHNIQUE_HEADS[language],
            "|---|---|---|",
            *rows,
            "",
        ]
    )


def _cell(name: str, words: Words) -> str:
    title, picture = (words.get(f"technique.{name}.{part}") for part in ("name", "picture"))
    return f"**{title}**: {picture}" if words.lang == "en" else f"**{title}**：{picture}"


if __name__ == "__main__":
    for language, file in PAGES.items():
        file.write_text(page(language), encoding="utf-8")
