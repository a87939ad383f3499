import os
import sys
from pathlib import Path

# Two workers of two threads each on two cores wait for each other: each worker gets its share, for its child processes,
# too. Before torch is imported, which reads this once.
workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1))
if workers > 1:
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // workers)))

import hypothesis  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

if not torch.cuda.is_available():  # before anything imports Triton
    os.environ.setdefault("TRITON_INTERPRET", "1")

sys.path.insert(0, str(Path(__file__).parent))

# The same examples in every run, and none that depends on how fast the machine is.
hypothesis.settings.register_profile("fixed", derandomize=True, deadline=None, database=None, print_blob=False)
hypothesis.settings.load_profile("fixed")


GPU = Path(__file__).parent / "gpu"


def for_gpu(config) -> bool:
    return config.getoption("markexpr") == "gpu"


def pytest_ignore_collect(collection_path, config):
    """`-m gpu` collects tests/gpu and nothing else, and without it nobody waits for them."""
    inside = GPU in (collection_path, *collection_path.parents)
    if collection_path.is_dir() and not inside:
        return None
    return True if inside != for_gpu(config) else None


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config):
    return 0 if for_gpu(config) else None  # one process, which has the GPU to itself


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


from helpers.command_line import app  # noqa: E402, F401  (a fixture)
from helpers.streams import streams  # noqa: E402, F401  (a fixture)
