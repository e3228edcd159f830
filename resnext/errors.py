"""What a person can mend."""

from resnext.names import shown


class UserError(Exception):
    """One line that says what is wrong and how to mend it; the command line prints it and exits with 2."""

    def __str__(self) -> str:
        return shown(super().__str__())  # one line, whatever the names in it


class ToldError(UserError):
    """One that all processes end with, and that the first of them prints."""
