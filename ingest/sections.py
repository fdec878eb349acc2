"""One section cut out of a full report: plain text with headings, or the Indiana collection's XML."""

import re
from pathlib import Path
from xml.etree import ElementTree

_HEADING = re.compile(r"(?:^|(?<=[\n.]))[ \t]*([A-Z][A-Za-z]*(?:[ /&-][A-Za-z]+){0,4})[ \t]*:", re.MULTILINE)
"""A heading stands at the start of a line or after a full stop and ends with a colon."""
MAX_REPORT_BYTES = 1 << 20
_SECTIONS = frozenset(
    "findings impression recommendation recommendations technique comparison history indication examination exam "
    "conclusion addendum procedure reason notification wet_read clinical_history clinical_indication "
    "clinical_information reason_for_exam reason_for_examination final_report final_impression".split()
)
"""What reports call their sections, `_` for a space: these are headings in whatever letters."""


def cut_section(report: str, section: str) -> str:
    """The text of a section, stripped; empty where the report has none. A report in XML is recognised by its beginning.

    In plain text a section runs from its heading, whatever its case, to the next heading: words in capitals, or one of
    the usual names of sections. `FINAL IMPRESSION` and `IMPRESSIONS` count as `impression`, `CLINICAL ...` does not.
    """
    if is_xml(report):
        return _cut_xml(report, section)
    headings = [match for match in _HEADING.finditer(report) if _is_heading(match[1], section)]
    parts = []
    for number, match in enumerate(headings):
        if _names(match[1], section):
            end = headings[number + 1].start() if number + 1 < len(headings) else len(report)
            parts.append(report[match.end() : end].strip())
    return "\n".join(part for part in parts if part)


def is_xml(report: str) -> bool:
    """Whether a report begins as XML does."""
    return report.lstrip("\ufeff \t\r\n").startswith("<")


def _is_heading(words: str, section: str) -> bool:
    """Capitals, a usual name, or the wanted section itself; `Heart size: normal` inside a section is no heading."""
    return words.isupper() or words.lower().replace(" ", "_") in _SECTIONS or _names(words, section)


def _names(words: str, section: str) -> bool:
    heading, wanted = words.lower(), section.lower()
    if heading.startswith("clinical ") and not wanted.startswith("clinical "):
        return False  # why the film was made, not what it shows
    return heading in (wanted, f"{wanted}s") or heading.endswith((f" {wanted}", f" {wanted}s"))


def _cut_xml(report: str, section: str) -> str:
    # Entities could name other files or grow without end; radiology reports have none.
    if "<!DOCTYPE" in report or "<!ENTITY" in report:
        return ""
    try:
        root = ElementTree.fromstring(report.encode())
    except (ElementTree.ParseError, ValueError, LookupError):  # the latter two for an encoding it cannot read
        return ""
    texts = [node.text or "" for node in root.iter("AbstractText") if node.get("Label", "").lower() == section.lower()]
    return "\n".join(text.strip() for text in texts if text.strip())


def read_report(folder: Path, name: str) -> str | None:
    """Content of a report file inside `folder`; None where it is missing, leads outside, is too large or not UTF-8."""
    if not name.strip() or "\0" in name:
        return None
    try:
        path = (folder / name).resolve()
        if not path.is_relative_to(folder.resolve()) or not path.is_file():  # a pipe would never end
            return None
        with open(path, "rb") as file:
            content = file.read(MAX_REPORT_BYTES + 1)
        return content.decode("utf-8-sig") if len(content) <= MAX_REPORT_BYTES else None
    except (OSError, RuntimeError, UnicodeDecodeError):  # RuntimeError: links in a circle
        return None
