"""What the CSV files of one source say about its rows: reports, labels, patients, splits, image files."""

import os
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import regex
from numpy.typing import NDArray

from ingest.config import SourceConfig
from ingest.labels import read_labels
from ingest.reports import cut_section, is_xml, read_columns, read_report, strings
from shards.errors import InputError
from shards.schema import SPLITS

REPORT_EMPTY = "report is empty"
REPORT_MISSING = "report is missing"
NO_SECTION = "report has no such section"
NO_REPORT_FILE = "report file cannot be read"

_SPLIT_NAMES = {
    "training": "train",
    "valid": "val",
    "validate": "val",
    "validation": "val",
    "dev": "val",
    "testing": "test",
}
"""What else data sets call the splits; MIMIC-CXR has `validate`."""
_REGEX_S, _REGEX_ROW_S = 5.0, 0.001
"""CPU seconds that --group-regex may take: for a source, and for each row besides."""
_FILE_NAME, _LOOKED_AT = re.compile(r".+\.(?:txt|xml|png|jpe?g|webp|tiff?|dcm)\s*", re.IGNORECASE), 64
"""What no report reads like, and how many rows tell."""
_FIELD = re.compile(r"\{([^{}]+)\}")


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceTable:
    """One source's rows."""

    rows: int
    texts: pa.ChunkedArray
    """(rows,) reports; empty where `reasons` says why there is none."""
    reasons: dict[int, str]
    """Row -> why its report disqualifies it."""
    labels: dict[str, NDArray[np.float32]]
    """Label -> (rows,), NaN for unknown."""
    patients: NDArray[np.int64] | None
    """(rows,) an index into `patient_ids`; None without a group column."""
    patient_ids: pa.Array
    """(patients,) the different ids, in order of first appearance."""
    namespace: str | None
    """What sources with the same patients call them; None where they are this source's own."""
    splits: NDArray[np.int64] | None
    """(rows,) index into SPLITS, -1 for a row that the fractions decide; None where the source says nothing."""
    names: list[str] = field(default_factory=list)
    """(rows,) image files; empty for HDF5."""
    folder: Path | None = None
    """Where they lie."""


def read_table(config: SourceConfig) -> SourceTable:
    """Read the CSV files of a source. InputError for a missing column, a bad label, a patient that cannot be found."""
    fields = _FIELD.findall(config.text_template) if config.text_template else [config.text_column]
    if not fields:
        raise InputError(f"--text-template {config.text_template!r} names no column; write one as {{impression}}")
    optional = (config.label_list_column, config.group_column, config.split_column)
    path = (config.path_column,) if config.images else ()
    names = dict.fromkeys([*fields, *config.label_columns, *(name for name in optional if name), *path])
    columns = read_columns(config.csv, tuple(names))
    rows = len(columns[fields[0]])
    if not rows:
        raise InputError(f"{', '.join(map(str, config.csv))}: a header and no row; row i must describe film i")
    texts, reasons = _texts(config, columns)
    patients = _patients(config, columns) if config.group_column else None
    return SourceTable(
        rows=rows,
        texts=texts,
        reasons=reasons,
        labels=read_labels(config, columns),
        patients=patients.indices.to_numpy().astype(np.int64) if patients else None,
        patient_ids=patients.dictionary if patients else pa.array([], pa.large_string()),
        namespace=config.group_namespace,
        splits=_splits(config, columns, rows),
        names=columns[config.path_column].to_pylist() if config.images else [],
        folder=Path(os.path.realpath(config.images)) if config.images else None,
    )


def _texts(config: SourceConfig, columns: dict[str, pa.ChunkedArray]) -> tuple[pa.ChunkedArray, dict[int, str]]:
    """Reports as samples will hold them, and why some rows have none."""
    reasons: dict[int, str] = {}
    if config.text_template:
        texts = _fill_template(config.text_template, columns)
    else:
        texts = columns[config.text_column]
    if not config.text_folder and texts.length() and all(map(_FILE_NAME.fullmatch, strings(texts[:_LOOKED_AT]))):
        raise InputError(
            f"column {config.text_column!r} holds names of files, no reports; give another --text-column, or say by "
            "--text-folder where files of reports lie"
        )
    if config.text_folder or config.section:
        texts = _extract(config, texts, reasons)
    first = 0
    for chunk in texts.chunks:  # chunk by chunk: copies of all reports would double the memory
        stripped = pc.utf8_trim_whitespace(chunk)
        named = pc.equal(pc.utf8_lower(stripped), config.missing_text.strip().lower())
        for found, why in ((pc.equal(stripped, ""), REPORT_EMPTY), (named, REPORT_MISSING)):
            for row in np.flatnonzero(found.to_numpy(zero_copy_only=False)).tolist():
                reasons.setdefault(first + row, why)
        first += len(chunk)
    return texts, reasons


def _fill_template(template: str, columns: dict[str, pa.ChunkedArray]) -> pa.ChunkedArray:
    """The template with each row's values in it; empty where all of them are blank."""
    first, *rest = _FIELD.split(template)  # literals and names in turn
    names, literals = rest[::2], rest[1::2]
    filled = []
    for values in zip(*(strings(columns[name]) for name in names), strict=True):
        text = first + "".join(value + literal for value, literal in zip(values, literals, strict=True))
        filled.append(text if any(value.strip() for value in values) else "")
    return pa.chunked_array([pa.array(filled, pa.large_string())])


def _extract(config: SourceConfig, texts: pa.ChunkedArray, reasons: dict[int, str]) -> pa.ChunkedArray:
    """Reports out of files, sections out of reports."""
    found = []
    for row, text in enumerate(strings(texts)):
        report: str | None = text
        if config.text_folder:
            report = read_report(config.text_folder, text)
        if report is None:
            reasons[row] = NO_REPORT_FILE
        elif not config.section and is_xml(report):
            raise InputError(f"the report of row {row} is XML; say by --section which part of it is the text")
        elif config.section and report.strip():
            report = cut_section(report, config.section)
            if not report:
                reasons[row] = NO_SECTION
        found.append(report or "")
    return pa.chunked_array([pa.array(found, pa.large_string())])


def _patients(config: SourceConfig, columns: dict[str, pa.ChunkedArray]) -> pa.DictionaryArray:
    """(rows,) the patients' ids."""
    column = columns[config.group_column or ""]
    if config.group_regex:
        column = pa.chunked_array([pa.array(_taken(config.group_regex, column), pa.large_string())])
    column = pc.utf8_trim_whitespace(column)  # `7` and `7 ` are one patient; `007` is another
    blank = np.flatnonzero(pc.equal(column, "").to_numpy())
    if len(blank):
        what, how = ("no patient by --group-regex in", "mend it") if config.group_regex else ("no", "fill them in")
        raise InputError(f"{len(blank):,} rows have {what} {config.group_column!r}, row {blank[0]} first; {how}")
    return column.combine_chunks().dictionary_encode()


def _taken(expression: str, column: pa.ChunkedArray) -> Iterator[str]:
    """What the expression finds in each row: its first group or the whole match; empty for nothing.

    `regex` finds most of what takes `re` for ever, and gives up the rest.
    """
    pattern = regex.compile(expression)
    until = time.process_time() + _REGEX_S + len(column) * _REGEX_ROW_S
    for row, text in enumerate(strings(column)):
        try:
            match = pattern.search(text, timeout=max(until - time.process_time(), _REGEX_ROW_S))
        except TimeoutError:
            raise InputError(
                f"--group-regex {expression!r} is not done with row {row} after seconds; "
                "write it without repeats inside repeats or alternatives that match the same, such as (a|aa)+"
            ) from None
        yield (match[1] or "" if pattern.groups else match[0]) if match else ""


def _splits(config: SourceConfig, columns: dict[str, pa.ChunkedArray], rows: int) -> NDArray[np.int64] | None:
    if config.split:
        return np.full(rows, SPLITS.index(config.split))
    if not config.split_column:
        return None
    codes = np.full(rows, -1, dtype=np.int64)
    for row, text in enumerate(strings(columns[config.split_column])):
        name = text.strip().lower()
        name = _SPLIT_NAMES.get(name, name)
        if name and name not in SPLITS:
            raise InputError(
                f"row {row} of {config.split_column!r} names no split; valid: {', '.join(SPLITS)}, or blank"
            )
        if name:
            codes[row] = SPLITS.index(name)
    return codes
