"""The one error that reaches a user: what was found, where, what was expected, what to do."""


class ReapcError(Exception):
    """A failure that the user can act on.

    ``exit_code`` 1: it cannot be done (does not fit, not servable, below a threshold);
    2: the request is wrong (recipe, option, file). ``hint`` is what to do about it.
    """

    def __init__(self, message: str, *, hint: str = "", exit_code: int = 2) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.exit_code = exit_code

    def __str__(self) -> str:
        return f"{self.message}\n  {self.hint}" if self.hint else self.message


class CannotBeDone(ReapcError):
    """The request is well formed, but the answer is no (exit code 1)."""

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message, hint=hint, exit_code=1)
