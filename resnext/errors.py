"""What a person can mend."""


class UserError(Exception):
    """One line that says what is wrong and how to mend it; the command line prints it and exits with 2."""


class ToldError(UserError):
    """One that all processes end with, and that the first of them prints."""
