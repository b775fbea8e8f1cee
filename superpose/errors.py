"""The one exception for what a user can mend: a file, a field, a directory."""


class InputError(ValueError):
    """Bad input. The message is one line that names the field or file and the remedy; the command line exits with 2."""
