"""Mutated tables, patches, metadata and trees: done, or refused in one line; never a traceback, nothing lost.

`scripts/fuzz.py` runs the same for as long as one likes.
"""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from . import mutation

# The same inputs every time, in a bounded time; scripts/fuzz.py looks for new ones.
QUICK = settings(
    derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck), print_blob=False
)


@pytest.mark.parametrize("name", mutation.PARSERS)
def test_parsers(name: str) -> None:
    target = mutation.PARSERS[name]

    @settings(QUICK, max_examples=150)
    @given(st.binary(max_size=400))
    def run(script: bytes) -> None:
        target(script)

    run()


def test_trees() -> None:
    with mutation.trees() as target:

        @settings(QUICK, max_examples=60)
        @given(st.binary(max_size=200))
        def run(script: bytes) -> None:
            target(script)

        run()
