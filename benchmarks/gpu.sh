#!/usr/bin/env bash
# Tests and measures everything on one GPU in ten minutes: does it work, and how fast is it?
#
#   bash benchmarks/gpu.sh                                   # all parts, within nine minutes; runs/gpu/ at the end
#   bash benchmarks/gpu.sh --data DIR                        # uses DIR/cifar10/{train,test} and DIR/photos if present
#   bash benchmarks/gpu.sh --only works,step --minutes 4     # only these parts; results of others in --output stay
#   bash benchmarks/gpu.sh --only methods --output runs/gpu  # resumes the comparison of methods in that folder
#   bash benchmarks/gpu.sh --device cpu --rehearse           # the same at tiny sizes, without a GPU
#
# It installs and downloads nothing: $PYTHON (default python3) must have the packages of requirements.txt. The parts, the
# most important first, are works (pytest -m gpu), step, search, colour, feed and methods; a part that could not finish in
# time is not started. After each part, --output holds gpu.json, gpu.md (rows for docs/results/SPEED.md), gpu.log, and
# methods.tar.gz to resume from.
set -euo pipefail
exec "${PYTHON:-python3}" "$(dirname "${BASH_SOURCE[0]}")/gpu/run.py" "$@"
