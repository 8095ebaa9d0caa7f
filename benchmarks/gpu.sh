#!/usr/bin/env bash
# Everything that is to be known on a GPU, on one, in one go of ten minutes: does it work, and how fast is it.
#
#   bash benchmarks/gpu.sh                                   # all parts, within nine minutes; runs/gpu/ at the end
#   bash benchmarks/gpu.sh --data DIR                        # DIR/cifar10/{train,test} and DIR/photos, where they are
#   bash benchmarks/gpu.sh --only works,step --minutes 4     # some parts; the others' results in --output stay
#   bash benchmarks/gpu.sh --only methods --output runs/gpu  # resumes the comparison of methods in that folder
#   bash benchmarks/gpu.sh --device cpu --rehearse           # the same at tiny sizes, without a GPU
#
# Nothing is installed and nothing fetched: $PYTHON (python3) as it is, with the packages of requirements.txt. Parts, in
# order of worth: works (pytest -m gpu), step, search, colour, feed, methods. None is begun that could not end in time.
# After each, --output holds gpu.json, gpu.md (rows for docs/results/SPEED.md), gpu.log, and methods.tar.gz to resume from.
set -euo pipefail
exec "${PYTHON:-python3}" "$(dirname "${BASH_SOURCE[0]}")/gpu/run.py" "$@"
