"""Problems that the user can solve."""


class UserError(Exception):
    """Something that the user can solve, and how."""

    def __init__(self, problem, advice):
        super().__init__(f"{problem}: {advice}")


def first_line(error):
    """The first line of an exception's text, or the name of its class."""
    lines = str(error).splitlines()
    return lines[0] if lines else type(error).__name__
