"""Labels out of CSV columns: numbers as they are, lists of findings as a column each.

Whoever gets the shards reads the labels, so that what looks like ids or dates is refused unless it is asked for.
"""

import contextlib
import math
import re

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from ingest.config import SourceConfig
from ingest.reports import strings
from shards.errors import InputError
from shards.schema import MAX_LABELS

_NUMBER = re.compile(r"[0-9eE.+-]+")
"""Of what Python takes for a number, what a label is: no `1_0`, no digits of other scripts."""
_LARGE, _MANY = 10_000, 200
"""A number from which on, and different whole ones (or different listed findings) beyond which, a column looks like ids
or dates; ages in days do, too.
"""
_EXACT = 1 << 24
"""Labels are float32, which holds no larger whole numbers exactly."""


def read_labels(config: SourceConfig, columns: dict[str, pa.ChunkedArray]) -> dict[str, NDArray[np.float32]]:
    """Label -> (rows,), NaN for unknown. InputError for what is no label, or does not look like one."""
    labels = {name: _numbers(config, name, columns[name]) for name in config.label_columns}
    if config.label_list_column:
        listed = _listed(config, columns[config.label_list_column])
        twice = sorted(set(listed) & set(labels))
        if twice:
            raise InputError(
                f"label {twice[0]!r} is a column and stands in {config.label_list_column!r} too; leave out one"
            )
        labels |= listed
    return labels


def _numbers(config: SourceConfig, name: str, column: pa.ChunkedArray) -> NDArray[np.float32]:
    """A label column, (rows,), blank to NaN. InputError names column and row of what is no label."""
    values = np.fromiter((_number(text, name, row) for row, text in enumerate(strings(column))), dtype=np.float64)
    large = np.flatnonzero(np.abs(values) >= _EXACT)
    if len(large):
        raise InputError(
            f"row {large[0]} of label column {name!r} has a number of {_EXACT:,} or more, which is not kept exactly; "
            "leave it out of --label-columns"
        )
    if not config.allow_label_numbers:
        _check_ids(values, name)
    return values.astype(np.float32)


def _number(text: str, name: str, row: int) -> float:
    if not text.strip():
        return math.nan
    with contextlib.suppress(ValueError):
        if _NUMBER.fullmatch(text.strip()):
            return float(text)
    raise InputError(f"row {row} of label column {name!r} is neither a number nor blank; correct the CSV")


def _check_ids(values: NDArray[np.float64], name: str) -> None:
    """InputError for a column that may be ids or dates."""
    large = np.flatnonzero(np.abs(values) >= _LARGE)
    # Fractions are measured: scores, logits, ages with a decimal. Ids and dates are whole, be it as `7.0`.
    different = len(np.unique(values[(np.abs(values) > 1) & (values == np.rint(values))]))
    if len(large):
        found = f"row {large[0]} of label column {name!r} has a number of five digits or more"
    elif different > _MANY:
        found = f"label column {name!r} has {different:,} different whole numbers beyond -1 to 1"
    else:
        return
    raise InputError(
        f"{found}, as ids and dates have; leave it out of --label-columns, or take it by --allow-label-numbers if it "
        "does not tell who a patient is"
    )


def _listed(config: SourceConfig, column: pa.ChunkedArray) -> dict[str, NDArray[np.float32]]:
    """`a|b` to a column for each finding. A blank field says nothing: NaN in all of them."""
    found: dict[str, list[int]] = {}
    blank = []
    for row, text in enumerate(strings(column)):
        items = [item.strip() for item in text.split(config.label_list_separator) if item.strip()]
        if not items:
            blank.append(row)
        for item in items:
            found.setdefault(item, []).append(row)
    most = MAX_LABELS if config.allow_label_numbers else _MANY
    if len(found) > most:
        raise InputError(
            f"the label list names {len(found):,} different findings, {most:,} are the most; is it the right column?"
        )
    labels = {}
    for name in sorted(found):
        labels[name] = np.zeros(len(column), dtype=np.float32)
        labels[name][found[name]] = 1
        labels[name][blank] = np.nan
    return labels
