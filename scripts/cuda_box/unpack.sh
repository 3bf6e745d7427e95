#!/bin/sh
# Makes .venv-gpu and the trees of the GPU regression tests in a clone, without a network:
#   ./unpack.sh CLONE
# Needs python3, whose packages the environment uses too, and nothing else.
here=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd) || exit 2
command -v python3 >/dev/null || {
    echo "unpack.sh: no python3: put the box's Python on PATH" >&2
    exit 2
}
# Python says of some packages' sources that they have odd escape sequences, each time it compiles one.
exec python3 -B -W ignore::SyntaxWarning "$here/unpack.py" "$@"
