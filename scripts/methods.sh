#!/usr/bin/env bash
# Distils a student (moco: trains it without a teacher) by one method with its own paper's settings, on ImageNet:
#
#   bash scripts/methods.sh seed                   # ResNet-18
#   bash scripts/methods.sh bingo efficientnet_b0
#
# Each loss declares its settings (losses/NAME.py: recipe) and its published linear top-1 / top-5 / 10-NN; docs/METHODS.md lists
# them in a table. Methods without a row there are trained with CoSS's recipe.
#
# To compare methods at an equal number of image passes, use scripts/compare_methods.sh. We have neither repeated nor timed these runs.
# GPUS is the number of processes on this machine, by default that of the original code: 4 for coss and the methods with its
# recipe, whose column terms are computed over each GPU's batch, and 8 for the others; -b is the batch of all processes together.
# All methods except seed, disco, smd, moco and compress need neighbours: first run  bash scripts/compute_knn.sh mine resnet18
# The table's teacher (67.40 top-1) is MoCo's 200-epoch checkpoint; the 800-epoch one has 71.1. To score a student, run
# scripts/compute_knn.sh eval FILE  and evaluate.py linear. Additional flags are passed on: bash scripts/methods.sh seed resnet18 --amp bf16
# An interrupted run resumes when you start it again.
set -euo pipefail

DATA=${DATA:-/data/imagenet}                       # holds train/ and val/
OUTPUT=${OUTPUT:-runs}                             # OUTPUT/METHOD_STUDENT gets the run
NEIGHBOURS=${NEIGHBOURS:-weights}                  # where scripts/compute_knn.sh wrote
MOCO_V2_R50=${MOCO_V2_R50:-weights/moco_v2_200ep_pretrain.pth.tar}  # of 200 epochs: 67.40 top-1

METHOD=${1:-} STUDENT=${2:-resnet18}
[ $# -ge 2 ] && shift 2 || shift $#
source "$(dirname -- "$0")/_env.sh"
environment

recipe=$("$PYTHON" -m losses.tables recipe "$METHOD" "$STUDENT")
mapfile -t recipe <<< "$recipe"
read -r gpus needs <<< "${recipe[0]}"
files=()
[[ $needs = *teacher* ]] && files+=(-k resnet50 --distill "$MOCO_V2_R50")
[[ $needs = *neighbours* ]] && files+=(--closek-info "$NEIGHBOURS/moco_v2_resnet50/closek_info.npy")
launch "${GPUS:-$gpus}" train_distill.py --data "$DATA/train" --output "$OUTPUT/${METHOD}_$STUDENT" \
    "${files[@]}" "${recipe[@]:1}" --aug moco_v2 --momentum 0.9 --cos -p 1000 "$@"
