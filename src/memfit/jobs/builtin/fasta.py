"""Read protein sequences from FASTA files strictly: the first fault is reported with its location."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from memfit.files.read import read_data_text
from memfit.types.errors import UserError

_MOST_BYTES: Final = 8 * 2**30  # more than the largest genomes
RESIDUES: Final = "ACDEFGHIKLMNPQRSTVWY"
_AMBIGUOUS: Final = "BJOUXZ"  # IUPAC: Asx, Leu or Ile, pyrrolysine, selenocysteine, any, Glx
STATES: Final = "HEC"  # helix, strand, coil


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Protein:
    """A protein. ``name``: first word of its header line, or "line N" if the header is empty. ``sequence``:
    amino-acid letters in upper case. ``states``: one of H, E, C (helix, strand, coil) per residue, or "" if
    they are unknown."""

    name: str
    sequence: str
    states: str = ""


def read_text(path: str) -> str:
    """Return the text of a UTF-8 file, decompressed with gzip if its name ends in ``.gz``.

    Raises UserError if it cannot be read or decompressed, has more than 8 GiB, unpacks to more than
    `unpacked_limit`, is not UTF-8, or has nothing but white space.
    """
    text = read_data_text(Path(path), most_bytes=_MOST_BYTES)
    if not text.strip():
        raise UserError(f"the data file {path} is empty or only white space")
    return text


def read_fasta(path: str) -> list[Protein]:
    """Return the proteins of a FASTA file, in its order, with unknown states. Sequences are in upper case,
    without a final ``*``. The letters of the 20 amino acids and B, J, O, U, X, Z are allowed, in either case.

    Raises UserError as `read_text` does, and with file and line for any other character, for a record without
    a sequence, and for text before the first header.
    """
    proteins = []
    for line_number, name, lines in _records(path):
        if not (sequence := _sequence(path, lines)):
            raise UserError(
                f"{path} line {line_number}: no sequence follows the header of {name!r}",
                allowed="FASTA: after each header (a line that starts with '>'), lines of sequence",
            )
        proteins.append(Protein(name=name, sequence=sequence))
    return proteins


def read_labelled(path: str) -> list[Protein]:
    """Return the proteins of a file, in its order, with their secondary structure. Each has three lines::

        >name
        MKTAYIAKQR
        CCHHHHHHCC

    Blank lines, lower case in both, and a final ``*`` of the sequence are allowed. Raises UserError as
    `read_text` does, and with file and line if a name is not followed by exactly two lines of the same
    length, for any letter but those that `read_fasta` allows or H, E, C, and for text before the first name.
    """
    proteins = []
    for line_number, name, lines in _records(path):
        if len(lines) != 2:
            raise UserError(
                f"{path} line {line_number}: the header {name!r} is followed by {len(lines)} lines of text",
                allowed="two lines of the same length after each header: the sequence, and the state of each "
                "residue as H, E or C",
            )
        sequence, states = _sequence(path, lines[:1]), _check_letters(path, *lines[1], STATES, "a state")
        if len(sequence) != len(states):
            raise UserError(
                f"{path} line {lines[1][0]}: {len(states)} states in this line for {len(sequence)} residues "
                f"of {name!r}",
                allowed="one state (H, E or C) for each residue, without a state for a final *",
            )
        proteins.append(Protein(name=name, sequence=sequence, states=states))
    return proteins


def _records(path: str) -> Iterator[tuple[int, str, list[tuple[int, str]]]]:
    """Yield for each record (line number of its header, name, following lines as (line number, text)),
    without blank lines. The name is the first word after ``>``, or "line N" if there is none. Raises
    UserError as `read_text` does, and for text before the first header."""
    header: tuple[int, str] | None = None
    body: list[tuple[int, str]] = []
    for number, raw in enumerate(read_text(path).splitlines(), start=1):
        line = raw.strip()
        if line.startswith(">"):
            if header:
                yield *header, body
            header, body = (number, (line[1:].split() or [f"line {number}"])[0]), []
        elif line and header is None:
            raise UserError(
                f"{path} line {number}: the first line with text must start with '>', not {line[:20]!r}"
            )
        elif line:
            body.append((number, line))
    if header:
        yield *header, body


def _sequence(path: str, lines: list[tuple[int, str]]) -> str:
    sequence = "".join(text for _, text in lines).removesuffix("*")
    # only valid letters: the usual case, tested first
    if sequence.isascii() and not sequence.upper().strip(RESIDUES + _AMBIGUOUS):
        return sequence.upper()
    *leading_lines, (number, last_line) = lines
    parts = [*leading_lines, (number, last_line.removesuffix("*"))]
    return "".join(_check_letters(path, n, text, RESIDUES + _AMBIGUOUS, "an amino acid") for n, text in parts)


def _check_letters(path: str, number: int, line: str, alphabet: str, what: str) -> str:
    for column, letter in enumerate(line, start=1):
        # some letters beyond ASCII have several capital letters
        if not letter.isascii() or letter.upper() not in alphabet:
            raise UserError(
                f"{path} line {number}, column {column}: {letter!r} is not {what}",
                allowed=f"the letters {alphabet}, in upper or lower case",
            )
    return line.upper()
