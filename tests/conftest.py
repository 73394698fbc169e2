import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def ray_session():
    """The one Ray of a test session; logical CPUs may exceed the cores."""
    import ray

    if not ray.is_initialized():
        # Workers must find the classes that test modules define, and raywm where it is not installed.
        here = Path(__file__).parent
        paths = [str(here), str(here.parent), os.environ.get("PYTHONPATH", "")]
        os.environ["PYTHONPATH"] = os.pathsep.join(p for p in paths if p)
        ray.init(
            address="local",
            num_cpus=8,
            include_dashboard=False,
            log_to_driver=False,
            object_store_memory=200 * 2**20,
        )
    yield ray
    ray.shutdown()
