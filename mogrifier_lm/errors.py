"""The one exception that means: the user can mend this. It is shown as one line."""

import difflib


class UserError(ValueError):
    """What is wrong, where, and what to do, in one line."""


def one_line(error: BaseException) -> str:
    """What an error says, in one line of at most 300 characters; its type where it says nothing."""
    return " ".join(str(error).split())[:300] or type(error).__name__


def nearest(key: str, known: list[str]) -> str:
    """«, did you mean X?» where a known key is near, else the list of keys."""
    close = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    return f"did you mean {close[0]}?" if close else f"known keys: {', '.join(known)}"
