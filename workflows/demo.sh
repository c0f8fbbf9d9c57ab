#!/bin/sh
# The main job on a fresh machine: install into .venv, run on the photographs that scikit-image ships, draw one with its maps, write a page.
set -eu
cd "$(dirname "$0")/.."
echo "installing into .venv; this takes a few minutes"
python3 -m venv .venv
.venv/bin/python -m pip install --quiet -c constraints.txt -e ".[demo]"
photographs=$(.venv/bin/python -c "import pathlib, skimage; print(pathlib.Path(skimage.__file__).parent / 'data')")
mkdir -p demo
.venv/bin/featuremaps run "$photographs" demo/features.zarr
.venv/bin/featuremaps show demo/features.zarr rocket.jpg -o demo/rocket.png
.venv/bin/featuremaps report demo/features.zarr -o demo/report.html
.venv/bin/featuremaps status demo/features.zarr
