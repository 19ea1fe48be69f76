"""The exceptions that scripts print as one line."""


class InputError(ValueError):
    """What the user gave cannot work; the message names the option, the value and the way out.

    Scripts print the message alone, without a traceback. Everything else that is raised is a bug.
    """


class PublishError(RuntimeError):
    """The Hub did not take what was to be published; the message says why and how to go on.

    Attributes:
        is_temporary: Whether the same may succeed later: no connection, too many requests, a fault of the Hub.
    """

    def __init__(self, message: str, is_temporary: bool):
        super().__init__(message)
        self.is_temporary = is_temporary
