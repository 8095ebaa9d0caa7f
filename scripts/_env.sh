# Sourced by the other scripts: the project's folder, its environment (made if it is not there), and $PYTHON.
# CPU-only machines may take PyTorch's smaller wheels: export PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu
cd "$(dirname "${BASH_SOURCE[0]}")/.."

environment() {
    local wanted
    wanted=$(cat requirements.txt requirements-extra.txt | cksum)
    if [ "$(cat .venv/.installed 2>/dev/null)" != "$wanted" ]; then
        local base=${PYTHON:-python3}
        "$base" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || {
            echo "error: $base is older than Python 3.10; set PYTHON to a newer one" >&2; exit 2; }
        echo "making .venv (the packages are a few GB the first time) ..."
        .venv/bin/python -m pip --version > /dev/null 2>&1 || "$base" -m venv --clear .venv
        .venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt -r requirements-extra.txt
        echo "$wanted" > .venv/.installed
    fi
    PYTHON=$PWD/.venv/bin/python
}

# Starts the processes of a training or evaluation, on one machine or, where NODES is set, on this one of several:
# each runs the same script with RENDEZVOUS (the first's host:port), NODE_RANK and JOB (a name), as slurm.sbatch does.
# RESTARTS: how often torchrun starts all processes again, from the last checkpoint, if one of them dies (default 0).
launch() { # number of processes on each machine, script, flags
    local processes=$1 several=()
    shift
    if [ -z "${NODES:-}" ]; then
        if [ "$processes" = 1 ]; then "$PYTHON" "$@"; else
            "$PYTHON" -m torch.distributed.run --standalone --nproc_per_node "$processes" \
                --max-restarts "${RESTARTS:-0}" "$@"
        fi
        return
    fi
    several=(--nnodes "$NODES" --rdzv-backend c10d --rdzv-endpoint "$RENDEZVOUS" --rdzv-id "$JOB" --rdzv-conf
             "is_host=$([ "$NODE_RANK" = 0 ] && echo true || echo false)")
    "$PYTHON" -m torch.distributed.run "${several[@]}" ${LOCAL_ADDR:+--local-addr "$LOCAL_ADDR"} \
        --nproc_per_node "$processes" --max-restarts "${RESTARTS:-0}" "$@" &
    local agent=$! code=0
    trap 'pkill -USR1 -P "$agent" || true' USR1   # to the processes that train: torchrun would die of it
    trap 'kill -TERM "$agent" || true' TERM       # which torchrun hands on
    while kill -0 "$agent" 2> /dev/null; do wait "$agent" || true; done
    wait "$agent" || code=$?
    return "$code"
}
