# Sourced by the other scripts: changes to the project's folder; environment() creates .venv if needed and sets $PYTHON.
# On a machine without a GPU, get PyTorch's smaller packages: export PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu
unset CDPATH  # it would make cd go elsewhere
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."
set -f           # a list in a variable (SEEDS="0 1") is words, never names of files

# Refuses a variable that is not a whole number of at least a minimum. The shell's arithmetic could run any other value
# as a command, and torchrun would answer it with half a page of errors.
whole() { # name, least
    local value=${!1}
    case $value in
        "" | *[!0-9]* | ??????????*) ;;
        *) [ "$value" -lt "$2" ] || return 0 ;;
    esac
    echo "error: $1=$value is not a whole number of at least $2; set $1 to one" >&2
    exit 2
}

# With NO_VENV=1 nothing is installed: $PYTHON (by default python3) is used with the packages that it has.
environment() {
    local wanted
    if [ -n "${NO_VENV:-}" ]; then PYTHON=${PYTHON:-python3}; return; fi
    wanted=$(cat requirements.txt requirements-extra.txt | cksum)
    if [ "$(cat .venv/.installed 2>/dev/null)" != "$wanted" ]; then
        local base=${PYTHON:-python3}
        "$base" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || {
            echo "error: $base is older than Python 3.10; set PYTHON to a newer one" >&2; exit 2; }
        echo "making .venv (the packages are a few GB the first time) ..."
        .venv/bin/python -m pip --version > /dev/null 2>&1 || "$base" -m venv --clear .venv
        # Modules are compiled when they are imported, not in advance: thousands of them never are.
        .venv/bin/python -m pip install --quiet --disable-pip-version-check --no-compile \
            -r requirements.txt -r requirements-extra.txt
        echo "$wanted" > .venv/.installed
    fi
    PYTHON=$PWD/.venv/bin/python
}

# Starts the processes of a training or evaluation, on one machine or, where NODES is set, on this one of several:
# each runs the same script with RENDEZVOUS (the first's host:port), NODE_RANK and JOB (a name), as slurm.sbatch does.
# RESTARTS: how often torchrun starts all processes again, from the last checkpoint, if one of them dies (default 0).
launch() { # number of processes on each machine (GPUS), script, flags
    local GPUS=$1 RESTARTS=${RESTARTS:-0} processes=$1 several=()
    shift
    whole GPUS 1
    whole RESTARTS 0
    if [ -z "${NODES:-}" ]; then
        if [ "$processes" = 1 ]; then "$PYTHON" "$@"; else
            "$PYTHON" -m torch.distributed.run --standalone --nproc_per_node "$processes" \
                --max-restarts "$RESTARTS" "$@"
        fi
        return
    fi
    whole NODES 1
    several=(--nnodes "$NODES" --rdzv-backend c10d --rdzv-endpoint "$RENDEZVOUS" --rdzv-id "$JOB" --rdzv-conf
             "is_host=$([ "$NODE_RANK" = 0 ] && echo true || echo false)")
    "$PYTHON" -m torch.distributed.run "${several[@]}" ${LOCAL_ADDR:+--local-addr "$LOCAL_ADDR"} \
        --nproc_per_node "$processes" --max-restarts "$RESTARTS" "$@" &
    local agent=$! code=0
    trap 'pkill -USR1 -P "$agent" || true' USR1   # to the processes that train: torchrun would die of it
    trap 'kill -TERM "$agent" || true' TERM       # which torchrun hands on
    while kill -0 "$agent" 2> /dev/null; do wait "$agent" || true; done
    wait "$agent" || code=$?
    return "$code"
}
