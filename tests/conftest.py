import gc
import os
import time
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


@pytest.fixture
def all_cpus(ray_session):
    """Every logical CPU is free: what earlier tests left behind, as actors that are still ending, is gone."""
    until = time.monotonic() + 60
    while (free := ray_session.available_resources().get("CPU", 0)) < 8:
        if time.monotonic() > until:
            from ray.util.state import list_actors

            left = [(a.class_name, a.name) for a in list_actors(filters=[("state", "=", "ALIVE")])]
            pytest.fail(f"{free} of 8 CPUs are free, and these actors live: {left}")
        gc.collect()
        time.sleep(0.2)
