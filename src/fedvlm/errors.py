"""The one error that users see: what was wrong, the value it got, what to do."""


class FedVLMError(Exception):
    """A mistake in the input, found before anything was written.

    The command line prints the message without a traceback and exits with code 2.
    """


class ConfigError(FedVLMError):
    """One or more mistakes in the configuration; the message lists all of them."""

    def __init__(self, problems: list[str]):
        self.problems = problems
        head = (
            "the configuration has a problem:"
            if len(problems) == 1
            else (f"the configuration has {len(problems)} problems:")
        )
        super().__init__("\n".join([head, *(f"  - {p}" for p in problems)]))

    def __reduce__(self):  # so that it crosses process boundaries
        return type(self), (self.problems,)


class DataError(FedVLMError):
    """The data cannot be used as asked: a missing column, a corrupt image, an empty client."""
