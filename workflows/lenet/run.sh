#!/bin/sh
# LeNet from end to end on a fresh machine: install into .venv, train, run the pipeline, probe. What follows goes to `python -m workflows.lenet`.
set -eu
cd "$(dirname "$0")/../.."
python3 -m venv .venv
.venv/bin/python -m pip install --quiet -c constraints.txt -e ".[lenet]"
exec .venv/bin/python -m workflows.lenet "$@"
