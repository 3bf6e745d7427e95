#!/usr/bin/env bash
# Runs the regression tests that need a CUDA box and writes results/gpu-<GPU>-<date>.json; arguments go to
# pytest, for example -k 0.5.12. REGRESSION_SEED=1 makes other weights and prompts.
# The first run downloads SGLang's whole environment, 7.5 GB, for Python 3.12 (PYTHON=… names it); on a box
# without an index, unpack.sh of a bundle of scripts/pack_cuda_box.py comes first.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=.venv-gpu/bin/python
wanted=$(cat tests/regression/requirements-cuda.txt)
if [[ "$(cat .venv-gpu/made-for 2>/dev/null)" != "$wanted" ]]; then
    "${PYTHON:-python3.12}" -m venv --clear .venv-gpu
    "$python" -m pip install --quiet --disable-pip-version-check --no-deps \
        --requirement tests/regression/requirements-cuda.txt
    "$python" scripts/cuda_environment.py
    printf '%s\n' "$wanted" >.venv-gpu/made-for
fi
# Kernels are compiled by the environment's ninja.
export PATH="$PWD/.venv-gpu/bin:$PATH"
PYTHONPATH=python exec python -m pytest -m gpu tests/gpu "$@"
