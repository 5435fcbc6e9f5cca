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
    """Return the tokens of a SMILES string in order.

    One token each are an atom in brackets (``[nH]``), ``Br``, ``Cl``, a two-digit ring number (``%12``), and
    any other character (Schwaller et al. 2019).
    """
    return _TOKEN.findall(smiles)


def graph(smiles: str) -> Graph:
    """Return (elements, bonds): for each atom that the string names, in order, its element in capitals, such
    as "CL"; and for each bond the pair of the indices of its atoms.

    Raises ValueError if a ring or branch is not closed, if a branch is closed that was not opened, if a ring
    number follows no atom, or if it closes a ring at the atom that opened it.
    """
    atoms: list[str] = []
    bonds: list[tuple[int, int]] = []
    branches: list[int] = []
    rings: dict[str, int] = {}
    last_atom = -1
    for token in tokens(smiles):
        if token == "(":
            branches.append(last_atom)
        elif token in ").":
            last_atom = _close_branch(branches, smiles) if token == ")" else -1
        elif token[0] == "%" or token.isdigit():
            if last_atom < 0 or rings.get(token) == last_atom:
                place = "no atom" if last_atom < 0 else "the same atom twice"
                raise ValueError(f"the ring number {token} follows {place} in {smiles!r}")
            if token in rings:
                bonds.append((rings.pop(token), last_atom))
            else:
                rings[token] = last_atom
        elif token not in _BONDS:
            atoms.append(_element(token))
            if last_atom >= 0:
                bonds.append((last_atom, len(atoms) - 1))
            last_atom = len(atoms) - 1
    if rings or branches:
        raise ValueError(f"a ring or branch is not closed in {smiles!r}")
    return atoms, bonds


def _close_branch(branches: list[int], smiles: str) -> int:
    if not branches:
        raise ValueError(f"a ) closes a branch that was not opened in {smiles!r}")
    return branches.pop()


def _element(token: str) -> str:
    match = _ELEMENT.match(token)
    return (match[1] if match else token).upper()


def ring_skeleton(smiles: str) -> str:
    """Return a name for the rings of a molecule and the chains that link them, regardless of bond orders; ""
    for a molecule without rings.

    This skeleton is that of Bemis & Murcko 1996 (J. Med. Chem. 39:2887). Side chains are removed atom by
    atom; the rest is named by a hash after colour refinement over elements and bonds. Equal skeletons get
    equal names. Different ones may share a name, which only keeps them on one side of a split. Raises
    ValueError as `graph` does.
    """
    atoms, bonds = graph(smiles)
    neighbours: dict[int, set[int]] = {atom: set() for atom in range(len(atoms))}
    for atom_index, neighbour in bonds:
        neighbours[atom_index].add(neighbour)
        neighbours[neighbour].add(atom_index)
    ends = [atom for atom, linked_atoms in neighbours.items() if len(linked_atoms) < 2]
    while ends:
        end = ends.pop()
        for neighbour in neighbours.pop(end, ()):
            neighbours[neighbour].discard(end)
            if len(neighbours[neighbour]) < 2:
                ends.append(neighbour)
    colours = {atom: atoms[atom] for atom in neighbours}
    for _ in neighbours:
        new_colours = {
            a: _digest([colours[a], *sorted(colours[b] for b in neighbours[a])]) for a in neighbours
        }
        if len(set(new_colours.values())) == len(set(colours.values())):
            break
        colours = new_colours
    return _digest(sorted(colours.values())) if neighbours else ""


def _digest(parts: list[str]) -> str:
    return hashlib.blake2b("|".join(parts).encode(), digest_size=12).hexdigest()
