#!/usr/bin/env python3
"""Runs tests/patchset/mutation.py on new inputs for a while: ./scripts/fuzz.py ENGINE TARGET SECONDS

ENGINE is `hypothesis` or `atheris` (pip install atheris, for the Pythons that it has wheels for); TARGET is
`trees` or one of the parsers. What fails is shown with the script that led there.
"""

from __future__ import annotations

import atexit
import sys
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1] / name) for name in ("", "python")]

engine, name, seconds = sys.argv[1], sys.argv[2], int(sys.argv[3])

if engine == "atheris":
    import atheris

    with atheris.instrument_imports(include=["sglang_patchset", "tests.patchset.mutation"]):
        from tests.patchset import mutation
else:
    from tests.patchset import mutation

if name == "trees":
    trees = mutation.trees()
    target = trees.__enter__()
    atexit.register(trees.__exit__, None, None, None)
else:
    target = mutation.PARSERS[name]

if engine == "atheris":
    # Without its control, the length stays at a few bytes: not one whole edit.
    options = [f"-max_total_time={seconds}", "-max_len=400", "-len_control=0", "-verbosity=1"]
    atheris.Setup([sys.argv[0], *options], target)
    atheris.Fuzz()

from hypothesis import HealthCheck, given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

end, tried = time.monotonic() + seconds, 0


@settings(max_examples=500, deadline=None, database=None, suppress_health_check=list(HealthCheck))
@given(st.binary(max_size=400))
def run(script: bytes) -> None:
    global tried
    tried += 1
    target(script)


while time.monotonic() < end:
    run()
print(f"{name}: {tried} inputs, no failure")
