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

launch() { # number of processes, script, flags
    local processes=$1
    shift
    if [ "$processes" = 1 ]; then "$PYTHON" "$@"; else
        "$PYTHON" -m torch.distributed.run --standalone --nproc_per_node "$processes" "$@"
    fi
}
