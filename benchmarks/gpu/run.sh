#!/bin/sh
# Everything a machine with a GPU is needed for, in one command of at most ten minutes:
#     bash benchmarks/gpu/run.sh [--device cuda|emulated] [--small] [--out DIR] [--only PART]
# Uses the python3 on PATH (or $PYTHON) and the checkout as it is; installs nothing.
set -eu
root=$(cd "$(dirname "$0")/../.." && pwd)
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
exec "${PYTHON:-python3}" -m benchmarks.gpu.check "$@"
