"""The job of two nodes, where it is asked for: it takes a minute and, to be of two networks, root."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.skipif(os.environ.get("COSS_TEST_CLUSTER") != "1",
                    reason="a job of two nodes takes a minute: set COSS_TEST_CLUSTER=1, or run two_nodes.py")
def test_two_nodes():
    done = subprocess.run([sys.executable, str(Path(__file__).with_name("two_nodes.py"))], capture_output=True,
                          text=True)
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
