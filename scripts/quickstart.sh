#!/usr/bin/env bash
# The whole pipeline at a small scale: a MoCo v2 teacher, its neighbours, students distilled from it with CoSS, and k-NN of teacher,
# students and untrained students; a table, a picture and TensorBoard events in runs/quickstart/.
#
#   bash scripts/quickstart.sh                   # built-in images, under 4 minutes on 2 CPU cores; the teacher is
#                                                # assets/demo_teacher.pth, pretrained as assets/README.md says
#   bash scripts/quickstart.sh --from-scratch    # first pretrains that teacher again (about 25 minutes on 2 cores)
#   DATA=cifar10 bash scripts/quickstart.sh      # CIFAR-10 (downloaded); sized for one GPU. For a few CPU cores:
#                                                # DATA=cifar10 SUBSET=0.1 TEACHER_EPOCHS=8 STUDENT_EPOCHS=4 SEEDS=0 ...
# Existing results are reused; remove the folder to start anew.
set -euo pipefail
source "$(dirname -- "$0")/_env.sh"
environment

DATA=${DATA:-demo}
SUBSET=${SUBSET:-1}
SEEDS=${SEEDS:-0 1 2}
CORES=$(getconf _NPROCESSORS_ONLN)
FROM_SCRATCH=false
case ${1:-} in
    "") ;;
    --from-scratch) FROM_SCRATCH=true ;;
    *) echo "error: $1 is not an option of quickstart.sh; it knows --from-scratch" >&2; exit 2 ;;
esac

case $DATA in
    demo)
        OUT=${OUT:-runs/quickstart}
        TEACHER_FLAGS="--arch squeezenet1_1 --image-size 64 --head-bn --epochs ${TEACHER_EPOCHS:-80} -b 64 --lr 0.03
            --warmup-epochs 1 --moco-k 256 --moco-m 0.99 --bn-parts 4 -p 46"
        STUDENT=shufflenet_v2_x0_5
        STEM=imagenet
        STUDENT_FLAGS="--nearest-k 1 --total-k 7 -b 16 --epochs ${STUDENT_EPOCHS:-2} --lr 0.004 --warmup-epochs 1 -p 37"
        WORKERS=${WORKERS:-$((CORES / 3))}
        export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((CORES > 3 ? CORES / 3 : 1))}
        TOGETHER=true ;; # the seeds share the cores: three small jobs use them better than one after the other
    *)
        OUT=${OUT:-runs/quickstart-$(basename "$DATA")}
        FROM_SCRATCH=true
        TEACHER_FLAGS="--arch resnet18 --stem cifar --image-size 32 --epochs ${TEACHER_EPOCHS:-200} -b 256 --lr 0.06
            --moco-k 4096 --moco-m 0.99 --moco-t 0.1 --warmup-epochs 0 --head-bn -p 20"
        STUDENT=shufflenet_v2_x0_5
        STEM=cifar
        STUDENT_FLAGS="--nearest-k 3 --total-k 15 -b 64 --epochs ${STUDENT_EPOCHS:-20} --lr 0.004 --warmup-epochs 1 -p 20"
        WORKERS=${WORKERS:-$CORES}
        TOGETHER=false ;;
esac

FIRST=${SEEDS%% *}
TEACHER=assets/demo_teacher.pth
if $FROM_SCRATCH; then
    [ "$DATA" != demo ] || OUT=$OUT-from-scratch
    TEACHER=$OUT/teacher/teacher.pth
    # shellcheck disable=SC2086
    [ -f "$OUT/teacher.json" ] || "$PYTHON" train_teacher.py --data "$DATA" --subset "$SUBSET" --output "$OUT/teacher" \
        $TEACHER_FLAGS -j "$WORKERS"
fi
[ -f "$TEACHER" ] || { echo "error: $TEACHER is missing; bash scripts/quickstart.sh --from-scratch makes it again" >&2; exit 2; }

# What is in the folder must have been made with these very settings.
SETTINGS=$(printf '%s\n' "data $DATA, subset $SUBSET, seeds $SEEDS" "teacher $(cksum < "$TEACHER")" \
    "student $STUDENT $STEM" $STUDENT_FLAGS)
mkdir -p "$OUT"
if [ -f "$OUT/settings.txt" ] && [ "$(cat "$OUT/settings.txt")" != "$SETTINGS" ]; then
    echo "error: $OUT was made with other settings (see $OUT/settings.txt); remove it or set OUT to another folder" >&2
    exit 2
fi
echo "$SETTINGS" > "$OUT/settings.txt"

evaluate() { # name, further flags -> OUT/name.json
    [ -f "$OUT/$1.json" ] && return
    "$PYTHON" compute_knn.py eval --data "$DATA" --features "$OUT/$1-features" -j "$WORKERS" --json "${@:2}" \
        > "$OUT/$1.json.part" && mv "$OUT/$1.json.part" "$OUT/$1.json"
}

student() { # seed
    [ -f "$OUT/student-$1.json" ] && return
    # shellcheck disable=SC2086
    "$PYTHON" train_distill.py --data "$DATA" --subset "$SUBSET" --output "$OUT/student-$1" --seed "$1" \
        -a "$STUDENT" --stem "$STEM" --distill "$TEACHER" --loss coss --sampler cf \
        --closek-info "$OUT/neighbours/closek_info.npy" $STUDENT_FLAGS -j "$WORKERS"
    evaluate "student-$1" --weights "$OUT/student-$1/student.pth"
    evaluate "untrained-$1" --weights untrained --arch "$STUDENT" --stem "$STEM" --image-size "$SIZE" --seed "$1"
}

echo "1/3 the teacher's neighbours"
evaluate teacher --weights "$TEACHER" &
teacher_job=$!
[ -f "$OUT/neighbours/closek_info.json" ] || "$PYTHON" compute_knn.py mine --data "$DATA" --subset "$SUBSET" \
    --weights "$TEACHER" --output "$OUT/neighbours" --k 32 -j "$WORKERS"
wait "$teacher_job"
SIZE=$("$PYTHON" -c 'import json, sys; print(json.load(open(sys.argv[1]))["image_size"])' "$OUT/teacher.json")

echo "2/3 students of seeds $SEEDS; shown is seed $FIRST, the others write to $OUT/student-*/log.txt"
jobs=()
for seed in $SEEDS; do
    if [ "$seed" = "$FIRST" ]; then student "$seed" & else student "$seed" > /dev/null & fi
    jobs+=($!)
    $TOGETHER || wait "${jobs[-1]}"
done
for job in "${jobs[@]}"; do
    wait "$job" || { echo "error: a student failed; see $OUT/student-*/log.txt, or set SEEDS to one seed to see it" >&2; exit 1; }
done

echo "3/3 table and picture"
"$PYTHON" scripts/quickstart_report.py "$OUT"
