"""The one kind of error that a user can mend."""


class PatchsetError(Exception):
    """Says in one line what is wrong, where, and what to do next. Nothing was changed."""

    def __init__(self, message: str) -> None:
        # File names and what others wrote can hold anything; a terminal would obey some of it.
        line = " ".join(message.split())
        super().__init__("".join(char if char.isprintable() else _escaped(char) for char in line))


def _escaped(char: str) -> str:
    return char.encode("ascii", "backslashreplace").decode() if ord(char) > 127 else f"\\x{ord(char):02x}"


def fault(error: Exception) -> PatchsetError:
    """What is said of an exception that nobody has foreseen; `python -X dev` shows where it comes from."""
    return PatchsetError(
        f"{type(error).__name__} ({error}): a fault of sglang-patchset, not of what it was run on: report it "
        "with what `python -X dev -m sglang_patchset` says"
    )
