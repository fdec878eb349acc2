"""The language of `--where`: which samples of a data set are meant.

    Cardiomegaly == 1 and not (Edema == 1 or `Pleural Effusion` == 1)
    split == 'train' and side_words and 10 <= token_count < 77 and Pneumonia is not None

Comparisons of columns with constants or columns, `in (...)`, `is None` for a blank, joined by and, or, not. Columns are
the labels and those of COLUMNS; a name that is no identifier stands in backticks, and `label:NAME` there is always the
label. A blank is neither equal to, nor less or more than anything: `X != 1` and `not X == 1` hold for it.

Parsed by Python's own parser into a tree of which only the nodes named here are taken; nothing is evaluated as code.
"""

import ast
import operator
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import reduce
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from shards.errors import InputError
from shards.schema import LABEL_PREFIX

Kind = Literal["number", "text", "truth"]

COLUMNS: dict[str, Kind] = {
    "split": "text",
    "key": "text",
    "source": "number",
    "row": "number",
    "group": "number",
    "size": "number",
    "token_count": "number",
    "truncated": "truth",
    "side_words": "truth",
}
"""Columns beside the labels. `size` is the image's in bytes, `group` the patient's number."""

MAX_LENGTH = 4000
"""Characters of a query."""
MAX_DEPTH = 50
"""Parentheses and `not` within each other."""

_OPERATORS: dict[type, Callable] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
}
_QUOTED = re.compile(r"""'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*"|`([^`]*)`|`""")

Arrays = Mapping[str, NDArray]
"""Column -> (n,) values."""
Test = Callable[[Arrays], NDArray[np.bool_]]


@dataclass(frozen=True, slots=True)
class Query:
    """A parsed query."""

    text: str
    columns: tuple[str, ...]
    """Parquet columns it reads, sorted; `split` is none of them."""
    _test: Test

    def mask(self, table: pa.Table, split: str) -> NDArray[np.bool_]:
        """(n,) which rows of a table of one split, with the query's columns in it, are meant."""
        arrays = {name: table[name].to_numpy() for name in self.columns}
        arrays["split"] = np.full(table.num_rows, split)
        return self._test(arrays)


def parse_query(text: str, labels: tuple[str, ...], *, setting: str = "where") -> Query:
    """Parse a query over a data set with these labels. InputError, quoting the part that is wrong of what the setting
    says.
    """
    if len(text) > MAX_LENGTH:
        raise InputError(f"the query has {len(text):,} characters; {MAX_LENGTH:,} are the most")
    try:
        source, quoted = _name_backticks(text)
        tree = ast.parse(" ".join(source.split("\n")).strip(), mode="eval")
        parser = _Parser(labels, quoted)
        test = parser.truth(tree.body)
    except SyntaxError as error:
        why = f"it cannot be read ({error.msg})"
    except (ValueError, RecursionError, MemoryError) as error:
        why = str(error) or "it is nested too deeply"
    else:
        return Query(text, tuple(sorted(parser.used - {"split"})), test)
    raise InputError(f"{setting} {text!r}: {why}; write for example: Cardiomegaly == 1 and not `Pleural Effusion` == 1")


def _name_backticks(text: str) -> tuple[str, dict[str, str]]:
    """Replace `names in backticks` by identifiers that stand nowhere else in the text."""
    stem = "q"
    while stem in text:
        stem += "q"
    names: dict[str, str] = {}

    def replace(match: re.Match[str]) -> str:
        if match[0] == "`":
            raise ValueError("a backtick is not closed")
        if match[1] is None:
            return match[0]
        name = f"{stem}{len(names)}"
        names[name] = match[1]
        return f" {name} "

    return _QUOTED.sub(replace, text), names


@dataclass(frozen=True, slots=True)
class _Value:
    """One side of a comparison."""

    kind: Kind
    shown: str
    column: str | None
    constant: Any = None

    def of(self, arrays: Arrays) -> Any:
        return self.constant if self.column is None else arrays[self.column]


class _Parser:
    """From syntax tree to a function of columns. ValueError for whatever is not in the language."""

    def __init__(self, labels: tuple[str, ...], quoted: dict[str, str]) -> None:
        self._labels, self._quoted = labels, quoted
        self.used: set[str] = set()

    def truth(self, node: ast.expr, depth: int = 0) -> Test:
        """A node that stands for yes or no."""
        if depth > MAX_DEPTH:
            raise ValueError(f"it is nested more than {MAX_DEPTH} deep")
        match node:
            case ast.BoolOp(op, values):
                join = np.logical_and if isinstance(op, ast.And) else np.logical_or
                tests = [self.truth(value, depth + 1) for value in values]
                return lambda arrays: reduce(join, (test(arrays) for test in tests))
            case ast.UnaryOp(ast.Not(), operand):
                inner = self.truth(operand, depth + 1)
                return lambda arrays: np.logical_not(inner(arrays))
            case ast.Compare(left, ops, rights):
                sides = [left, *rights]
                links = [self._link(a, op, b) for a, op, b in zip(sides[:-1], ops, rights, strict=True)]
                return lambda arrays: reduce(np.logical_and, (link(arrays) for link in links))
            case ast.Name():
                value = self._value(node)
                if value.kind != "truth":
                    raise ValueError(f"{value.shown} is no yes or no; compare it, as in {value.shown} == 1")
                return lambda arrays: value.of(arrays).astype(bool)
        raise ValueError(f"{self._show(node)} is no comparison")

    def _link(self, left: ast.expr, op: ast.cmpop, right: ast.expr) -> Test:
        """One comparison of a chain."""
        if isinstance(op, ast.Is | ast.IsNot):
            return self._blank(self._value(left), right, isinstance(op, ast.Is))
        if isinstance(op, ast.In | ast.NotIn):
            return self._member(self._value(left), right, isinstance(op, ast.In))
        one, other = self._value(left), self._value(right)
        compare = _OPERATORS[type(op)]
        self._check_kinds(one, other)
        if one.kind == "truth" and not isinstance(op, ast.Eq | ast.NotEq):
            raise ValueError(f"{one.shown} is yes or no, neither less nor more")
        return lambda arrays: compare(one.of(arrays), other.of(arrays))

    def _blank(self, value: _Value, right: ast.expr, blank: bool) -> Test:
        if not (isinstance(right, ast.Constant) and right.value is None):
            raise ValueError("`is` and `is not` take None only")
        if value.column is None or not value.column.startswith(LABEL_PREFIX):
            raise ValueError(f"{value.shown} is no label, so never blank")
        return lambda arrays: np.isnan(value.of(arrays)) == blank

    def _member(self, value: _Value, right: ast.expr, inside: bool) -> Test:
        if not isinstance(right, ast.Tuple | ast.List | ast.Set) or not right.elts:
            raise ValueError("`in` takes a list of constants, as in (0, -1)")
        choices = [self._value(element) for element in right.elts]
        for choice in choices:
            self._check_kinds(value, choice)
        return lambda arrays: reduce(np.logical_or, (value.of(arrays) == c.of(arrays) for c in choices)) == inside

    def _check_kinds(self, one: _Value, other: _Value) -> None:
        if one.column is None and other.column is None:
            raise ValueError(f"{one.shown} and {other.shown} are both constants")
        if one.kind != other.kind:
            raise ValueError(f"{one.shown} is a {one.kind}, {other.shown} is a {other.kind}")

    def _value(self, node: ast.expr) -> _Value:
        """A column or a constant."""
        match node:
            case ast.Name(name):
                return self._column(self._quoted.get(name, name))
            case ast.UnaryOp(ast.USub(), ast.Constant(int() | float() as value)) if not isinstance(value, bool):
                return _Value("number", self._show(node), None, -value)
            case ast.Constant(value) if type(value) in (int, float, str, bool):
                kind: Kind = "text" if isinstance(value, str) else "truth" if isinstance(value, bool) else "number"
                return _Value(kind, self._show(node), None, value)
        raise ValueError(f"{self._show(node)} is neither a column nor a constant")

    def _column(self, name: str) -> _Value:
        if name in COLUMNS:
            self.used.add(name)
            return _Value(COLUMNS[name], name, name)
        label = name.removeprefix(LABEL_PREFIX)
        if label not in self._labels:
            known = ", ".join((*self._labels, *COLUMNS))
            raise ValueError(f"no column {name!r}; columns are {known}")
        self.used.add(LABEL_PREFIX + label)
        return _Value("number", label, LABEL_PREFIX + label)

    def _show(self, node: ast.expr) -> str:
        text = ast.unparse(node)
        for name, quoted in self._quoted.items():
            text = text.replace(name, f"`{quoted}`")
        return text if len(text) <= 60 else text[:57] + "..."
