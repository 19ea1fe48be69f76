"""The one exception for bad input."""


class InputError(ValueError):
    """What the user gave cannot work; the message names the option, the value and the way out.

    Scripts print the message alone, without a traceback. Everything else that is raised is a bug.
    """
