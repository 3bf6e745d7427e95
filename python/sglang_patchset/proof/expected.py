"""What the regression tests have to say: `tests/regression/<fix>/expected.toml`."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field

from packaging.specifiers import SpecifierSet
from packaging.version import Version

from sglang_patchset.catalog import Catalog, Fix
from sglang_patchset.errors import PatchsetError
from sglang_patchset.schema import Table, must, pattern

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


@dataclass(frozen=True)
class Suite:
    """A file of regression tests, by its path in the clone.

    `reds` maps version specifiers (PEP 440) to the tests that fail on those releases as published, each with
    a regular expression for its failure's text. `gpus` is how many GPUs they take. `base_has` names fixes
    without which the bug cannot be reached: they are in the tree that the tests are red on. `own_packages`
    are version specifiers too, of the releases that the tests can say something of only where the torch and
    the transformers are those that the release runs with. `not_run` maps those of the releases that the
    tests do not fit to the reason.
    """

    test: str
    reds: Mapping[str, Mapping[str, str]]
    gpus: int = 0
    base_has: tuple[str, ...] = ()
    own_packages: tuple[str, ...] = ()
    not_run: Mapping[str, str] = field(default_factory=dict)

    def needs_own_packages(self, version: Version) -> bool:
        """Whether the tests take that release's own torch and transformers."""
        return any(version in SpecifierSet(versions) for versions in self.own_packages)

    def misfit(self, version: Version) -> str:
        """Why the tests do not fit that release; empty where they do."""
        reasons = (reason for versions, reason in self.not_run.items() if version in SpecifierSet(versions))
        return next(reasons, "")

    def reds_of(self, version: Version) -> Mapping[str, str]:
        """The tests that fail on that release as published, with their signatures."""
        matching = (tests for versions, tests in self.reds.items() if version in SpecifierSet(versions))
        return {name: signature for tests in matching for name, signature in tests.items()}


@dataclass(frozen=True)
class Expected:
    """One fix's tests: `suite` runs without a GPU, on every release; `cuda` where they have reds."""

    fix: Fix
    suite: Suite
    cuda: tuple[Suite, ...] = ()


def load(catalog: Catalog, fix: Fix) -> Expected:
    """Read what the tests of a fix have to say.

    Raises:
        PatchsetError: no clone, no such table, or one that says what it cannot say.
    """
    file = catalog.clone() / "tests" / "regression" / fix.name / "expected.toml"
    try:
        entry = Table(tomllib.loads(file.read_text(encoding="utf-8")))
        expected = Expected(
            fix, _suite(fix, entry), tuple(_suite(fix, each) for each in entry.tables("cuda"))
        )
        for suite in expected.cuda:
            must(set(suite.base_has) <= catalog.fixes.keys(), "base-has names a fix that is not there")
    except OSError as error:
        raise PatchsetError(f"{file}: {error.strerror}: write it, docs/adding-a-fix.md says how") from None
    except (ValueError, RecursionError) as error:
        raise PatchsetError(f"{file}: {error}: mend it") from None
    return expected


def load_all(catalog: Catalog) -> list[Expected]:
    """`load` for every fix, in the catalogue's order."""
    return [load(catalog, fix) for fix in catalog.fixes.values()]


def _suite(fix: Fix, entry: Table) -> Suite:
    test = entry.text("test")
    must("/" not in test and test.endswith(".py"), "test is no file beside this one")
    reds = {
        versions: {name: pattern(tests.text(name)) for name in tests}
        for versions, tests in entry.by_versions("reds").items()
    }
    own_packages = entry.texts("own-packages")
    for versions in own_packages:
        SpecifierSet(versions)
    return Suite(
        test=f"tests/regression/{fix.name}/{test}",
        reds=reds,
        gpus=entry.number("gpus", 0),
        base_has=entry.texts("base-has"),
        own_packages=own_packages,
        not_run=entry.texts_by_versions("not-run"),
    )
