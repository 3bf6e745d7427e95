"""What an entry of a table has to be: each of these says in a ValueError what it is not."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from packaging.specifiers import SpecifierSet

_KINDS = {str: "text", int: "number", list: "list", dict: "table"}


@dataclass(frozen=True)
class Table:
    """A table of TOML."""

    values: Mapping[str, Any]

    def __iter__(self) -> Iterator[str]:
        return iter(self.values)

    def text(self, key: str, default: str | None = None) -> str:
        return str(self._get(key, str, default))

    def texts(self, key: str) -> tuple[str, ...]:
        values = self._get(key, list, [])
        must(all(isinstance(value, str) for value in values), f"{key} is no list of texts")
        return tuple(values)

    def number(self, key: str, default: int | None = None) -> int:
        value = int(self._get(key, int, default))
        must(value >= 0, f"{key} is negative")
        return value

    def table(self, key: str, default: Mapping[str, Any] | None = None) -> Table:
        return Table(self._get(key, dict, default))

    def tables(self, key: str) -> tuple[Table, ...]:
        values = self._get(key, list, [])
        must(all(isinstance(value, dict) for value in values), f"{key} is no list of tables")
        return tuple(map(Table, values))

    def by_versions(self, key: str) -> Mapping[str, Table]:
        """A table of tables whose keys are version specifiers (PEP 440)."""
        table = self._by_versions(key)
        return {versions: table.table(versions) for versions in table}

    def texts_by_versions(self, key: str) -> Mapping[str, str]:
        """A table of texts whose keys are version specifiers (PEP 440)."""
        table = self._by_versions(key)
        return {versions: table.text(versions) for versions in table}

    def _by_versions(self, key: str) -> Table:
        table = self.table(key, {})
        for versions in table:
            SpecifierSet(versions)
        return table

    def _get(self, key: str, kind: type, default: Any) -> Any:
        value = self.values.get(key, default)
        # Not isinstance: a bool is an int to Python.
        must(type(value) is kind, f"{key} is missing or no {_KINDS[kind]}")
        return value


def must(condition: object, otherwise: str) -> None:
    """Raise a ValueError where something is not so."""
    if not condition:
        raise ValueError(otherwise)


def pattern(text: str) -> str:
    """A regular expression."""
    try:
        re.compile(text)
    except (re.error, OverflowError) as error:
        raise ValueError(f"{text} is no regular expression ({error})") from None
    return text
