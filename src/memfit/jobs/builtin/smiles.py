"""SMILES strings: their tokens and the ring skeleton of the molecule, without a chemistry package."""

from __future__ import annotations

import hashlib
import re
from typing import Final

_TOKEN: Final = re.compile(r"\[[^\]]+\]|Br|Cl|%\d\d|.")
_ELEMENT: Final = re.compile(r"\[\d*([A-Za-z][a-z]?)")
_BONDS: Final = frozenset("-=#$:/\\~")

Graph = tuple[list[str], list[tuple[int, int]]]


def tokens(smiles: str) -> list[str]:
    """Split a SMILES string.

    Atoms in brackets and two-letter elements are one token each (Schwaller et al. 2019).
    """
    return _TOKEN.findall(smiles)


def graph(smiles: str) -> Graph:
    """Return (element of each heavy atom in capitals, bonded pairs).

    Raises ValueError if a ring or branch is not closed.
    """
    atoms: list[str] = []
    bonds: list[tuple[int, int]] = []
    branches: list[int] = []
    rings: dict[str, int] = {}
    last = -1
    for token in tokens(smiles):
        if token == "(":
            branches.append(last)
        elif token in ").":
            last = _reopened(branches, smiles) if token == ")" else -1
        elif token[0] == "%" or token.isdigit():
            if token in rings:
                bonds.append((rings.pop(token), last))
            else:
                rings[token] = last
        elif token not in _BONDS:
            atoms.append(_element(token))
            if last >= 0:
                bonds.append((last, len(atoms) - 1))
            last = len(atoms) - 1
    if rings or branches:
        raise ValueError(f"an unclosed ring or branch in {smiles!r}")
    return atoms, bonds


def _reopened(branches: list[int], smiles: str) -> int:
    if not branches:
        raise ValueError(f"a branch that was never opened in {smiles!r}")
    return branches.pop()


def _element(token: str) -> str:
    found = _ELEMENT.match(token)
    return (found[1] if found else token).upper()


def ring_skeleton(smiles: str) -> str:
    """Return a name for the rings and the chains between them, without bond orders; "" for a molecule without
    rings.

    The skeleton is that of Bemis & Murcko 1996 (J. Med. Chem. 39:2887). Side chains are removed atom by atom;
    the rest is named by colour refinement over elements and bonds. Equal skeletons get equal names. Different
    ones may share a name, which keeps them on one side of a split.
    """
    atoms, bonds = graph(smiles)
    near: dict[int, set[int]] = {atom: set() for atom in range(len(atoms))}
    for one, other in bonds:
        near[one].add(other)
        near[other].add(one)
    ends = [atom for atom, others in near.items() if len(others) < 2]
    while ends:
        end = ends.pop()
        for other in near.pop(end, ()):
            near[other].discard(end)
            if len(near[other]) < 2:
                ends.append(other)
    colours = {atom: atoms[atom] for atom in near}
    for _ in near:
        refined = {a: _digest([colours[a], *sorted(colours[b] for b in near[a])]) for a in near}
        if len(set(refined.values())) == len(set(colours.values())):
            break
        colours = refined
    return _digest(sorted(colours.values())) if near else ""


def _digest(parts: list[str]) -> str:
    return hashlib.blake2b("|".join(parts).encode(), digest_size=12).hexdigest()
