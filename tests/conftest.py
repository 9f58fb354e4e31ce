"""Set before torch is imported: threads that wait sleep, else a busy machine makes the tests several times slower."""
import functools
import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


@pytest.fixture(autouse=True, scope="session")
def short_turntables():
    """Four frames instead of 36, which are most of a small run's time; test_train.py makes one in full."""
    import r2d3
    r2d3.turntable = functools.partial(r2d3.turntable, frames=4)
