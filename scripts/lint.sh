#!/usr/bin/env bash
# Makes an environment and runs the linters: ruff, mypy --strict, and black on what is written as upstream's.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=.venv-lint/bin/python
wanted=$(cat pyproject.toml)
if [[ "$(cat .venv-lint/made-for 2>/dev/null)" != "$wanted" ]]; then
    "${PYTHON:-python3}" -I -m venv --clear .venv-lint
    "$python" -I -m pip install --quiet --disable-pip-version-check --editable '.[dev,pack]'
    printf '%s\n' "$wanted" >.venv-lint/made-for
fi
"$python" -m ruff check .
"$python" -m ruff format --check .
"$python" -m mypy
"$python" scripts/check_format.py
