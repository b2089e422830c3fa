"""`OmniMemError`: an error with a known cause and remedy (usage, data, memory, disk). Entry points exit with status 2.

Any other exception is a bug, or an interruption, and exits with status 1.
"""


class OmniMemError(Exception):
    """An error that the user can fix. Its message is one line: what is wrong, where, and what to do."""


def is_valid_text(text: str) -> bool:
    """Whether `text` can be written to a UTF-8 file and used as a path: no lone surrogates, no NUL characters."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return "\0" not in text
