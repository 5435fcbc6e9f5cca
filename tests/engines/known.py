"""Do the libraries' own parsers take what options/*.toml says that they take? In a process of its own.

    python known.py LIBRARY < options.toml

Prints a line of JSON: what is refused of it.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import tomllib
from collections.abc import Callable, Iterator
from typing import Any

import library_options

SAMPLES = {"integer": 4, "number": 0.5, "switch": True, "text": "x", "list": ["x"], "table": {}}


def samples(spec: Any) -> list[Any]:
    """Values that a setting must take; none where anything goes."""
    return (
        spec if isinstance(spec, list) else [SAMPLES[spec.split()[0]]] if spec.split()[0] in SAMPLES else []
    )


def deepspeed(data: dict[str, Any]) -> Iterator[str]:
    from pydantic import ValidationError

    from memfit.engines.deepspeed.step import import_deepspeed

    import_deepspeed("cpu")
    models = tomllib.loads(library_options.BY_HAND.read_text(encoding="utf-8"))["deepspeed"]["models"]
    for section, path in models.items():
        module, _, name = path.rpartition(".")
        model = getattr(importlib.import_module(f"deepspeed.{module}"), name)
        for key, spec in data["now"][section].items():
            for value in samples(spec):
                try:
                    model(**{key: value})
                except ValidationError as error:
                    yield from (f"{section}.{key}: {e['msg']}" for e in error.errors() if e["loc"] == (key,))
                except (TypeError, ValueError, AssertionError):
                    continue  # it is known, but not valid alone
        try:
            model(no_such_key=1)
        except ValidationError:
            continue
        yield f"{section} takes any key"


def parser_takes(
    parser: argparse.ArgumentParser,
    data: dict[str, Any],
    front: str,
    section: str,
    after: tuple[str, ...] = (),
) -> Iterator[str]:
    parser.exit_on_error = False
    parser.error = _raise  # type: ignore[method-assign]
    known = {n for a in parser._actions for n in a.option_strings}
    tried: dict[str, list[str]] = {}  # what is tried, and its words on a command line
    for key, spec in data["now"][section].items():
        names = [n for n in (f"--{front}{key}", f"--{front}{key}".replace("_", "-")) if n in known]
        if not names:
            yield f"{section}.{key}: no such option"
        for value in samples(spec) if names else ():
            action = parser._option_string_actions[names[0]]
            words = [] if action.nargs == 0 else [str(value)]
            if action.choices is not None or spec in ("integer", "number", "switch"):
                tried[f"{section}.{key} {value}"] = [names[0], *words]
    if _refusal(parser, [word for words in tried.values() for word in words], after):
        for name, words in tried.items():  # one by one, to say which
            if error := _refusal(parser, words, after):
                yield f"{name}: {error}"


def _refusal(parser: argparse.ArgumentParser, words: list[str], after: tuple[str, ...]) -> str:
    """Return why the parser refuses the words; "" if it takes them."""
    try:
        parser.parse_known_args([*words, *after])
    except (argparse.ArgumentError, ValueError, KeyError) as error:
        return str(error) or repr(error)
    return ""


def _raise(message: str) -> None:
    raise ValueError(message)


def trainer(data: dict[str, Any]) -> Iterator[str]:
    from transformers import HfArgumentParser, TrainingArguments

    yield from parser_takes(HfArgumentParser(TrainingArguments), data, "", "")


def accelerate(data: dict[str, Any]) -> Iterator[str]:
    from accelerate.commands.config.config_args import ClusterConfig, SageMakerConfig
    from accelerate.commands.launch import launch_command_parser

    fields = ClusterConfig.__dataclass_fields__.keys() | SageMakerConfig.__dataclass_fields__.keys()
    converted = {"dynamo_backend", "fp16"}  # process_config turns them into others
    yield from (f"{key}: no such field" for key in data["now"][""].keys() - fields - converted)
    parser = launch_command_parser()
    for section, front in (
        ("fsdp_config", "fsdp_"),
        ("megatron_lm_config", "megatron_lm_"),
        ("deepspeed_config", ""),
    ):
        keys = {k: "text" if v == "switch" else v for k, v in data["now"][section].items()}
        yield from parser_takes(parser, {"now": {section: keys}}, front, section, ("train.py",))


def torchtitan(data: dict[str, Any]) -> Iterator[str]:
    told = library_options.torchtitan()
    for section, keys in data["now"].items():
        yield from (f"{section}.{key}: no such field" for key in keys.keys() - told.get(section, {}).keys())


def megatron(data: dict[str, Any]) -> Iterator[str]:
    yield from parser_takes(library_options.megatron_parser(), data, "", "")


LIBRARIES: dict[str, Callable[[dict[str, Any]], Iterator[str]]] = {
    "deepspeed": deepspeed,
    "accelerate": accelerate,
    "trainer": trainer,
    "torchtitan": torchtitan,
    "megatron": megatron,
}

if __name__ == "__main__":
    library, *beside = sys.argv[1:]
    sys.path[:0] = beside
    print("\n" + json.dumps(list(LIBRARIES[library](tomllib.loads(sys.stdin.read())))))
