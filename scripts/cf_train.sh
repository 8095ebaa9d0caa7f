#!/usr/bin/env bash
# Distils one row of the paper's main table:  bash scripts/cf_train.sh resnet18
#
#   row              teacher             student           linear top-1 / top-5 / 10-NN (paper)
#   resnet18         MoCo-v2 ResNet-50   ResNet-18         62.35 / 84.81 / 53.78
#   resnet34         MoCo-v2 ResNet-50   ResNet-34         64.01 / 86.14 / 54.80
#   efficientnet_b0  MoCo-v2 ResNet-50   EfficientNet-B0   67.36 / 87.75 / 58.33   (efficientnet_b0_coss, the paper's own)
#   resnet18_r101    MoCo-v2 ResNet-101  ResNet-18         63.40
#   resnet18_mocov3  MoCo-v3 ResNet-50   ResNet-18         67.20
#
# ImageNet, 25 epochs of about 20,000 steps of 1,024 images; the paper uses 4 GPUs (the space term is computed
# over each GPU's batch, so the number of GPUs changes it). Mine the neighbours first, with
# scripts/compute_knn.sh for the same row. Additional flags are passed on:  bash scripts/cf_train.sh resnet18 --amp bf16
# RESTARTS=3 makes torchrun start the processes again, from the last checkpoint, if one of them dies. Under SLURM, on one
# machine or several:  sbatch scripts/slurm.sbatch bash scripts/cf_train.sh resnet18
# Paths are relative to the project's folder. An interrupted run resumes from its last step when you start it again.
set -euo pipefail

DATA=${DATA:-/data/imagenet}                       # holds train/ and val/
OUTPUT=${OUTPUT:-runs}                             # OUTPUT/ROW gets the run
NEIGHBOURS=${NEIGHBOURS:-weights}                  # where scripts/compute_knn.sh wrote
GPUS=${GPUS:-4}                                    # processes on this machine
MOCO_V2_R50=${MOCO_V2_R50:-weights/moco_v2_200ep_pretrain.pth.tar}  # of 200 epochs: 67.40 top-1
MOCO_V2_R101=${MOCO_V2_R101:-weights/moco_v2_r101.pth}
MOCO_V3_R50=${MOCO_V3_R50:-weights/moco_v3_r50.pth.tar}

ROW=${1:-}
case $ROW in
    resnet18 | resnet34 | efficientnet_b0 | resnet18_r101 | resnet18_mocov3) shift ;;
    *) echo "error: '$ROW' is not a row; give resnet18, resnet34, efficientnet_b0, resnet18_r101 or resnet18_mocov3" >&2
       exit 2 ;;
esac
source "$(dirname -- "$0")/_env.sh"
environment

distil() { # teacher's name, teacher arch, teacher file, student arch, further flags
    local name=$1 teacher=$2 file=$3 student=$4
    shift 4
    launch "$GPUS" train_distill.py \
        --data "$DATA/train" --output "$OUTPUT/$ROW" \
        -a "$student" -k "$teacher" --distill "$file" \
        --loss coss --l_0 1 --l_1 1 --s-temp 0.1 --t-temp 0.07 --head-init random --aug moco_v2 \
        --sampler cf --closek-info "$NEIGHBOURS/$name/closek_info.npy" --nearest-k 15 --total-k 31 \
        -b 64 --epochs 25 --lr 0.03 --momentum 0.9 --wd 1e-4 --cos -p 1000 "$@"
}

case $ROW in
    resnet18)        distil moco_v2_resnet50  resnet50  "$MOCO_V2_R50"  resnet18        "$@" ;;
    resnet34)        distil moco_v2_resnet50  resnet50  "$MOCO_V2_R50"  resnet34        "$@" ;;
    efficientnet_b0) distil moco_v2_resnet50  resnet50  "$MOCO_V2_R50"  efficientnet_b0_coss "$@" ;;
    resnet18_r101)   distil moco_v2_resnet101 resnet101 "$MOCO_V2_R101" resnet18        "$@" ;;
    resnet18_mocov3) distil moco_v3_resnet50  resnet50  "$MOCO_V3_R50"  resnet18        "$@" ;;
esac
