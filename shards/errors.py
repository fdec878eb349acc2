"""The one exception that is meant for a person's eyes."""


class InputError(ValueError):
    """A mistake in what the user gave: a file, a column, a setting, a damaged shard.

    The message is one line: what was found, where, what to do. Command lines print it without a traceback and
    exit with 2. It never holds a patient id, a report's text or an image's original path; opaque keys only.
    """
