"""Old names of commands, which still work in this version: each is rewritten to its new form."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Final

from memfit.types.job import DEFAULT_JOB

Words = list[str]

# Options without a value of the commands in `ALIASES`.
_FLAGS: Final = {"--json", "--help", "--recommended", "--recalibrate", "--lines", "--no-lines"}


def _estimate(arguments: Words, options: Words) -> Words:
    return ["estimate", *(arguments or [DEFAULT_JOB]), *options]


def _estimate_lengths(arguments: Words, options: Words) -> Words:
    job: Words = []
    if "--job" in options:
        index = options.index("--job")
        job, options = options[index + 1 : index + 2], options[:index] + options[index + 2 :]
    return ["estimate", *job, "--lengths", *arguments, *options]


def _list_or_install_engines(arguments: Words, options: Words) -> Words:
    if arguments[:1] == ["install"]:
        return ["doctor", "--install", *arguments[1:], *options]
    return ["list", "engines", *arguments[1:], *options]


def _decide_gates(arguments: Words, options: Words) -> Words:
    has_gates = any(option in options for option in ("--gates", "--pilot", "--full"))
    return ["decide", *arguments, *options, *([] if has_gates else ["--gates", "default"])]


def _estimate_precision(arguments: Words, options: Words) -> Words:
    renamed = ["--precision" if word == "--dtype" else word for word in options]
    both = [] if "--precision" in renamed else ["--precision", "both"]
    return [*_estimate(arguments, renamed), *both]


# The old name -> (the new form for the user, the new words from the old arguments and options).
ALIASES: Final[Mapping[str, tuple[str, Callable[[Words, Words], Words]]]] = {
    "explain": ("memfit estimate JOB", _estimate),
    "engines": (
        "memfit estimate JOB --engines",
        lambda arguments, options: [*_estimate(arguments, options), "--engines"],
    ),
    "lengths": ("memfit estimate JOB --lengths FILE", _estimate_lengths),
    "jobs": ("memfit list jobs", lambda arguments, options: ["list", "jobs", *arguments, *options]),
    "techniques": (
        "memfit list techniques",
        lambda arguments, options: ["list", "techniques", *arguments, *options],
    ),
    "machines": (
        "memfit list machines",
        lambda arguments, options: ["list", "machines", *arguments, *options],
    ),
    "engine": ("memfit list engines, or memfit doctor --install ENGINE", _list_or_install_engines),
    "compare": (
        "memfit record --compare A B",
        lambda arguments, options: ["record", "--compare", *arguments, *options],
    ),
    "precision": ("memfit estimate JOB --precision both", _estimate_precision),
    "scale": ("memfit decide --gates default", _decide_gates),
}


def rewrite(argv: Sequence[str]) -> Words:
    """Return ``argv`` as a list. If its first word is an old name of a command, that name and its arguments
    are replaced by the new form, and a line on standard error names the new form. If --help is among the
    words of an old name, the result is the new command with --help alone."""
    words = list(argv)
    if not words or words[0] not in ALIASES:
        return words
    form, new_words = ALIASES[words[0]]
    print(
        f"memfit: `memfit {words[0]}` is now `{form}`; the old name works in this version only",
        file=sys.stderr,
    )
    rewritten = new_words(*_split(words[1:]))
    return [rewritten[0], "--help"] if "--help" in words else rewritten


def suggest_command(word: str, commands: Iterable[str]) -> str:
    """Return the hint "did you mean ...?" with the name that is most similar to ``word``: one of
    ``commands``, or an old name in its new form. Return "" if none is similar."""
    matches = difflib.get_close_matches(word, [*commands, *ALIASES], n=1, cutoff=0.4)
    if not matches:
        return ""
    name = matches[0]
    if name in ALIASES:
        return f"did you mean `{ALIASES[name][0]}` (formerly {name})?"
    return f"did you mean {name!r}?"


def _split(words: Sequence[str]) -> tuple[Words, Words]:
    """Return (the arguments, the options with their values) of ``words``, each in their order. An option
    --NAME=VALUE becomes two words. All words after "--" are arguments."""
    arguments: Words = []
    options: Words = []
    rest = iter(words)
    for word in rest:
        if word == "--":
            arguments += rest
        elif not word.startswith("--"):
            arguments.append(word)
        elif "=" in word:
            options += word.split("=", 1)
        else:
            options.append(word)
            if word not in _FLAGS:
                options += [value for value in [next(rest, None)] if value is not None]
    return arguments, options
