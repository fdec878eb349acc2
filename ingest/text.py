"""Whether a report names a side of the body."""

import re

_SIDES = re.compile(
    r"\b(?:left|right|lt|rt|[lr]|lul|lll|rul|rml|rll|lingula\w*|dextro\w*|l[ae]vo\w*|situs)(?:ward|wards|sided)?\b",
    re.IGNORECASE,
)


def names_side(text: str) -> bool:
    """Whether a report names a side of the body, so that its film must not be mirrored (the flip guard).

    Errs towards yes: `right heart border` counts as well as `right-sided effusion`.
    """
    return _SIDES.search(text) is not None
