"""What a run needs against what a cluster has: everything that must go wrong is named before anything starts."""

from raywm.runtime.needs import WORKER_BYTES, Need, missing

GIB = 2**30


def node(cpus=0.0, gpus=0.0, memory=64 * GIB, **labels):
    return {"Resources": {"CPU": cpus, "GPU": gpus, "memory": memory}, "Labels": labels}


CPUS, GPUS = node(8, raywm="collect"), node(4, 1, raywm="learn")


def collectors(count, **labels):
    return Need("collector", "collect.workers", count, labels=labels)


def test_what_fits_lacks_nothing():
    needs = [collectors(8, raywm="collect"), Need("trainer", "fit.threads", cpus=4, gpus=1, labels={"raywm": "learn"})]
    assert missing(needs, [CPUS, GPUS]) == []
    assert missing([Need("learner", count=4, gpus=0.25)], [GPUS]) == []


def test_each_kind_of_actor_needs_room_on_single_nodes():
    (text,) = missing([Need("trainer", "fit.threads", cpus=6)], [node(4), node(4)])  # 8 CPUs, but never 6 in one place
    assert text == "1 trainer of 6 CPUs (fit.threads): room for 0 on 2 nodes of 4 CPUs"
    (text,) = missing([Need("dream worker", "dream.workers", 3, cpus=2)], [node(3), node(3)])
    assert "3 dream workers of 2 CPUs each (dream.workers): room for 2" in text


def test_gpus():
    (text,) = missing([Need("learner", "dreamer.learners", 2, gpus=1)], [CPUS, GPUS])
    assert "2 learners of 1 CPU and 1 GPU each (dreamer.learners): room for 1" in text
    assert "1 node of 8 CPUs and 0 GPUs, 1 node of 4 CPUs and 1 GPU" in text


def test_labels_bind():
    (text,) = missing([collectors(9, raywm="collect")], [CPUS, GPUS])
    assert text.endswith("room for 8 on 1 node of 8 CPUs labelled raywm=collect")
    assert not missing([collectors(9)], [CPUS, GPUS])
    (text,) = missing([collectors(1, raywm="colect")], [CPUS, GPUS])
    assert text.endswith("no node labelled raywm=colect, there are raywm=collect, raywm=learn")
    assert "ray start --labels" in missing([collectors(1, raywm="collect")], [node(8)])[0]


def test_sums_count_where_each_kind_alone_would_fit():
    needs = [collectors(6), Need("dream worker", "dream.workers", 6)]
    (text,) = missing(needs, [node(8)])
    assert text.startswith("12 CPUs needed, 8 CPUs there (6 collectors") and "dream workers" in text
    labelled = [collectors(6, raywm="collect"), Need("evaluator", count=3, labels={"raywm": "collect"})]
    (text,) = missing(labelled, [CPUS, GPUS])  # 12 CPUs in all, and 9 of 8 with the label
    assert text.startswith("9 CPUs needed, 8 CPUs there labelled raywm=collect")


def test_memory():
    (text,) = missing([collectors(8)], [node(8, memory=WORKER_BYTES * 7)])
    assert text.startswith("1 GiB of memory needed, 0.875 GiB of memory there")
    nodes = [{"Resources": {"CPU": 8.0}, "Labels": {}}]  # it does not say
    assert missing([collectors(8)], nodes) == []


def test_the_local_machine_gets_what_is_asked_for(ray_session):
    import pytest

    from raywm.runtime.cluster import connect

    assert connect(None, [collectors(8)])["CPU"] == 8
    with pytest.raises(ValueError, match=r"the running Ray is too small: 9 collectors .* room for 8 .* add nodes"):
        connect(None, [collectors(9)])
    with pytest.raises(ValueError, match="16 workers of 1 CPU"):
        connect(None, 16)
