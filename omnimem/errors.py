"""The one exception that means "you can fix this": entry points print its line and exit with status 2.

Everything else that is raised is a defect of ours (or of the machine) and exits with status 1.
"""


class OmniMemError(Exception):
    """A mistake in usage or input. Its message is one line: what is wrong, where, and what to do."""


def is_storable(text: str) -> bool:
    """Whether a file in UTF-8 and a path can hold `text`: no lone surrogates (undecodable bytes), no NUL characters."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return "\0" not in text
