#!/bin/sh
# All tests, on a fresh machine too: installs what they need, as far as it may, and passes them.
# Arguments go to pytest, as PYTEST_ADDOPTS does. With CI=true, a test that cannot run for want of a service fails.
set -eu
cd -- "$(dirname -- "$0")/.."
python=.venv/bin/python
unset PYTHONDONTWRITEBYTECODE # the tests start hundreds of processes, and each would compile every module anew: 0.3 s of a core

sh tests/install_packages.sh

if ! "$python" -c '' 2>/dev/null; then
    if ! python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
        echo "The tests need Python 3.11 or later as python3, and it is not there. Nothing was tested." >&2
        exit 1
    fi
    echo "Making the environment .venv."
    if ! python3 -m venv --clear .venv; then
        echo "Python cannot make an environment in .venv. On Debian that takes the package python3-venv. Nothing was tested." >&2
        exit 1
    fi
fi

echo "Installing featuremaps and what its tests need into .venv."
if ! "$python" -m pip install --quiet -c constraints.txt -e '.[test]'; then
    case ${CI:-} in
    '' | 0 | false) ;;
    *)
        echo "pip cannot install what the tests need. Nothing was tested." >&2
        exit 1
        ;;
    esac
    if ! "$python" -c 'import pytest, pytest_timeout, xdist' 2>/dev/null; then
        echo "pip cannot install what the tests need, and it is not in .venv. Nothing was tested." >&2
        exit 1
    fi
    echo "pip cannot install what the tests need. The tests run with what .venv has."
fi

# One process more than cores, as a third of the time a test waits for others' processes; at most 8, for the memory of their clusters.
workers=$(nproc 2>/dev/null || echo 1)
[ "$workers" -lt 8 ] && workers=$((workers + 1)) || workers=8
# One thread of torch and BLAS in each process: threads that wait for each other on busy cores take twice as long.
export OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 MKL_NUM_THREADS=1
exec "$python" -m pytest -n "$workers" --dist loadfile --no-loadscope-reorder "$@"
