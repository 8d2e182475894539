"""Tables of what kernels need, which a compiler's version and every row's name make comparable."""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

ARCHITECTURES = ("8.0", "9.0", "10.0")
LAST = "architecture"  # of what tells rows apart


def short(architecture: str) -> str:
    return "sm_" + architecture.replace(".", "")


def order(row: tuple) -> tuple:
    """That of names, but sm_90 is before sm_100."""
    return *row[:-1], len(row[-1]), row[-1]


def write(path: Path, origin: str, names: tuple[str, ...], found: Mapping[tuple[str, ...], NamedTuple]) -> None:
    """``names``: of what tells rows apart, before the architecture. ``origin`` ends with the compiler's version."""
    fields = next(iter(found.values()))._fields
    rows = [(*names, LAST, *fields), *((*row, *found[row]) for row in sorted(found, key=order))]
    widths = [max(len(str(row[i])) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(str(cell).ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]
    path.write_text("\n".join([origin, *lines]) + "\n")


def read(path: Path) -> tuple[str, dict[tuple[str, ...], NamedTuple]]:
    """The version, and the rows."""
    first, header, *lines = path.read_text().splitlines()
    names = header.split()
    fields = names[names.index(LAST) + 1 :]
    kind = namedtuple("Resources", fields)
    rows = [line.split() for line in lines]
    return first.split()[-1], {tuple(row[: -len(fields)]): kind(*map(int, row[-len(fields) :])) for row in rows}


def more_than(recorded: Mapping[tuple, NamedTuple], found: Mapping[tuple, NamedTuple]) -> list[str]:
    """What is above the record, of kernels that are in both."""
    return [
        f"{' '.join(row)}: {name} {value}, recorded {most}"
        for row in found.keys() & recorded.keys()
        for name, value, most in zip(found[row]._fields, found[row], recorded[row])
        if value > most
    ]
