"""What a person can mend."""


class UserError(Exception):
    """One line that says what is wrong and how to mend it; the command line prints it and exits with 2.

    Of many processes the first one prints it: they all come to it.
    """


class OwnError(UserError):
    """One that this process alone has come to, and prints."""
