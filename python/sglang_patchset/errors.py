"""The one kind of error that a user can mend."""


class PatchsetError(Exception):
    """Says in one line what is wrong, where, and what to do next. Nothing was changed."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))
