"""What a person is told when a run cannot be made: the flag, its value, and what it may be."""


class LoadTestError(Exception):
    """A run that cannot be made, or figures that cannot be read."""

    exit_code = 1


class FlagError(LoadTestError):
    """A flag whose value is not possible."""

    exit_code = 2

    def __init__(self, flag: str, value: object, limit: str):
        given = "" if value is None or value == "" else f" {value}"
        super().__init__(f"{flag}{given}: {limit}")
        self.flag = flag


class TargetError(LoadTestError):
    """A server that cannot be reached, or that does not serve what was asked for."""
