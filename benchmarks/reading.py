"""Draw docstrings, error messages and help texts at random, for somebody who has never seen memfit to read.

    python benchmarks/reading.py --seed 1 [--count 60]

A third each of docstrings with their signatures, error messages with their hints, and help texts of options.
The reader writes down what each means; the meanings are then held against the code at the printed places
(``--places``). docs/log.md has the results.
"""

from __future__ import annotations

import argparse
import ast
import random
from collections.abc import Iterator, Mapping
from pathlib import Path

SOURCE = Path(__file__).parents[1] / "src" / "memfit"
Text = tuple[str, str]  # place and text
_ERRORS = ("UserError", "RunError", "ValueError")


def docstrings(path: Path, tree: ast.Module) -> Iterator[Text]:
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and (text := ast.get_docstring(node)):
            kind = "class" if isinstance(node, ast.ClassDef) else "def"
            arguments = f"({ast.unparse(node.args)})" if isinstance(node, ast.FunctionDef) else ""
            result = f" -> {ast.unparse(node.returns)}" if getattr(node, "returns", None) else ""  # type: ignore[union-attr]
            yield f"{path}:{node.lineno}", f"{kind} {node.name}{arguments}{result}\n{text}"


def messages(path: Path, tree: ast.Module) -> Iterator[Text]:
    constants = _constants(tree)
    for node in ast.walk(tree):
        is_error = isinstance(node, ast.Call) and getattr(node.func, "id", "") in _ERRORS
        if is_error and node.args and isinstance(node.args[0], (ast.JoinedStr, ast.Constant)):
            keywords = "".join(f"\n  {k.arg}: {_words(k.value, constants)}" for k in node.keywords)
            yield f"{path}:{node.lineno}", f"{_words(node.args[0], constants)}{keywords}"


def helps(path: Path, tree: ast.Module) -> Iterator[Text]:
    constants = _constants(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.AnnAssign) and (name := getattr(node.target, "id", "")):
            for call in (n for n in ast.walk(node.annotation) if isinstance(n, ast.Call)):
                texts = {k.arg: _words(k.value, constants) for k in call.keywords}
                strings = [a.value for a in call.args if isinstance(a, ast.Constant)]
                option = next((s for s in strings if str(s).startswith("--")), f"--{name.replace('_', '-')}")
                if ast.unparse(call.func) == "typer.Argument":
                    option = texts.get("metavar", name)
                if "help" in texts:
                    yield f"{path}:{node.lineno}", f"{option}\n{texts['help']}"


def _constants(tree: ast.Module) -> dict[str, str]:
    """Return name -> text of the module's constants that are literals or f-strings."""
    texts: dict[str, str] = {}
    for node in tree.body:
        if isinstance(node, (ast.Assign, ast.AnnAssign)) and isinstance(
            node.value, (ast.Constant, ast.JoinedStr)
        ):
            for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                texts[ast.unparse(target)] = _words(node.value, texts)
    return texts


def _words(node: ast.expr, constants: Mapping[str, str]) -> str:
    """Return the text of a literal, of a constant of the module, or of an f-string, whose other values stay
    in braces."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(_words(v, constants) for v in node.values)
    if isinstance(node, ast.FormattedValue):
        name = ast.unparse(node.value)
        return constants.get(name, "{" + name + "}")
    name = ast.unparse(node)
    return constants.get(name, name)


def draw(seed: int, count: int) -> list[Text]:
    """Return ``count`` places and texts, a third of each kind."""
    chance = random.Random(seed)
    drawn: list[Text] = []
    for kind in (docstrings, messages, helps):
        texts: list[Text] = []
        for path in sorted(SOURCE.rglob("*.py")):
            tree = ast.parse(path.read_text(encoding="utf-8"))
            texts += sorted(kind(path.relative_to(SOURCE), tree))
        drawn += chance.sample(texts, count // 3)
    return drawn


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--count", type=int, default=60)
    parser.add_argument("--places", action="store_true", help="print where each text is")
    options = parser.parse_args()
    for number, (place, text) in enumerate(draw(options.seed, options.count), 1):
        print(f"{number}. {place if options.places else ''}\n{text}\n")


if __name__ == "__main__":
    main()
