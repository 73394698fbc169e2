"""Joining a cluster: what its nodes lack, or have in another version, is one error that says which node has what."""

import re

import pytest

import raywm
from raywm.runtime import cluster


def test_every_node_is_asked_and_agrees(ray_session):
    said = []
    cluster._check_nodes(["raywm.envs.classic", "gymnasium.envs.classic_control.cartpole"], said.append)
    assert not said


def test_another_raywm_and_a_missing_module(ray_session, monkeypatch):
    monkeypatch.setattr(raywm, "__version__", "9.9.9")
    with pytest.raises(ValueError) as caught:
        cluster._check_nodes(["their_simulator.env"], print)
    text = str(caught.value)
    assert "this process has (raywm 9.9.9, Python 3." in text and "Ray 2." in text
    node = ray_session.nodes()[0]["NodeManagerAddress"]
    assert re.search(rf"{re.escape(node)} has raywm \d+\.\d+\.\S*, has no their_simulator.env", text)
    assert "No module named 'their_simulator'" in text


def test_other_builds_of_torch_are_said(ray_session, monkeypatch):
    import importlib.metadata

    plain = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "1.0" if name == "torch" else plain(name))
    said = []
    cluster._check_nodes([], said.append)
    assert len(said) == 1 and "here torch 1.0" in said[0] and "other bits" in said[0]


def test_a_node_that_does_not_answer(ray_session, monkeypatch):
    monkeypatch.setattr(cluster, "VERSION_TIMEOUT_S", 0.0)
    with pytest.raises(ValueError, match="did not answer within 0 s"):
        cluster._check_nodes([], print)


def test_what_a_cluster_has_against_this_process(monkeypatch):
    import ray

    def refuse(error):
        def init(**options):
            raise error

        monkeypatch.setattr(cluster, "_init", init)

    refuse(RuntimeError("Version mismatch: The cluster was started with:\n    Ray: 2.59.0\n    Python: 3.10.1\n"))
    with pytest.raises(ValueError, match=r"started with: Ray: 2.59.0 Python: 3.10.1. Install the same Ray and Python"):
        cluster._join("auto", [])
    refuse(ray.exceptions.AuthenticationError("InvalidAuthToken"))
    with pytest.raises(ValueError, match=r"the cluster at auto refuses this process: InvalidAuthToken.*RAY_AUTH_TOKEN"):
        cluster._join("auto", [])
    refuse(RuntimeError("something else"))
    with pytest.raises(RuntimeError, match="something else"):
        cluster._join("auto", [])


def test_modules_that_an_environment_needs():
    assert cluster.environment_modules("mine.envs:Env") == ["mine.envs"]
    assert cluster.environment_modules("CartPole-v1") == ["gymnasium.envs.classic_control.cartpole"]
    assert cluster.environment_modules("not/registered-v0") == []


def test_installed_modules_do_not_travel(tmp_path, monkeypatch):
    (tmp_path / "mine_alone.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    paths = cluster._runtime_env(["mine_alone", "gymnasium.envs.classic_control.cartpole", "raywm.envs.classic"])
    names = [path.rpartition("/")[2] for path in paths["py_modules"]]
    assert names == ["raywm", "mine_alone.py"]


def test_labels_that_ray_would_refuse_are_refused_by_their_key():
    from raywm import config as configs

    good = configs.load("cartpole", ["collect.labels.raywm=collect", "dream.labels={ray.io/accelerator-type: A100}"])
    assert good.collect.labels == {"raywm": "collect"} and good.dream.labels == {"ray.io/accelerator-type": "A100"}
    for value in ("in(a,b)", "'!spot'", "-x", "''"):
        with pytest.raises(ValueError, match="collect.labels: got .* expected letters, digits"):
            configs.load("cartpole", [f"collect.labels.raywm={value}"])
    with pytest.raises(ValueError, match=r"collect\.labels"):
        configs.load("cartpole", ["collect.labels=raywm"])
    configs.diff_for_resume(configs.load("cartpole"), good)  # where a run works may change when it is resumed


def test_a_ray_that_is_too_slow_to_start_is_told(monkeypatch):
    def slow(**options):
        raise Exception("The current node timed out during startup. This could happen because ...")

    monkeypatch.setattr(cluster.ray, "init", slow)
    with pytest.raises(ValueError, match="too busy"):
        cluster._init(address="local")
