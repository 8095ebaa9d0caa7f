#!/usr/bin/env bash
# Distils (or, moco, trains alone) a student by one of the methods with its own paper's numbers, on ImageNet:
#
#   bash scripts/methods.sh seed                   # ResNet-18
#   bash scripts/methods.sh bingo efficientnet_b0
#
#   published linear top-1 / top-5 / 10-NN; teacher MoCo-v2 ResNet-50 of 67.40 top-1
#   method    ResNet-18              ResNet-34              EfficientNet-B0        image passes over ImageNet
#   coss      62.35 / 84.81 / 53.78  64.01 / 86.14 / 54.80  67.36 / 87.75 / 58.33  400  (25 epochs x 16)
#   bingo     61.40 / 84.30 / 54.16  63.50 / 85.70 / -      63.74 / 85.32 / 54.75  600  (200 x 3)
#   disco     60.60 / 83.70 / 52.03  62.50 / 85.40 / 53.65  66.50 / 87.60 / 54.78  400  (200 x 2)
#   smd       59.56 / 83.29 / 49.69  62.75 / 85.25 / 52.61  -                      200  (100 x 2)
#   seed      57.60 / 81.80 / 50.12  58.50 / 82.60 / 45.20  61.30 / 82.70 / 53.11  200
#   moco      52.20 / 76.60 / 36.70  56.80 / 81.40 / 41.50  42.20 / 68.50 / 30.0   200, no teacher
#   compress  61.7 linear (its authors' repository, ResNet-18, another linear protocol)  130
#   coss_centred, dist, dino, dinoss, cosine, mse, rkd: by CoSS's recipe, whose variants they are; no published row here
#
# At an equal number of image passes instead: scripts/compare_methods.sh. These runs have not been repeated here and no
# time was taken. GPUS (processes on this machine) is that of the originals by default: 4 for coss and those that share
# its recipe, whose column terms are taken over each GPU's batch, and 8 for the others; -b counts over all of them. All
# but seed, disco, smd, moco and compress need neighbours first: bash scripts/compute_knn.sh mine resnet18.
# The teacher of the table, 67.40 top-1, is MoCo's file of 200 epochs (that of 800 has 71.1). Scores: scripts/compute_knn.sh
# eval FILE, and evaluate.py linear. Further flags are handed on: bash scripts/methods.sh seed resnet18 --amp bf16.
# A run that was cut short goes on when it is started again.
set -euo pipefail

DATA=${DATA:-/data/imagenet}                       # holds train/ and val/
OUTPUT=${OUTPUT:-runs}                             # OUTPUT/METHOD_STUDENT gets the run
NEIGHBOURS=${NEIGHBOURS:-weights}                  # where scripts/compute_knn.sh wrote
MOCO_V2_R50=${MOCO_V2_R50:-weights/moco_v2_200ep_pretrain.pth.tar}  # of 200 epochs: 67.40 top-1

METHOD=${1:-} STUDENT=${2:-resnet18}
case $METHOD in
    coss | coss_centred | dist | dino | dinoss | cosine | mse | rkd) GPUS=${GPUS:-4} ;;
    seed | bingo | disco | smd | moco | compress) GPUS=${GPUS:-8} ;;
    *) echo "error: '$METHOD' is no method; give coss, coss_centred, seed, bingo, disco, smd, moco, compress, dist," \
            "dino, dinoss, cosine, mse or rkd" >&2
       exit 2 ;;
esac
case $STUDENT in
    resnet18 | resnet34 | efficientnet_b0) ;;
    *) echo "error: '$STUDENT' is no student of the table; give resnet18, resnet34 or efficientnet_b0, and further" \
            "flags behind it" >&2
       exit 2 ;;
esac
[ $# -ge 2 ] && shift 2 || shift $#
source "$(dirname "$0")/_env.sh"
environment

distil() { # flags
    launch "$GPUS" train_distill.py --data "$DATA/train" --output "$OUTPUT/${METHOD}_$STUDENT" -a "$STUDENT" \
        --loss "$METHOD" --aug moco_v2 --momentum 0.9 --cos -p 1000 "$@"
}
teacher=(-k resnet50 --distill "$MOCO_V2_R50")
near=(--sampler cf --closek-info "$NEIGHBOURS/moco_v2_resnet50/closek_info.npy")
[ "$STUDENT" = efficientnet_b0 ] && small=true || small=false

case $METHOD in
    seed)  distil "${teacher[@]}" --sampler random -b 256 --epochs 200 --lr 0.03 --wd 1e-4 "$@" ;;
    bingo) if $small; then own=(--s-temp 0.12 --wd 4e-5); else own=(--s-temp 0.2 --wd 1e-4); fi
           distil "${teacher[@]}" --teacher-bn train "${near[@]}" --nearest-k 1 --total-k 5 -b 256 --epochs 200 \
               --warmup-epochs 0 --lr 0.03 "${own[@]}" "$@" ;;
    disco) distil "${teacher[@]}" --teacher-bn train --sampler random -b 256 --epochs 200 --warmup-epochs 0 \
               --lr 0.03 --wd 1e-4 "$@" ;;
    smd)   if $small; then tau=0.004; else tau=0.04; fi   # lr 0.05 for each 256 images
           distil "${teacher[@]}" --smd-tau $tau --smd-batch local --sampler random -b 512 --epochs 100 --warmup-epochs 0 --lr 0.1 \
               --wd 1e-4 "$@" ;;
    moco)  distil --moco-dim 128 --sampler random -b 256 --epochs 200 --warmup-epochs 0 --lr 0.03 --wd 1e-4 "$@" ;;
    compress)  # its authors only crop and flip, and divide the rate by 5 at epochs 90 and 120; here a cosine
           distil "${teacher[@]}" --sampler random -b 256 --epochs 130 --warmup-epochs 0 --lr 0.01 --wd 1e-4 "$@" ;;
    coss | coss_centred | dist | dino | dinoss | cosine | mse | rkd)
           distil "${teacher[@]}" "${near[@]}" --nearest-k 15 --total-k 31 -b 64 --epochs 25 --lr 0.03 --wd 1e-4 "$@" ;;
esac
