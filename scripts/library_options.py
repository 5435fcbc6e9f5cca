"""Writes src/memfit/lint/options/*.toml: every setting that a library takes, its type and its values.

    python scripts/library_options.py [LIBRARY=FOLDER...]

Asks the installed DeepSpeed, Accelerate and transformers, and torchtitan and Megatron-LM in .parsers/ (of
scripts/parsers.sh), for what they declare. A FOLDER (or a file) holds sources of another release, a fork or a
front end: the names and values that it has too are accepted as well. What earlier runs found there stays,
and so does what scripts/library_options.toml says by hand.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import datetime
import enum
import importlib
import importlib.metadata
import json
import os
import re
import subprocess
import sys
import textwrap
import tomllib
import types
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

from memfit.lint.option_schema import find_similar

ROOT = Path(__file__).parents[1]
INTO = ROOT / "src/memfit/lint/options"
BY_HAND = Path(__file__).with_suffix(".toml")
ATTRIBUTES = ("refuses", "spelled", "any_case", "needs", "shares")
Spec = Any  # a type as text, or a list of the values
Sections = dict[str, dict[str, Spec]]
KINDS = {int: "integer", float: "number", bool: "switch", str: "text", list: "list", dict: "table"}


# -- types as the libraries declare them --------------------------------------------------------------------


def spec_of(declared: Any) -> Spec:
    """Of an annotation: an enumeration's values, the widest of what a union offers, "any" where unsure."""
    if isinstance(declared, type) and issubclass(declared, enum.Enum):
        return [member.value for member in declared]
    if typing.get_origin(declared) is typing.Literal:
        return list(typing.get_args(declared))
    if typing.get_origin(declared) in (typing.Union, types.UnionType):
        return _widest([spec_of(a) for a in typing.get_args(declared) if a is not type(None)])
    if typing.get_origin(declared) is typing.Annotated:
        return spec_of(typing.get_args(declared)[0])
    return KINDS.get(typing.get_origin(declared) or declared, "any")


def _widest(offered: list[Spec]) -> Spec:
    values = next((s for s in offered if isinstance(s, list)), None)
    if values is not None and all(s == values or (s == "text" and _texts(values)) for s in offered):
        return values  # an enumeration that may be given by name
    if all(s in ("integer", "number") for s in offered):
        return "number" if "number" in offered else "integer"
    return offered[0] if len(offered) == 1 else "any"


def _texts(values: list[Any]) -> bool:
    return all(isinstance(value, str) for value in values)


def of_action(action: argparse.Action) -> Spec:
    if action.choices is not None:
        return [c.name if isinstance(c, enum.Enum) else c for c in action.choices if c is not None] or "any"
    if action.nargs == 0:
        return "switch"
    if action.nargs not in (None, "?"):
        return "any"
    return KINDS.get(typing.cast("type", action.type), "any" if action.type is not None else "text")


def of_parser(parser: argparse.ArgumentParser) -> dict[str, Spec]:
    """By every name that an option has."""
    return {
        name.lstrip("-").replace("-", "_"): of_action(action)
        for action in parser._actions
        for name in action.option_strings
        if name.startswith("--") and name != "--help"
    }


def of_fields(noun: type) -> dict[str, Spec]:
    hints = typing.get_type_hints(noun)
    return {field.name: spec_of(hints[field.name]) for field in dataclasses.fields(noun)}


# -- the libraries ------------------------------------------------------------------------------------------


def deepspeed() -> Sections:
    """What is declared as a pydantic model; the rest it reads key by key (scripts/library_options.toml)."""
    from memfit.engines.deepspeed.step import import_deepspeed

    import_deepspeed("cpu")
    found: Sections = {}
    for section, path in tomllib.loads(BY_HAND.read_text(encoding="utf-8"))["deepspeed"]["models"].items():
        module, _, name = path.rpartition(".")
        _model(section, getattr(importlib.import_module(f"deepspeed.{module}"), name), found)
    return found


def _model(section: str, model: Any, found: Sections) -> None:
    keys = found.setdefault(section, {})
    for name, field in model.model_fields.items():
        inner = [
            a for a in (field.annotation, *typing.get_args(field.annotation)) if hasattr(a, "model_fields")
        ]
        spec = "table" if inner else spec_of(field.annotation)
        least = [f">= {m.ge}" for m in field.metadata if hasattr(m, "ge")]
        least += [f"> {m.gt}" for m in field.metadata if hasattr(m, "gt")]
        most = [f"<= {m.le}" for m in field.metadata if hasattr(m, "le")]
        for key in {name, field.alias or name}:
            keys[key] = " ".join([spec, *least, *most]) if isinstance(spec, str) else spec
            if inner:
                _model(f"{section}.{key}", inner[0], found)


def accelerate() -> Sections:
    """A file's sections hold options of its launcher, without the section's name where memfit reads them."""
    from accelerate.commands.config import config_args
    from accelerate.commands.launch import launch_command_parser

    options = of_parser(launch_command_parser())
    top = of_fields(config_args.SageMakerConfig) | of_fields(config_args.ClusterConfig)
    found: Sections = {"": {k: options[k] if k == "mixed_precision" else v for k, v in top.items()}}
    for section, front in (
        ("fsdp_config", "fsdp_"),
        ("megatron_lm_config", "megatron_lm_"),
        ("parallelism_config", "parallelism_config_"),
    ):
        found[section] = {k.removeprefix(front): v for k, v in options.items() if k.startswith(front)}
    deep = ("zero", "offload", "deepspeed", "gradient")
    found["deepspeed_config"] = {k: v for k, v in options.items() if k.startswith(deep)}
    return found


def transformers() -> Sections:
    from transformers import HfArgumentParser, TrainingArguments

    declared = of_fields(TrainingArguments)
    choices = {k: v for k, v in of_parser(HfArgumentParser(TrainingArguments)).items() if isinstance(v, list)}
    return {"": declared | {k: v for k, v in choices.items() if k in declared}}


def torchtitan() -> Sections:
    _bare("torchtitan")
    from torchtitan.config.job_config import JobConfig

    found: Sections = {}
    _nested("", JobConfig, found)
    return found


def _bare(name: str) -> types.ModuleType:
    """A package without what it imports at once: kernels that want Triton, networks."""
    package = types.ModuleType(name)
    package.__path__ = [f"{sys.path[0]}/{name.replace('.', '/')}"]
    sys.modules[name] = package
    return package


def _nested(section: str, noun: type, found: Sections) -> None:
    keys = found.setdefault(section, {})
    for name, declared in typing.get_type_hints(noun).items():
        path = f"{section}.{name}".lstrip(".")
        keys[name] = "table" if dataclasses.is_dataclass(declared) else spec_of(declared)
        if dataclasses.is_dataclass(declared):
            _nested(path, typing.cast("type", declared), found)


def megatron() -> Sections:
    return {"": of_parser(megatron_parser())}


def megatron_parser() -> argparse.ArgumentParser:
    package = _bare("megatron.training")
    sys.modules["megatron.core.transformer.moe.ops.paged_stash"] = MagicMock()
    if not hasattr(typing, "override"):
        vars(typing)["override"] = lambda method: method
    from megatron.training import global_vars

    vars(package).update({k: v for k, v in vars(global_vars).items() if k.startswith("get_")})
    from megatron.training import arguments

    parser: argparse.ArgumentParser = arguments.add_megatron_arguments(
        argparse.ArgumentParser(allow_abbrev=False)
    )
    return parser


# Library -> the distribution, the name that findings use, and where it is if not installed.
LIBRARIES: Mapping[str, tuple[typing.Callable[[], Sections], str, str, str]] = {
    "deepspeed": (deepspeed, "deepspeed", "DeepSpeed", ""),
    "accelerate": (accelerate, "accelerate", "Accelerate", ""),
    "trainer": (transformers, "transformers", "transformers", ""),
    "torchtitan": (torchtitan, "torchtitan", "torchtitan", "torchtitan-0.2"),
    "megatron": (megatron, "megatron-core", "Megatron-LM", "megatron-core"),
}


def asked(library: str, folder: Path | None) -> dict[str, Any]:
    """In a process of its own: what a package beside shadows, and what imports leave, goes with it."""
    path = [str(folder)] if folder is not None else []
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([*path, *filter(None, sys.path)])}
    command = (sys.executable, __file__, "--dump", library, *path)
    child = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    if child.returncode:
        raise SystemExit(f"{library} does not load: {child.stderr[-1000:]}")
    return dict(json.loads(child.stdout.splitlines()[-1]))


def dump(library: str, folders: list[str]) -> None:
    ask, distribution, name, _ = LIBRARIES[library]
    sys.path[:0] = folders
    print(
        "\n"
        + json.dumps({"sections": ask(), "release": f"{name} {importlib.metadata.version(distribution)}"})
    )


# -- sources of other releases and forks --------------------------------------------------------------------


def sources(folder: Path) -> Iterator[ast.AST]:
    for path in sorted(folder.rglob("*.py")) if folder.is_dir() else [folder]:
        try:
            yield ast.parse(path.read_text(encoding="utf-8", errors="replace"))
        except (SyntaxError, ValueError):
            continue  # Python 2, or a template


def options_in(folder: Path) -> Iterator[tuple[str, Spec]]:
    """Every option of a parser, and "any" where its values are not written out."""
    for tree in sources(folder):
        for call in ast.walk(tree):
            if isinstance(call, ast.Call) and getattr(call.func, "attr", "") == "add_argument":
                names = [a.value for a in call.args if isinstance(a, ast.Constant)]
                spec = _written(call.keywords)
                for name in names:
                    if isinstance(name, str) and name.startswith("--"):
                        yield name.lstrip("-").replace("-", "_"), spec


def _written(keywords: list[ast.keyword]) -> Spec:
    said = {k.arg: k.value for k in keywords}
    try:
        if "choices" in said:
            return [c for c in ast.literal_eval(said["choices"]) if c is not None]
    except (TypeError, ValueError):
        return "any"
    if getattr(said.get("action"), "value", "") in ("store_true", "store_false"):
        return "switch"
    named = {"int": "integer", "float": "number", "str": "text"}
    return "any" if "nargs" in said else named.get(getattr(said.get("type"), "id", ""), "any")


_NAMES = re.compile(r"""["']--([A-Za-z][\w-]*)["']|^    (\w+): """, re.MULTILINE)


def of_front_ends(folder: Path) -> Iterator[tuple[str, Spec]]:
    """The names that others have beside the Trainer's: options, and fields of classes. Their values are not
    compared."""
    paths = sorted(folder.rglob("*.py")) if folder.is_dir() else [folder]
    texts = (path.read_text(encoding="utf-8", errors="replace") for path in paths)
    names = {option or field for text in texts for option, field in _NAMES.findall(text)}
    yield from ((name.replace("-", "_"), None) for name in sorted(names))


READ = {"megatron": options_in, "trainer": of_front_ends}


# -- the files ----------------------------------------------------------------------------------------------


@dataclasses.dataclass(kw_only=True)
class Table:
    """``now``: what the release declares. ``older``: names that others have too; ``also``: their values."""

    release: str
    now: Sections
    older: dict[str, set[str]]
    also: Sections

    def accept(self, section: str, key: str, spec: Spec) -> None:
        known = self.now.get(section, {}).get(key)
        if known is None:
            self.older.setdefault(section, set()).add(key)
        elif spec not in (None, known):
            self._widen(section, key, known, spec)

    def _widen(self, section: str, key: str, known: Spec, spec: Spec) -> None:
        before = self.also.setdefault(section, {}).get(key, [])
        both_lists = isinstance(known, list) and isinstance(spec, list) and isinstance(before, list)
        more = sorted({*before, *spec} - {*known}, key=str) if both_lists else "any"
        if more:
            self.also[section][key] = more


def made(library: str, folders: list[Path]) -> tuple[Table, dict[str, Any]]:
    beside = LIBRARIES[library][3]
    told = asked(library, ROOT / ".parsers" / beside if beside else None)
    by_hand = tomllib.loads(BY_HAND.read_text(encoding="utf-8"))[library]
    path = INTO / f"{library}.toml"
    before = tomllib.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    now: Sections = told["sections"]
    for section, keys in by_hand.get("now", {}).items():
        now[section] = {**now.get(section, {}), **keys}
    table = Table(release=told["release"], now=now, older={}, also=before.get("also", {}))
    for section, words in (*before.get("older", {}).items(), *by_hand.get("older", {}).items()):
        for key in words.split():
            table.accept(section, key, None)
    for section, keys in by_hand.get("also", {}).items():
        for key, values in keys.items():
            table.accept(section, key, values)
    for key, spec in of_others(library, folders):
        table.accept("", key, spec)
    if library == "trainer":  # of front ends, what could be taken for a slip of the pen
        own = set(by_hand["older"][""].split())
        table.older[""] = {key for key in table.older[""] if key in own or find_similar(key, now[""])}
    return table, by_hand


def of_others(library: str, folders: list[Path]) -> Iterator[tuple[str, Spec]]:
    for folder in folders:
        for place in ("training/config", "core/transformer/transformer_config.py"):
            if (folder / "megatron" / place).exists():  # whose fields Megatron-LM makes options of
                yield from of_front_ends(folder / "megatron" / place)
        yield from READ[library](folder)


def written(table: Table, by_hand: Mapping[str, Any]) -> str:
    lines = [
        "# Written by scripts/library_options.py. [now]: what the release declares. [older]: names of other",
        "# releases, of forks and front ends. [also]: values that those take.",
        f"release = {json.dumps(table.release)}",
        f'read = "{datetime.datetime.now(datetime.UTC):%Y-%m-%d}"',
        f"links = {json.dumps(by_hand['links'])}",
        *(f"{name} = {json.dumps(by_hand[name])}" for name in ATTRIBUTES),
    ]
    for title, sections in (("now", table.now), ("also", table.also)):
        for section, keys in sorted(sections.items()):
            lines += ["", f'[{title}."{section}"]'] if keys else []
            lines += [f"{_key(k)} = {json.dumps(spec)}" for k, spec in sorted(keys.items())]
    lines += ["", "[older]"]
    for section, names in sorted(table.older.items()):
        words = textwrap.fill(" ".join(sorted(names)), 108, initial_indent="    ", subsequent_indent="    ")
        lines.append(f'"{section}" = """\n{words}"""')
    return "\n".join(lines) + "\n"


def _key(name: str) -> str:
    return name if name.isascii() and name.replace("_", "a").isalnum() else json.dumps(name)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("older", nargs="*", metavar="LIBRARY=FOLDER")
    parser.add_argument("--only", choices=LIBRARIES, action="append", help="write this file")
    parser.add_argument("--dump", choices=LIBRARIES, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.dump:
        return dump(given.dump, given.older)
    older = [(word.partition("=")[0], Path(word.partition("=")[2])) for word in given.older]
    for library in given.only or LIBRARIES:
        table, by_hand = made(library, [folder for name, folder in older if name == library])
        (INTO / f"{library}.toml").write_text(written(table, by_hand), encoding="utf-8")
        print(
            library,
            table.release,
            sum(map(len, table.now.values())),
            "now",
            sum(map(len, table.older.values())),
            "older",
        )
    return None


if __name__ == "__main__":
    main()
