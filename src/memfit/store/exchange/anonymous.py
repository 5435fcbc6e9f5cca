"""Remove from texts what says where a proof of concept ran: folders, host names and user names."""

from __future__ import annotations

import dataclasses
import platform
import re
import shlex
from pathlib import PurePosixPath, PureWindowsPath
from typing import Final

from memfit.types.result import Poc, Run

# An absolute path, or one of a home folder or of a Windows drive.
_PATH: Final = re.compile(r"(?<![\w./\\])(?:~[\w.-]*|[A-Za-z]:)?(?:[/\\][^\s/\\'\",;:()<>=]+)+[/\\]?")
_LOGIN: Final = re.compile(r"\b[\w.-]+@[\w.-]+\b")
_SHORTEST_HOST: Final = 4  # characters; a shorter name may be a word


def anonymous_command(command: str) -> str:
    """Return a command line with each path in its arguments, also after ``--option=``, replaced by its last
    component, and with `anonymous_text` applied. Names of models such as ``hf:OWNER/NAME`` stay. If a
    quotation mark is not closed, only `anonymous_text` is applied."""
    try:
        words = shlex.split(command)
    except ValueError:  # a quote without an end
        return anonymous_text(command)
    return anonymous_text(shlex.join(_anonymous_word(word) for word in words))


def anonymous_text(text: str) -> str:
    """Return a text with each absolute path, also one that begins with ~ or a Windows drive, replaced by its
    last component, each USER@HOST by "USER@HOST", and the name of this machine by "HOST". A machine's name of
    fewer than 4 characters, and "localhost", stays."""
    text = _LOGIN.sub("USER@HOST", _PATH.sub(lambda match: _last(match.group()), text))
    host = platform.node().partition(".")[0]
    if len(host) >= _SHORTEST_HOST and host != "localhost":
        text = re.sub(rf"\b{re.escape(host)}\b(?:\.[\w.-]+)?", "HOST", text)
    return text


def anonymous_poc(poc: Poc) -> Poc:
    """Return ``poc`` with `anonymous_command` applied to its command line, and `anonymous_text` to its other
    texts that may name a folder or a machine: reasons, source of the data, environment and notes."""
    return dataclasses.replace(
        poc,
        command=anonymous_command(poc.command),
        cap_reason=anonymous_text(poc.cap_reason),
        data_source=anonymous_text(poc.data_source),
        environment={name: anonymous_text(value) for name, value in poc.environment.items()},
        notes=tuple(map(anonymous_text, poc.notes)),
        runs=tuple(map(_anonymous_run, poc.runs)),
    )


def _anonymous_run(run: Run) -> Run:
    reason = anonymous_text(run.measurement.reason)
    return dataclasses.replace(run, measurement=dataclasses.replace(run.measurement, reason=reason))


def _anonymous_word(word: str) -> str:
    option, sign, value = word.partition("=") if word.startswith("-") else ("", "", word)
    prefix, path = ("hf:", value[3:]) if value.startswith("hf:") else ("", value)
    is_model = bool(prefix) and not path.startswith(("/", "~", "."))
    if sign or not option:
        return f"{option}{sign}{value if is_model else prefix + _last(path)}"
    return word


def _last(path: str) -> str:
    """Return the last component of a path; "FOLDER" if it has none, as "/". Text without a slash or backslash
    is returned as it is."""
    if not re.search(r"[/\\]", path):
        return path
    pure_path = PureWindowsPath(path) if "\\" in path else PurePosixPath(path)
    return pure_path.name or "FOLDER"
