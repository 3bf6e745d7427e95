#!/usr/bin/env bash
# Makes an environment and runs the tests; arguments go to pytest.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
"${PYTHON:-python3}" -m venv .venv-test
.venv-test/bin/python -m pip install --quiet --disable-pip-version-check --editable '.[test]'
exec .venv-test/bin/python -m pytest "$@"
