"""The errors for users. A message names the mistake, the value it got, and the remedy."""


class FedVLMError(Exception):
    """A mistake in the input, found before the first write.

    The command line prints the message without a traceback and exits with code 2.
    """


class ConfigError(FedVLMError):
    """One or more mistakes in the configuration. The message lists all of them."""

    def __init__(self, problems: list[str]):
        self.problems = problems
        head = (
            "the configuration has a problem:"
            if len(problems) == 1
            else (f"the configuration has {len(problems)} problems:")
        )
        super().__init__("\n".join([head, *(f"  - {p}" for p in problems)]))

    def __reduce__(self):  # makes the error picklable, for other processes
        return type(self), (self.problems,)


class DataError(FedVLMError):
    """A mistake in the data: a missing column, a corrupt image, a client without rows."""
