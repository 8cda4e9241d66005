"""What can go wrong with a request. Front doors turn these into status codes; the engine only raises them."""


class RequestError(Exception):
    """A request that cannot be served as it stands."""


class InvalidArgumentError(RequestError):
    """A field with an impossible value."""

    def __init__(self, field: str, value: object = None, limit: str = ""):
        """`field` alone is a message that is complete already."""
        shown = repr(value)
        if len(shown) > 80:
            shown = shown[:77] + "..."
        super().__init__(f"{field} = {shown}: {limit}" if limit else field)


class NotFoundError(RequestError):
    """An unknown model, session or snapshot."""


class OverloadedError(RequestError):
    """The queue is full, or a quota is spent."""


class UnavailableError(RequestError):
    """Loading, draining, or no replica left."""


class FailedPreconditionError(RequestError):
    """Right in itself, but not for this model or not now."""


class AbortedError(RequestError):
    """Somebody else was quicker; all of it is to be tried again."""


class DataLossError(RequestError):
    """Something that was kept is damaged."""


class DeadlineExceededError(RequestError):
    """The request's time was over before it was done."""


class UnauthenticatedError(RequestError):
    """No credential, or one that is not known."""


class PermissionDeniedError(RequestError):
    """Known, but not allowed to."""


class UnimplementedError(RequestError):
    """Part of the protocol, but not served (yet)."""


class ServeConfigError(Exception):
    """A serving file or an option that cannot be used, with the reason a person needs to mend it."""
