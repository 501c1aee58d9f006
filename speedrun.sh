#!/usr/bin/env sh
# From nothing to an aligned, distilled model and a page about it: sets up .venv where it is missing, then
# runs speedrun.py, to which all flags go. On Windows: py -m venv .venv, and so on, as below.
set -eu
cd "$(dirname "$0")"
if [ ! -e .venv/ready ]; then
    python3 -m venv .venv
    .venv/bin/python -m pip install -r requirements.txt
    touch .venv/ready
fi
exec .venv/bin/python speedrun.py "$@"
