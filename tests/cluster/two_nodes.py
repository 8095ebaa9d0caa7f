#!/usr/bin/env python
"""A real job of two nodes: stopped by a signal, gone on with, one of its processes killed and restarted, and compared
with the same training on one machine, to the bit.

    python tests/cluster/two_nodes.py

A node is a torchrun agent started by scripts/_env.sh as on a cluster, in a network namespace of its own with a cable
between the two; where namespaces may not be made (that takes root), both are on the loopback, which is said. Ends with
1 if anything differs. About a minute on two cores.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tests" / "chaos"), str(ROOT / "tests")]

from chaos import FLAGS, children, send, start  # noqa: E402
from helpers.compare import differences  # noqa: E402

TRAIN = [*FLAGS["train_distill.py"], "--epochs", "3", "--save-every", "4", "--workers", "0"]
ADDRESSES = ("10.213.71.1", "10.213.71.2")
LAUNCH = 'source scripts/_env.sh; PYTHON=$0; launch 1 "$@"'


class Nodes:
    """Two of them, and how to run a command on each."""

    def __init__(self) -> None:
        self.names = [f"coss{os.getpid()}{side}" for side in "ab"]
        try:
            for command in self._cables():
                subprocess.run(command, shell=True, check=True, capture_output=True, text=True)
            self.apart = True
        except subprocess.CalledProcessError as error:
            self.remove()
            print(f"no network namespaces here ({error.stderr.strip()}): both nodes are on the loopback")
            self.apart = False

    def _cables(self) -> list[str]:
        a, b = self.names
        commands = [f"ip netns add {a}", f"ip netns add {b}",
                    f"ip link add {a} netns {a} type veth peer name {b} netns {b}"]
        for name, address in zip(self.names, ADDRESSES, strict=True):
            commands += [f"ip -n {name} addr add {address}/24 dev {name}", f"ip -n {name} link set {name} up",
                         f"ip -n {name} link set lo up"]
        return commands

    def remove(self) -> None:
        """The namespaces, and with them the cable."""
        for name in self.names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)

    def start(self, job: str, output: Path, log: Path, restarts: int) -> list[subprocess.Popen]:
        """The job's launcher on each node."""
        launchers = []
        for rank, (name, address) in enumerate(zip(self.names, ADDRESSES, strict=True)):
            inside = ["ip", "netns", "exec", name] if self.apart else []
            network = ({"LOCAL_ADDR": address, "GLOO_SOCKET_IFNAME": name} if self.apart else
                       {"LOCAL_ADDR": "127.0.0.1"})
            first = ADDRESSES[0] if self.apart else "127.0.0.1"
            environment = {**os.environ, "OMP_NUM_THREADS": "1", "NODES": "2", "NODE_RANK": str(rank), "JOB": job,
                           "RENDEZVOUS": f"{first}:29871", "RESTARTS": str(restarts), **network}
            with log.open("a") as file:
                launchers.append(subprocess.Popen(
                    [*inside, "bash", "-c", LAUNCH, sys.executable, "train_distill.py", *TRAIN, "--output",
                     str(output)], cwd=ROOT, env=environment, stdout=file, stderr=file, start_new_session=True))
        return launchers


def trainers(launcher: subprocess.Popen) -> list[int]:
    """The training processes of a node: children of torchrun, which is a child of the launcher."""
    return [pid for agent in children(launcher.pid) for pid in children(agent)
            if b"train_distill" in Path(f"/proc/{pid}/cmdline").read_bytes()]


def wait_for_step(output: Path, step: int, launchers: Sequence[subprocess.Popen], log: Path) -> None:
    """Until metrics.jsonl has a line of ``step`` or later."""
    until = time.monotonic() + 240
    while time.monotonic() < until and all(x.poll() is None for x in launchers):
        path = output / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        if lines and f'"step": {step},' in "".join(lines):
            return
        time.sleep(0.05)
    raise SystemExit(f"step {step} was not reached:\n{log.read_text()[-4000:]}")


def end(launchers: Sequence[subprocess.Popen], log: Path, expected: int) -> None:
    """Wait until both have ended, as is expected."""
    codes = [launcher.wait(240) for launcher in launchers]
    if codes != [expected] * 2:
        raise SystemExit(f"the nodes ended with {codes}, not {expected}:\n{log.read_text()[-4000:]}")


def main() -> int:
    """The job, and what differs."""
    work, nodes = Path(tempfile.mkdtemp(prefix="two-nodes-")), Nodes()
    log, began = work / "said.txt", time.monotonic()
    launchers: list[subprocess.Popen] = []
    try:
        if start("train_distill.py", TRAIN, work / "one", 2, log).wait(240) != 0:
            raise SystemExit(log.read_text()[-4000:])
        launchers = nodes.start("first", work / "two", log, restarts=1)
        wait_for_step(work / "two", 9, launchers, log)
        send(signal.SIGUSR1, [launcher.pid for launcher in launchers])  # as srun hands it to the task of each node
        end(launchers, log, 0)
        print("stopped:", [line for line in log.read_text().splitlines() if line.startswith("stopped by")][-1])
        launchers = nodes.start("second", work / "two", log, restarts=1)
        wait_for_step(work / "two", 24, launchers, log)
        send(signal.SIGKILL, trainers(launchers[1]))
        end(launchers, log, 0)
        print("gone on with after a kill:", [line for line in log.read_text().splitlines()
                                             if line.startswith("resuming from")][-1])
    finally:
        for launcher in launchers:
            if launcher.poll() is None:
                send(signal.SIGKILL, [*trainers(launcher), *children(launcher.pid), launcher.pid])
        nodes.remove()
    found = differences(work / "one", work / "two")
    where, end_state = "two network namespaces" if nodes.apart else "the loopback", "DIFFERS" if found else "identical"
    print(f"two nodes on {where}, {time.monotonic() - began:.0f} s; beside one machine the end state is {end_state}")
    for line in found[:20]:
        print(line)
    if not found:
        shutil.rmtree(work)
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
