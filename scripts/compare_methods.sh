#!/usr/bin/env bash
# Every method on one data set at an equal number of student image passes: a table and a plot in $OUT.
#
#   bash scripts/compare_methods.sh                                     # built-in images, under 20 minutes on 2 CPU cores
#   DATA=cifar10 TEACHER=teacher.pth bash scripts/compare_methods.sh    # for one GPU; without one a size for CPU cores
#   DATA=DIR TEACHER=FILE STEM=imagenet PASSES=100000 SEEDS="0 1" METHODS="coss seed dist" bash scripts/compare_methods.sh
#   bash scripts/compare_methods.sh --search                            # rates and warm-ups for the same variables, see below
#
# Further variables: SUBSET STUDENT EPOCHS BATCH NEAREST_K TOTAL_K QUEUE EVERY WORKERS (-j of the scripts), GPUS
# (processes a student), JOBS (students side by side, each on its own cores or GPU), MINUTES (start no student that
# could not finish by then), OUT. Started again, it resumes where it stopped.
#
# What is counted: an image pass is one image through the trained student, forwards and backwards. The teacher
# and a momentum copy are not counted. Each student gets PASSES of them; with BATCH images of a view in each step:
#   coss coss_centred seed compress dist dino dinoss cosine mse rkd moco
#                                                             one view (moco's other goes through its copy)  BATCH a step
#   smd disco                                                 two views                                  2 x BATCH a step
#   bingo                                                     pairs, and a mixture of both             1.5 x BATCH a step
# so smd and disco take half as many steps as the first row, and bingo two thirds. coss and coss_centred make a step of BATCH / (1 +
# NEAREST_K) anchors with NEAREST_K of their TOTAL_K nearest each, the others of random images; NAME@random or NAME@cf
# in METHODS overrides it, and NAME:FLAG=VALUE,FLAG=VALUE gives flags of train_distill.py (METHODS="coss coss:l_1=0 coss:nearest-k=7"). For all: EPOCHS periods of equal length, a linear warm-up in the first of them and half a cosine,
# SGD with momentum 0.9, weight decay 1e-4, moco_v2 augmentation.
#
# Rates and warm-ups: $OUT/rates.txt, else scripts/compare_rates/. --search makes the former, by the same rule and from
# equally many trials for each method: three rates, FACTOR apart, around the previous one, with a warm-up of 0.1, 0.4 and
# 0.7 of EPOCHS each, at a quarter of PASSES; then the neighbours in this grid of the best, until it is not at an edge (16
# at most); the best three at half of PASSES, the best two with all of PASSES and two seeds. The measure is 10-NN on a
# held-out fifth of the training images: the test images play no part in it. A student whose loss is not finite counts
# as 0, and the table names it. It says how long it will take before it starts; with --search it is about ten
# students a method.
#
# Different from the papers, for such short trainings: QUEUE, a momentum of 0.99, batch norm in the heads of disco and moco, bingo's
# images alone for 1 epoch (11 of 200 in its paper). Everything else is the method's default.
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
"$PYTHON" scripts/compare_run.py "${SEARCH[@]}" --data "$DATA" --teacher "$TEACHER" \
    --output "${OUT:-runs/compare-$(basename "$DATA")}" --subset "$SUBSET" --student "${STUDENT:-shufflenet_v2_x0_5}" \
    --stem "$STEM" --methods ${METHODS:-} \
    --seeds ${SEEDS:-0 1 2} --passes "$PASSES" --epochs "$EPOCHS" --batch "$BATCH" --nearest-k "$NEAREST_K" \
    --total-k "$TOTAL_K" --queue "$QUEUE" --every "$EVERY" --rates "scripts/compare_rates/$PROFILE.txt" \
    --factor "${FACTOR:-4}" \
    --gpus "${GPUS:-1}" --jobs "${JOBS:-0}" --workers "${WORKERS:-0}" --minutes "$MINUTES"
