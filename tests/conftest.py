"""Every test, and every process that a test starts, computes with one thread and without the bf16 units that only some
CPUs have: the same numbers on any machine."""

import multiprocessing
import os

os.environ.update({"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1",
                   "ONEDNN_MAX_CPU_ISA": "AVX512_CORE"})  # before torch is imported, and inherited by subprocesses

import helpers.small  # noqa: E402,F401
import pytest  # noqa: E402
import torch  # noqa: E402
from helpers.interpreter import warm_python  # noqa: E402

torch.set_num_threads(1)


def pytest_configure(config):
    """xdist's workers share one, which also starts what multiprocessing spawns."""
    if getattr(config.option, "numprocesses", None) or "PYTEST_XDIST_WORKER" in os.environ:
        multiprocessing.set_executable(warm_python())


@pytest.fixture(autouse=True)
def _seeded():
    """Each test begins from the same random state, whatever ran before it."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="session")
def _own_datasets(tmp_path_factory):
    """Named data sets are looked for in a folder of the test run's."""
    before = os.environ.get("COSS_DATASETS")
    os.environ["COSS_DATASETS"] = str(tmp_path_factory.mktemp("datasets"))
    yield
    os.environ.pop("COSS_DATASETS")
    if before is not None:
        os.environ["COSS_DATASETS"] = before


@pytest.fixture(autouse=True, scope="session")
def _event_files_sort_as_they_were_made():
    """Their names hold the second, the process and a count, which TensorBoard sorts as text. Tests begin several runs
    in one second and one process, so that the count must not get another digit."""
    from tensorboard.summary.writer import event_file_writer

    event_file_writer._global_uid = event_file_writer.AtomicCounter(10**6)
