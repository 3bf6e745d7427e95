#!/usr/bin/env bash
# Makes an environment and runs the tests; arguments go to pytest.
# The first run downloads the real SGLang's dependencies: 6 GB, a few minutes.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=.venv-test/bin/python
wanted=$(cat tests/regression/requirements.txt)
if [[ "$(cat .venv-test/made-for 2>/dev/null)" != "$wanted" ]]; then
    "${PYTHON:-python3}" -I -m venv --clear .venv-test
    # The lock is complete. Bytecode is made as it is needed: most of these files never are.
    "$python" -I -m pip install --quiet --disable-pip-version-check --no-deps --no-compile \
        --requirement tests/regression/requirements.txt
    printf '%s\n' "$wanted" >.venv-test/made-for
fi
"$python" -I -m pip install --quiet --disable-pip-version-check --editable '.[test]'
exec "$python" -m pytest "$@"
