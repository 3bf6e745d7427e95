#!/usr/bin/env bash
# From a published SGLang release to its patched wheel:
#   ./scripts/patch.sh [RELEASE | WHEEL] [OUT] [--find-links DIR]
# Needs Python >= 3.10 (PYTHON=… names another than python3), git and a package index; with --find-links,
# DIR may stand in for the index. The wheel is for the Python that runs this.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-python3}
tool=$root/.venv-tool

command -v "$python" >/dev/null || {
    echo "patch.sh: $python: no such Python: PYTHON=/path/to/python3.12 $0" >&2
    exit 2
}
"$python" -I -c 'import sys; sys.exit(sys.version_info < (3, 10))' || {
    echo "patch.sh: $python is older than Python 3.10: PYTHON=/path/to/python3.12 $0" >&2
    exit 2
}

links=()
arguments=("$@")
for ((i = 0; i < $#; i++)); do
    case ${arguments[i]} in
        --find-links)
            ((i + 1 < $#)) || {
                echo "patch.sh: --find-links: name a directory of wheels after it" >&2
                exit 2
            }
            links=(--no-index --find-links "${arguments[i + 1]}")
            ;;
        --find-links=*) links=(--no-index "${arguments[i]}") ;;
    esac
done

# The environment is made again when the interpreter or the dependencies change. Nothing is built for it: the
# tool runs from this clone.
wanted=$("$python" -I -c 'import sys; print(sys.version, sys.prefix)' && cat "$root/scripts/requirements.txt")
if [[ "$(cat "$tool/made-for" 2>/dev/null)" != "$wanted" ]]; then
    "$python" -I -m venv --clear "$tool"
    install=("$tool/bin/python" -I -m pip install --quiet --disable-pip-version-check --no-deps --only-binary=:all:
        --require-hashes --requirement "$root/scripts/requirements.txt")
    # DIR may hold nothing but SGLang: then the tool's own dependencies come from the index.
    if ((${#links[@]} == 0)) || ! "${install[@]}" "${links[@]}" 2>/dev/null; then
        "${install[@]}"
    fi
    printf '%s\n' "$wanted" >"$tool/made-for"
fi

# Isolated: nothing that lies in the working directory is run, nor what PYTHONPATH names.
exec "$tool/bin/python" -I -c 'import sys; sys.path.insert(0, sys.argv.pop(1))
from sglang_patchset.__main__ import main; sys.exit(main())' "$root/python" wheel "$@"
