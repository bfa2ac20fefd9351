"""Tables of names of a draft's weights in engines' files: one row a tensor, read in both directions.

The left name is the draft module's, the right one the file's; ``{i}`` and ``{j}`` are numbers. The norm
flags and biases of a draft decide which of the rows it uses; a tensor without a row raises.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from mcore_spec.errors import UnsupportedError

Table = Sequence[tuple[str, str]]


def stored_name(table: Table, name: str) -> str:
    """The file's name of a tensor of the draft."""
    return _translate([(ours, theirs) for ours, theirs in table], name)


def module_name(table: Table, name: str) -> str:
    """The draft's name of a tensor of the file."""
    return _translate([(theirs, ours) for ours, theirs in table], name)


def _translate(rows: Table, name: str) -> str:
    for source, target in rows:
        pattern = re.escape(source).replace(r"\{i\}", r"(?P<i>\d+)").replace(r"\{j\}", r"(?P<j>\d+)")
        match = re.fullmatch(pattern, name)
        if match:
            return target.format(**match.groupdict())
    raise UnsupportedError(f"tensor {name} has no name in this format; known: {', '.join(row[0] for row in rows)}")
