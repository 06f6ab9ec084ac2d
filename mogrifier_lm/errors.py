"""The one exception that means: the user can mend this. It is shown as one line."""


class UserError(ValueError):
    """What is wrong, where, and what to do, in one line."""
