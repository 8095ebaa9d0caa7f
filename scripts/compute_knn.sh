#!/usr/bin/env bash
# Neighbours of a row's teacher, or a student's k-NN accuracy:
#
#   bash scripts/compute_knn.sh mine resnet18          # -> weights/moco_v2_resnet50/closek_info.npy
#   bash scripts/compute_knn.sh eval resnet18          # scores runs/resnet18/student.pth (and any other row)
#   bash scripts/compute_knn.sh eval path/to/file.pth
#
# Rows are those of scripts/cf_train.sh; three of them share one teacher and so one neighbour file. Additional flags
# are passed on to compute_knn.py. Paths are relative to the project's folder.
set -euo pipefail

DATA=${DATA:-/data/imagenet}                       # holds train/ and val/
OUTPUT=${OUTPUT:-runs}                             # where scripts/cf_train.sh wrote
NEIGHBOURS=${NEIGHBOURS:-weights}                  # NEIGHBOURS/TEACHER gets closek_info.npy
GPUS=${GPUS:-1}                                    # processes on this machine
K=${K:-384}                                        # neighbours an image, the original's
MOCO_V2_R50=${MOCO_V2_R50:-weights/moco_v2_200ep_pretrain.pth.tar}  # of 200 epochs: 67.40 top-1
MOCO_V2_R101=${MOCO_V2_R101:-weights/moco_v2_r101.pth}
MOCO_V3_R50=${MOCO_V3_R50:-weights/moco_v3_r50.pth.tar}

WHAT=${1:-} ROW=${2:-}
case $WHAT:$ROW in
    mine:resnet18 | mine:resnet34 | mine:efficientnet_b0 | mine:resnet18_r101 | mine:resnet18_mocov3 | eval:?*) shift 2 ;;
    *) echo "error: '$WHAT $ROW' is not known; give mine or eval, then resnet18, resnet34, efficientnet_b0," \
            "resnet18_r101 or resnet18_mocov3 (eval takes a file too)" >&2
       exit 2 ;;
esac
source "$(dirname -- "$0")/_env.sh"
environment

mine() { # teacher's name, arch, file, further flags
    local name=$1 arch=$2 file=$3
    shift 3
    launch "$GPUS" compute_knn.py mine --data "$DATA/train" --arch "$arch" --weights "$file" --output "$NEIGHBOURS/$name" --k "$K" "$@"
}

case $WHAT:$ROW in
    mine:resnet18 | mine:resnet34 | mine:efficientnet_b0) mine moco_v2_resnet50 resnet50 "$MOCO_V2_R50" "$@" ;;
    mine:resnet18_r101)   mine moco_v2_resnet101 resnet101 "$MOCO_V2_R101" "$@" ;;
    mine:resnet18_mocov3) mine moco_v3_resnet50  resnet50  "$MOCO_V3_R50"  "$@" ;;
    eval:*.pth | eval:*.tar) launch "$GPUS" compute_knn.py eval --data "$DATA" --weights "$ROW" "$@" ;;
    eval:?*) launch "$GPUS" compute_knn.py eval --data "$DATA" --weights "$OUTPUT/$ROW/student.pth" "$@" ;;
esac
