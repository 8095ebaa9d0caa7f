"""scripts/slurm.sbatch and the launcher with stand-ins for SLURM and torchrun: who is started how, and who gets which
signal."""

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# srun: the command on each of two "nodes", with signals handed on.
SRUN = """#!/bin/bash
shift  # --kill-on-bad-exit=1
pids=()
for node in 0 1; do SLURM_NODEID=$node "$@" & pids+=($!); done
trap 'kill -USR1 "${pids[@]}"' USR1
code=0
for pid in "${pids[@]}"; do
    while kill -0 "$pid" 2> /dev/null; do wait "$pid" || true; done
    wait "$pid" || code=$?
done
exit $code
"""
SCONTROL = """#!/bin/bash
if [ "$1" = show ]; then printf 'alpha\\nbeta\\n'; else echo "$@" >> said; fi
"""
# torchrun: notes its arguments, and starts one process that trains until it gets USR1, or dies of anything else.
PYTHON = """#!/bin/bash
echo "$@" > "started-$NODE_RANK"
[ -z "$FAIL" ] || exit 7
bash -c 'trap "touch saved-$NODE_RANK; exit 0" USR1; touch ready-$NODE_RANK; while :; do sleep 0.02; done' &
wait
wait
"""


@pytest.fixture
def project(tmp_path):
    folder = tmp_path / "project"
    (folder / "scripts").mkdir(parents=True)
    for name in ("_env.sh", "slurm.sbatch"):
        shutil.copy(ROOT / "scripts" / name, folder / "scripts")
    (folder / "scripts" / "run.sh").write_text(
        'set -euo pipefail\nsource "$(dirname "$0")/_env.sh"\nenvironment\nlaunch "$GPUS" train.py "$@"\n')
    for name in ("requirements.txt", "requirements-extra.txt"):
        (folder / name).write_text("")
    bin_folder, python = folder / "bin", folder / ".venv" / "bin" / "python"
    for path, content in ((bin_folder / "srun", SRUN), (bin_folder / "scontrol", SCONTROL), (python, PYTHON)):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
        path.chmod(0o755)
    wanted = subprocess.run("cat requirements.txt requirements-extra.txt | cksum", shell=True, cwd=folder,
                            capture_output=True, text=True).stdout
    (folder / ".venv" / ".installed").write_text(wanted)
    return folder


def submit(project, **more):
    environment = {**os.environ, "PATH": f"{project / 'bin'}:{os.environ['PATH']}", "SLURM_SUBMIT_DIR": str(project),
                   "SLURM_JOB_NODELIST": "x", "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_ID": "4711",
                   "SLURM_GPUS_ON_NODE": "8", "FAIL": "", **more}
    return subprocess.Popen(["bash", str(ROOT / "scripts" / "slurm.sbatch"), "bash", "scripts/run.sh", "--lr", "0.1"],
                            cwd=project, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def wait_for(project, *names):
    until = time.monotonic() + 120
    while not all((project / name).exists() for name in names):
        assert time.monotonic() < until
        time.sleep(0.02)


def test_a_warning_reaches_the_processes_and_the_job_goes_back_into_the_queue(project):
    job = submit(project)
    wait_for(project, "ready-0", "ready-1")
    job.send_signal(signal.SIGUSR1)
    out, _ = job.communicate(timeout=120)
    assert job.returncode == 0, out
    assert {"saved-0", "saved-1"} <= {path.name for path in project.iterdir()}
    assert (project / "said").read_text() == "requeue 4711\n"
    for rank, is_host in ((0, "true"), (1, "false")):
        words = (project / f"started-{rank}").read_text()
        assert words == ("-m torch.distributed.run --nnodes 2 --rdzv-backend c10d --rdzv-endpoint alpha:24711 "
                         f"--rdzv-id 4711 --rdzv-conf is_host={is_host} --nproc_per_node 8 --max-restarts 3 train.py "
                         "--lr 0.1\n")


def test_a_failure_is_the_jobs_exit_code_and_is_not_queued_again(project):
    job = submit(project, FAIL="1")
    job.communicate(timeout=120)
    assert job.returncode == 7
    assert not (project / "said").exists()


def test_without_a_command_it_says_what_to_do(project):
    done = subprocess.run(["bash", str(ROOT / "scripts" / "slurm.sbatch")], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("error: no command")


@pytest.mark.parametrize(("gpus", "restarts", "words"), [
    ("1", "", "train.py --lr 0.1\n"),
    ("4", "2", "-m torch.distributed.run --standalone --nproc_per_node 4 --max-restarts 2 train.py --lr 0.1\n")])
def test_on_one_machine(project, gpus, restarts, words):
    environment = {**os.environ, "GPUS": gpus, "RESTARTS": restarts, "FAIL": "1", "NODE_RANK": "0"}
    environment.pop("NODES", None)
    done = subprocess.run(["bash", "scripts/run.sh", "--lr", "0.1"], cwd=project, env=environment)
    assert done.returncode == 7
    assert (project / "started-0").read_text() == words
