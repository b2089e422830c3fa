"""`OmniMemError`, the exception for mistakes of the user: entry points print its message and exit with status 2.

Any other exception is a bug (or a failure of the machine) and exits with status 1.
"""


class OmniMemError(Exception):
    """A mistake in usage or input. Its message is one line: what is wrong, where, and what to do."""


def is_storable(text: str) -> bool:
    """Whether `text` can be written to a UTF-8 file and used as a path: no lone surrogates, no NUL characters."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return "\0" not in text
