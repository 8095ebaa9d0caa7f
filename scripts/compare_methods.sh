#!/usr/bin/env bash
# Every method on one data set at an equal number of student image passes: a table and a plot in $OUT.
#
#   bash scripts/compare_methods.sh                                     # built-in images, under 20 minutes on 2 CPU cores
#   DATA=cifar10 TEACHER=teacher.pth bash scripts/compare_methods.sh    # for one GPU; without one a size for CPU cores
#   DATA=DIR TEACHER=FILE STEM=imagenet PASSES=100000 SEEDS="0 1" METHODS="coss seed dist" bash scripts/compare_methods.sh
#   bash scripts/compare_methods.sh --search                            # rates and warm-ups for the same variables, see below
#
# Other variables: SUBSET STUDENT AMP EPOCHS BATCH NEAREST_K TOTAL_K QUEUE EVERY WORKERS (-j of the scripts), GPUS
# (processes per student), JOBS (students trained at the same time, each on its own cores or GPU), MINUTES (start no student that
# could not finish by then), OUT. Ctrl-C or SIGTERM stops it once its trainings have
# written their checkpoints, and the same command again resumes. SHIFTED=DIR also tests each student's
# linear classifier, trained on at most 10,000 images, on those there, in the layout of ImageNet-C (benchmarks/corrupt.py makes such a folder).
#
# What is equal. An image pass is one image through the student, forwards and backwards; passes of the teacher and of a
# momentum copy do not count. Each student gets PASSES of them. With BATCH images per view, a step takes
#   coss coss_centred seed compress dist dino dinoss cosine mse rkd moco   BATCH: one view (moco's other goes
#                                                                          through its momentum copy)
#   smd disco                                                              2 x BATCH: two views
#   bingo                                                                  1.5 x BATCH: pairs, and a mixture of both
# so smd and disco take half as many steps as the first group, and bingo two thirds.
#
# Steps. For coss and coss_centred a step has BATCH / (1 + NEAREST_K) anchors, each with NEAREST_K of its TOTAL_K nearest
# images; for the other methods it has random images. In METHODS, NAME@random or NAME@cf changes that, and
# NAME:FLAG=VALUE,FLAG=VALUE adds flags of train_distill.py: METHODS="coss coss:l_1=0 coss:nearest-k=7".
#
# Schedule. All methods train for EPOCHS periods of equal length, with a linear warm-up (its length is below) and a cosine
# decay, by SGD with momentum 0.9 and weight decay 1e-4, and with the augmentation moco_v2.
#
# Learning rates and warm-ups come from $OUT/rates.txt if it exists, else from scripts/compare_rates/. --search writes
# $OUT/rates.txt, by the same rule for each method:
#   1. At a quarter of PASSES, three rates, FACTOR apart, around the previous rate, each with warm-ups of 0.1, 0.4
#      and 0.7 of all EPOCHS periods; then the neighbours of the best in this grid, until the best is not at an
#      edge (at most 16 trials).
#   2. The best three at half of PASSES, then the best two with all of PASSES and two seeds.
# The measure is 10-NN accuracy on a held-out fifth of the training images; the test images are not used. A student whose
# loss is not finite counts as 0, and the table names it. The script first prints how long it will take; --search trains
# the equivalent of about ten students per method.
#
# Different from the papers, because these trainings are short: QUEUE, a momentum of 0.99, batch norm in the heads of
# disco and moco, and bingo's images alone for 1 epoch (11 of 200 in its paper). Otherwise
# methods use their papers' settings (--head-init random among them).
set -euo pipefail
source "$(dirname -- "$0")/_env.sh"
environment

DATA=${DATA:-demo}
GPU_COUNT=$("$PYTHON" -c 'import torch; print(torch.cuda.device_count())')
SEARCH=()
case ${1:-} in
    "") ;;
    --search) SEARCH=(--search) ;;
    *) echo "error: $1 is not an option of compare_methods.sh; it knows --search, and the variables of its header" >&2; exit 2 ;;
esac

profile() { # name, then values where no variable says otherwise
    PROFILE=$1 STEM=${STEM:-$2} PASSES=${PASSES:-$3} EPOCHS=${EPOCHS:-$4} BATCH=${BATCH:-$5} NEAREST_K=${NEAREST_K:-$6}
    TOTAL_K=${TOTAL_K:-$7} QUEUE=${QUEUE:-$8} EVERY=${EVERY:-$9} MINUTES=${MINUTES:-${10}} SUBSET=${SUBSET:-${11}}
}
if [ "$DATA" = demo ]; then
    TEACHER=${TEACHER:-assets/demo_teacher.pth}
    OUT=${OUT:-runs/compare} SEEDS=${SEEDS:-0 1}
    #       name         stem     passes  epochs batch near of queue every minutes subset
    profile demo         imagenet 8640    9      32    1    7  1024  3     0       1
elif [ "$GPU_COUNT" -gt 0 ]; then
    profile cifar10      cifar    1996800 20     256   3    15 4096  4     25      1
    JOBS=${JOBS:-$([ "${GPUS:-1}" = 1 ] && echo $((3 * GPU_COUNT)) || echo 1)} # one small network does not fill a GPU
    WORKERS=${WORKERS:-4}
else
    profile cifar10_cpu  cifar    30720   10     64    3    15 1024  5     0       0.1
fi
if [ -z "${TEACHER:-}" ]; then
    echo "error: TEACHER is not set; give the checkpoint of a network trained on DATA (DATA=$DATA bash scripts/quickstart.sh" \
        "makes one)" >&2
    exit 2
fi
# shellcheck disable=SC2086
exec "$PYTHON" scripts/compare_run.py "${SEARCH[@]}" --data "$DATA" --teacher "$TEACHER" \
    --output "${OUT:-runs/compare-$(basename "$DATA")}" --subset "$SUBSET" --student "${STUDENT:-shufflenet_v2_x0_5}" \
    --stem "$STEM" --methods ${METHODS:-} \
    --seeds ${SEEDS:-0 1 2} --passes "$PASSES" --epochs "$EPOCHS" --batch "$BATCH" --nearest-k "$NEAREST_K" \
    --total-k "$TOTAL_K" --queue "$QUEUE" --every "$EVERY" --rates "scripts/compare_rates/$PROFILE.txt" \
    --factor "${FACTOR:-4}" --amp "${AMP:-auto}" --shifted "${SHIFTED:-}" \
    --gpus "${GPUS:-1}" --jobs "${JOBS:-0}" --workers "${WORKERS:-0}" --minutes "$MINUTES"
