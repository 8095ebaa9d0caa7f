"""The marked set, `pytest -m gpu`: what only a GPU can show. Elsewhere it is skipped, or rehearsed on the CPU:

    COSS_TEST_DEVICE=cpu python -m pytest tests/gpu
"""

import json
import os

import pytest
import torch
from helpers.experiment import neighbours, teacher, teacher_run, tree, work  # noqa: F401
from helpers.methods import method_files  # noqa: F401

DEVICE = os.environ.get("COSS_TEST_DEVICE", "cuda")


def pytest_collection_modifyitems(items):
    """Everything in this folder is of the set; without a GPU it is skipped, unless the CPU was asked for."""
    absent = DEVICE.startswith("cuda") and not torch.cuda.is_available()
    for item in items:
        if item.path.parent.name == "gpu":
            item.add_marker(pytest.mark.gpu)
            if absent:
                item.add_marker(pytest.mark.skip(reason="needs a GPU (or COSS_TEST_DEVICE=cpu, a rehearsal)"))


def pytest_runtest_logreport(report):
    """What became of each test, a JSON line as soon as it is known, in the file COSS_TEST_REPORT, if any."""
    path = os.environ.get("COSS_TEST_REPORT")
    of_worker = "PYTEST_XDIST_WORKER" in os.environ  # the main process is told as well
    if path and not of_worker and (report.when == "call" or report.outcome != "passed"):
        said = [line[4:] for line in report.longreprtext.splitlines() if line.startswith("E   ")]
        said = report.longrepr[2] if isinstance(report.longrepr, tuple) else " ".join(said)[:300]
        with open(path, "a") as file:  # noqa: PTH123
            print(json.dumps({"test": report.nodeid.rpartition("/")[2], "outcome": report.outcome, "said": said,
                              "seconds": round(report.duration, 1)}), file=file)


@pytest.fixture
def device():
    """Where the test computes; what a script sets for its whole process is undone afterwards."""
    # One way of asking alone: torch 2.9 and later refuse a matmul.allow_tf32 beside it in one process.
    before = torch.backends.cudnn.benchmark, torch.backends.cudnn.allow_tf32
    products = torch.get_float32_matmul_precision()
    torch.backends.cudnn.allow_tf32 = False
    torch.set_float32_matmul_precision("highest")
    yield torch.device(DEVICE)
    torch.backends.cudnn.benchmark, torch.backends.cudnn.allow_tf32 = before
    torch.set_float32_matmul_precision(products)


@pytest.fixture
def gpu(device):
    """The same, where a CPU has nothing to show."""
    if device.type != "cuda":
        pytest.skip("only a GPU has this")
    return device
