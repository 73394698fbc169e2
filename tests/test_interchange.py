"""Datasets: what a directory of episodes says of itself, and its way to other tools and back, bit for bit."""

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
import types
import warnings
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from raywm import checkpoint, cli
from raywm.agent import RandomAgent
from raywm.collect import Collector
from raywm.data import interchange, minari_io, rollouts
from raywm.data.dataset import Dataset, read_card, write_card
from raywm.data.episode import Episode, validate
from raywm.data.interchange import Source, write_dataset
from raywm.data.store import EpisodeStore
from raywm.envs.classic import check_counting
from raywm.spaces import ActionCodec, obs_columns, to_columns

COUNTING = {"id": "raywm/Counting-v0", "kwargs": {"image": True}}
ENVS = {"cartpole": {"id": "CartPole-v1"}, "pendulum": {"id": "Pendulum-v1"}, "counting": COUNTING}
QUIET = pytest.mark.filterwarnings("ignore")


def collected(env, path, numbers=range(12), shards=1, seed=5):
    """Random episodes of an environment in a dataset; those of a shard are every so-manieth."""
    collector = Collector(env, seed=seed, envs=4)
    agent = RandomAgent(collector.codec)
    for shard in range(shards):
        folder = path / f"shard-{shard:03d}" if shards > 1 else path
        with EpisodeStore(folder, collector.columns, collector.codec) as store:
            for episode in collector.collect(agent, list(numbers)[shard::shards]):
                store.add(episode)
    write_card(path, collector.columns, collector.codec, env=dict(env), policy="random", seed=seed, made_with="a test")
    collector.close()
    return path


@pytest.fixture(scope="module", params=sorted(ENVS))
def dataset(request, tmp_path_factory):
    with Dataset(collected(ENVS[request.param], tmp_path_factory.mktemp(request.param) / "data", shards=2)) as dataset:
        yield dataset


@pytest.fixture(scope="module")
def counting(tmp_path_factory):
    return collected(COUNTING, tmp_path_factory.mktemp("counting") / "data")


def same(a, b):
    assert a.id == b.id and json.dumps(a.info, sort_keys=True) == json.dumps(b.info, sort_keys=True)
    assert sorted(a.obs) == sorted(b.obs)
    for (name, left), right in zip(a.columns().items(), b.columns().values(), strict=True):
        assert left.dtype == right.dtype and left.shape == right.shape and left.tobytes() == right.tobytes(), name


def same_dataset(one, path):
    with Dataset(path) as two:
        assert two.ids() == one.ids() and two.steps == one.steps
        for a, b in zip(one, two, strict=True):
            same(a, b)
        assert two.codec.space == one.codec.space and two.columns == one.columns
        assert two.card["env"] == one.card["env"] and two.card["policy"] == one.card["policy"]
        assert two.verify()["ok"]


def raywm(*arguments):
    return CliRunner().invoke(cli.app, [str(a) for a in arguments])


# The view


def test_dataset_reads_shards_in_order(dataset):
    assert len(dataset) == 12 and sorted(dataset.shards) == ["shard-000", "shard-001"]
    assert dataset.ids() == [f"collect-{n:09d}" for n in range(12)]
    assert [e.id for e in dataset] == dataset.ids()
    assert dataset.steps == sum(e.steps for e in dataset) and dataset.rows == sum(len(e) for e in dataset)
    for episode in dataset:
        validate(episode, dataset.columns, dataset.codec)
    info = dataset.info()
    assert (info["episodes"], info["steps"], info["streams"]) == (12, dataset.steps, {"collect": 12})
    assert info["env"] == dataset.card["env"]["id"] and info["policy"] == "random"
    with pytest.raises(KeyError, match="no episode 'collect-000000012' among the 12"):
        dataset.get("collect-000000012")


def test_verify_passes_and_an_episode_in_two_shards_is_served_once(tmp_path):
    path = collected(COUNTING, tmp_path / "data", shards=2)
    with Dataset(path) as dataset:
        report = dataset.verify()
        assert report["ok"] and (report["episodes"], report["shards"]) == (12, 2)
        steps = dataset.steps
    with Dataset(path) as dataset, EpisodeStore(path / "shard-002") as store:
        store.add(dataset.get("collect-000000003"))
    with Dataset(path) as dataset:
        assert len(dataset) == len(list(dataset)) == 12 and dataset.steps == steps
        report = dataset.verify()
        assert report["ok"] and report["twins"] == 1 and report["doubled"] == []  # equal bits are no harm
        other = dataclasses.replace(dataset.get("collect-000000005"), id="collect-000000004")
    with EpisodeStore(path / "shard-002") as store:
        store.add(other)
    with Dataset(path) as dataset:
        report = dataset.verify()
        assert not report["ok"] and report["doubled"] == ["collect-000000004"]
        assert [report[k] for k in ("damaged", "invalid", "missing", "set_aside")] == [[], {}, [], []]


def test_verify_names_what_is_missing_damaged_and_set_aside(tmp_path):
    path = collected(COUNTING, tmp_path / "data", [0, 1, 2, 5, 6, 8], shards=2)  # shards: 0 2 6 and 1 5 8
    with Dataset(path) as dataset:
        assert dataset.verify()["missing"] == ["collect-000000003..collect-000000004", "collect-000000007"]
    (segment,) = (path / "shard-000").glob("segment-*")
    data = bytearray(segment.read_bytes())
    data[len(data) // 2] ^= 1
    segment.write_bytes(data)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with Dataset(path) as dataset:
            report = dataset.verify()
    assert not report["ok"] and (report["damaged"] or report["set_aside"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        segment.write_bytes(b"not arrow")
        result = raywm("data", "verify", path)
    assert result.exit_code == 1 and f"set aside: shard-000/{segment.name}" in result.output
    assert "NOT whole" in result.output and "missing: collect-000000000" in result.output


def test_a_damaged_copy_is_replaced_by_the_other(tmp_path):
    path = collected(COUNTING, tmp_path / "data", range(4))
    with Dataset(path) as dataset:
        whole = list(dataset)
    for name in ("shard-000", "shard-001"):
        with EpisodeStore(path / name) as store:
            store.add(whole[1])
    (segment,) = (path / "shard-000").glob("segment-*")
    data = bytearray(segment.read_bytes())
    data[data.index(whole[1].obs["vector"].tobytes())] ^= 1
    segment.write_bytes(data)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with Dataset(path) as dataset:
            for a, b in zip(dataset, whole, strict=True):
                same(a, b)
            assert dataset.verify()["damaged"] == ["collect-000000001"]


def test_broken_episodes_are_no_gaps(tmp_path):
    path = collected(COUNTING, tmp_path / "data", [0, 1, 3])
    with EpisodeStore(path) as store:
        store.mark("collect-000000002", {"broken": "it raised"})
    with Dataset(path) as dataset:
        report = dataset.verify()
        assert report["ok"] and report["broken"] == {"collect-000000002": "it raised"} and report["episodes"] == 3
    assert "collect-000000002 (it raised)" in raywm("data", "verify", path).output


def test_verify_holds_episodes_against_the_card(tmp_path):
    path = collected(ENVS["cartpole"], tmp_path / "data", range(3))
    columns = obs_columns(gym.spaces.Box(-1, 1, (4,), np.float32))
    write_card(path, columns, ActionCodec(gym.spaces.Box(-1, 1, (1,))))
    with Dataset(path) as dataset:
        report = dataset.verify()
    assert not report["ok"] and len(report["invalid"]) == 3 and "action is int64" in min(report["invalid"].values())


def test_runs_open_with_their_spaces(tmp_path, dataset):
    run = tmp_path / "run"
    (run / "episodes").mkdir(parents=True)
    spaces = json.loads((dataset.path / "dataset.json").read_text())["spaces"]
    (run / "spaces.json").write_text(json.dumps(spaces | {"horizon": 3}))
    with Dataset(run) as empty:
        assert len(empty) == 0 and empty.codec is not None and empty.verify()["ok"] and empty.info()["episodes"] == 0
    with EpisodeStore(run / "episodes") as store:
        for number in (0, 500_000, 500_001, 1_000_000):  # turns and trials number from multiples of half a million
            e = dataset.get("collect-000000000")
            store.add(Episode(f"collect-{number:09d}", e.obs, e.action, e.reward, e.is_first, e.is_last, e.is_terminal))
    for path in (run, run / "episodes"):
        with Dataset(path) as view:
            assert len(view) == 4 and view.codec.space == dataset.codec.space and view.columns == dataset.columns
            assert view.verify()["ok"]
    (run / "config.yaml").write_text("")
    with EpisodeStore(run / "episodes") as store:
        store.add(dataset.get("collect-000000007"))  # left over by a collector: a run leaves such gaps
    for accepted, missing in (([0, 500_000], []), ([0, 1, 500_000], ["collect-000000001"])):
        checkpoint.save(run / "checkpoints", len(accepted), state={"accepted": [f"collect-{n:09d}" for n in accepted]})
        for path in (run, run / "episodes"):
            with Dataset(path) as view:
                report = view.verify()
                assert (report["missing"], report["ok"]) == (missing, not missing)


def test_remote_datasets_are_copied_and_local_uris_are_not(tmp_path, counting):
    import fsspec

    memory = fsspec.filesystem("memory")
    memory.put(str(counting), "/bucket/data", recursive=True)
    memory.pipe("/bucket/data/checkpoints/big", b"not wanted")
    said = []
    with Dataset("fsspec+memory://bucket/data", say=said.append) as remote, Dataset(counting) as local:
        assert remote.ids() == local.ids() and remote.codec.space == local.codec.space
        assert not list(remote.path.rglob("big"))
        for a, b in zip(local, remote, strict=True):
            same(a, b)
    assert not remote.path.exists() and "MiB of fsspec+memory://bucket/data to" in said[0]
    with Dataset("fsspec+memory://bucket/data", cache=tmp_path / "cache", say=said.append):
        pass
    assert read_card(tmp_path / "cache") == read_card(counting)
    with Dataset(f"file://{counting}", say=said.append) as view:
        assert view.path == counting and len(said) == 2


@pytest.mark.parametrize(
    "content, message", [("{", "damaged"), ('{"format": 2}', "reads 1; use the version"), ("[]", "damaged")]
)
def test_bad_cards_are_errors(tmp_path, content, message):
    (tmp_path / "dataset.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        Dataset(tmp_path)


# Parquet


def test_parquet_round_trip_is_exact(dataset, tmp_path, monkeypatch):
    monkeypatch.setattr(interchange, "GROUP_BYTES", 5000)
    monkeypatch.setattr(interchange, "PART_BYTES", 5000)
    assert interchange.export_parquet(dataset, tmp_path / "out") == 12
    assert len(list((tmp_path / "out").iterdir())) > 1
    write_dataset(interchange.import_parquet(tmp_path / "out"), tmp_path / "back")
    same_dataset(dataset, tmp_path / "back")


def test_parquet_keeps_odd_infos(tmp_path):
    infos = [{"a": 1, "b": [1, {"c": None}]}, {"a": 1.0, "b": [1, {"c": None}]}, {"é": "x"}, {}]
    flags = np.eye(2, dtype=bool)
    episodes = [
        Episode(f"é-{i}", {"vector": np.full((2, 1), -0.0, np.float32)}, np.zeros((2, 3), np.int8),
                np.array([0, -0.0], np.float32), flags[0], flags[1], flags[0] & False, info)
        for i, info in enumerate(infos)
    ]  # fmt: skip
    write_dataset(Source(episodes, None, None, None), tmp_path / "data")  # a dataset whose spaces nobody knows
    with Dataset(tmp_path / "data") as dataset:
        interchange.export_parquet(dataset, tmp_path / "out")
    write_dataset(interchange.import_parquet(tmp_path / "out"), tmp_path / "back")
    with Dataset(tmp_path / "back") as back:
        assert back.codec is None
        for a, b in zip(episodes, back, strict=True):
            same(a, b)


def test_pandas_opens_it_with_one_line(dataset, tmp_path):
    import pandas

    interchange.export_parquet(dataset, tmp_path / "out")
    frame = pandas.read_parquet(tmp_path / "out")
    assert len(frame) == dataset.rows and frame["is_first"].dtype == bool
    returns = frame.groupby("episode_id")["reward"].sum()
    shapes = dataset.get(dataset.ids()[0]).obs
    for episode in dataset:
        rows = frame[frame["episode_id"] == episode.id]
        assert rows["t"].tolist() == list(range(len(episode)))
        assert returns[episode.id] == pytest.approx(episode.ret, rel=1e-5)
        assert np.stack(rows["action"].to_list()).tobytes() == episode.action.tobytes()
        for name, column in episode.obs.items():
            restored = np.stack(rows[f"obs.{name}"].to_list()).reshape(-1, *shapes[name].shape[1:])
            assert restored.tobytes() == column.tobytes()


def test_duckdb_opens_it_with_one_line(dataset, tmp_path):
    duckdb = pytest.importorskip("duckdb")
    interchange.export_parquet(dataset, tmp_path / "out")
    rows = duckdb.sql(
        f"select episode_id, count(*), sum(reward), bool_or(is_terminal) from '{tmp_path}/out/*.parquet' group by all"
    ).fetchall()
    assert len(rows) == len(dataset)
    for id, count, ret, terminal in rows:
        episode = dataset.get(id)
        assert (count, terminal) == (len(episode), bool(episode.is_terminal[-1]))
        assert ret == pytest.approx(episode.ret, rel=1e-5)
    name = f"obs.{next(iter(dataset.columns))}"
    ((value,),) = duckdb.sql(
        f"""select "{name}" from '{tmp_path}/out/*.parquet' where episode_id = '{dataset.ids()[3]}' and t = 1"""
    ).fetchall()
    expected = dataset.get(dataset.ids()[3]).columns()[name][1]
    assert np.array(value, expected.dtype).tobytes() == expected.tobytes()
    ((meta,),) = duckdb.sql(
        f"select decode(value) from parquet_kv_metadata('{tmp_path}/out/*.parquet') where decode(key) = 'raywm'"
    ).fetchall()
    assert json.loads(meta)["shapes"][name] == list(expected.shape)


@pytest.mark.parametrize(
    "dataset",
    ["cartpole", *(pytest.param(name, marks=pytest.mark.slow) for name in sorted(set(ENVS) - {"cartpole"}))],
    indirect=True,
)
def test_ray_data_opens_it_with_one_line(dataset, tmp_path, ray_session, monkeypatch):
    import ray

    monkeypatch.setattr(interchange, "GROUP_BYTES", 5000)
    monkeypatch.setattr(interchange, "PART_BYTES", 5000)  # several files, whose metadata differ
    interchange.export_parquet(dataset, tmp_path / "out")
    rows = ray.data.read_parquet(str(tmp_path / "out"))
    assert rows.count() == dataset.rows
    batch = rows.take_batch(dataset.rows)
    for episode in dataset:
        at = (batch["episode_id"] == episode.id).nonzero()[0]
        at = at[np.argsort(batch["t"][at])]
        for name, column in episode.columns().items():
            assert batch[name].dtype == column.dtype and batch[name][at].shape == column.shape
            assert batch[name][at].tobytes() == column.tobytes()


@pytest.mark.slow
def test_the_lines_in_the_readme_run_as_they_stand(counting, tmp_path):
    pytest.importorskip("duckdb")
    text = (Path(__file__).parent.parent / "README.md").read_text()
    (block,) = (part for part in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "duckdb" in part)
    with Dataset(counting) as dataset:
        interchange.export_parquet(dataset, tmp_path / "out")
        rows = dataset.rows
    (tmp_path / "script.py").write_text(f"{block}\nprint('COUNTED', len(frame), rows.count(), len(rows.take(3)))\n")
    result = subprocess.run([sys.executable, "script.py"], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert f"COUNTED {rows} {rows} 3" in result.stdout, result.stderr


# RLlib


def test_rllib_transitions(dataset, tmp_path):
    import pyarrow.parquet as pq

    names = sorted(dataset.columns)
    if len(names) > 1:
        with pytest.raises(ValueError, match="choose --column image"):
            interchange.export_rllib(dataset, tmp_path / "out")
        assert not os.listdir(tmp_path)
    interchange.export_rllib(dataset, tmp_path / "out", names[0])
    table = pq.read_table(tmp_path / "out")
    assert table.num_rows == dataset.steps
    ids = np.array(table["eps_id"].to_pylist())
    stored = {name: table[name].combine_chunks() for name in ("obs", "new_obs", "actions")}
    stored = {k: c.to_numpy_ndarray() if hasattr(c, "to_numpy_ndarray") else c.to_numpy() for k, c in stored.items()}
    for episode in dataset:
        at = (ids == episode.id).nonzero()[0]
        assert np.array_equal(stored["obs"][at], episode.obs[names[0]][:-1])
        assert np.array_equal(stored["new_obs"][at], episode.obs[names[0]][1:])
        assert np.array_equal(stored["actions"][at], episode.action[1:])
        assert np.array_equal(table["rewards"].to_numpy()[at], episode.reward[1:])
        assert np.array_equal(np.array(table["terminateds"].to_pylist())[at], episode.is_terminal[1:])
        truncated = np.array(table["truncateds"].to_pylist())[at]
        assert truncated[-1] == (not episode.is_terminal[-1]) and not truncated[:-1].any()


@pytest.mark.parametrize("which", ["cartpole", pytest.param("pendulum", marks=pytest.mark.slow)])
def test_rllib_reads_them(which, tmp_path, ray_session):
    from ray.rllib.algorithms.bc import BCConfig
    from ray.rllib.offline.offline_data import OfflineData
    from ray.rllib.offline.offline_prelearner import OfflinePreLearner

    path = collected(ENVS[which], tmp_path / "data", range(3))
    with Dataset(path) as dataset:
        interchange.export_rllib(dataset, tmp_path / "out")
        env = gym.make(ENVS[which]["id"])
        config = BCConfig().environment(observation_space=env.observation_space, action_space=env.action_space)
        config.offline_data(input_=[str(tmp_path / "out")], dataset_num_iters_per_learner=1)
        batch = OfflineData(config).data.take_batch(10_000)
        steps = OfflinePreLearner._map_to_episodes(types.SimpleNamespace(config=config), batch, to_numpy=True)
        played = {}
        for step in steps["episodes"]:
            assert len(step) == 1 and env.observation_space.contains(step.get_observations(0))
            assert env.action_space.contains(step.get_actions(0))
            played.setdefault(step.id_, []).append(step)
        assert sorted(played) == dataset.ids()
        for id, parts in played.items():
            episode = dataset.get(id)
            assert len(parts) == episode.steps
            assert [float(p.get_rewards(0)) for p in parts] == episode.reward[1:].tolist()
            assert [p.is_terminated for p in parts] == episode.is_terminal[1:].tolist()
            assert [p.is_truncated for p in parts][-1] == (not episode.is_terminal[-1])
        env.close()


@pytest.mark.slow
def test_rllib_learns_from_them(tmp_path, ray_session):
    from ray.rllib.algorithms.bc import BCConfig

    with Dataset(collected(ENVS["cartpole"], tmp_path / "data", range(60))) as dataset:
        interchange.export_rllib(dataset, tmp_path / "out")
    env = gym.make("CartPole-v1")
    config = BCConfig().environment(observation_space=env.observation_space, action_space=env.action_space)
    config.offline_data(input_=[str(tmp_path / "out")], dataset_num_iters_per_learner=1)
    algorithm = config.training(train_batch_size_per_learner=64).build_algo()
    result = algorithm.train()
    algorithm.stop()
    learnt = result["learners"]["default_policy"]
    assert learnt["num_module_steps_trained"] >= 64 and np.isfinite(learnt["policy_loss"])


def test_what_was_exported_for_rllib_is_no_parquet_to_import(counting, tmp_path):
    with Dataset(counting) as dataset:
        interchange.export_rllib(dataset, tmp_path / "out", "vector")
    result = raywm("data", "import", tmp_path / "out", tmp_path / "back", "--format", "parquet")
    said = " ".join(result.output.split())
    assert (
        result.exit_code == 2 and "expected episode_id" in said and "export the dataset with --format parquet" in said
    )
    assert not (tmp_path / "back").exists()


def test_a_damaged_block_is_told_once_however_many_episodes_it_has(counting, tmp_path):
    with Dataset(counting) as dataset:
        source = Source(iter(dataset), None, dataset.columns, dataset.codec)
        write_dataset(source, tmp_path / "blocks")
    (segment,) = (tmp_path / "blocks").glob("segment-*")
    data = bytearray(segment.read_bytes())
    data[len(data) // 2] ^= 4
    segment.write_bytes(data)
    with Dataset(tmp_path / "blocks") as dataset, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert len(dataset) == 12 and not list(dataset)
    assert ["no longer served" in str(warning.message) for warning in caught] == [True]


# Minari


@QUIET
def test_minari_round_trip_is_exact(dataset, tmp_path):
    minari = pytest.importorskip("minari")
    path, id = minari_io.export_minari(dataset, str(tmp_path / "sub" / "name"))
    assert (path, id) == (tmp_path / "sub" / "name", "name-v0") and not list(path.glob("scratch"))
    write_dataset(minari_io.import_minari(str(path)), tmp_path / "back")
    same_dataset(dataset, tmp_path / "back")

    made = minari.MinariDataset(path / "data")  # what others see
    assert made.total_steps == dataset.steps and made.total_episodes == len(dataset)
    for episode, theirs in zip(dataset, made, strict=True):
        assert len(theirs.rewards) == episode.steps and np.array_equal(theirs.actions, episode.action[1:])
        obs = theirs.observations if isinstance(theirs.observations, dict) else {"vector": theirs.observations}
        assert all(np.array_equal(obs[name], episode.obs[name]) for name in episode.obs)
        assert theirs.terminations[-1] == episode.is_terminal[-1] != theirs.truncations[-1]
    assert made.recover_environment().spec.id == dataset.card["env"]["id"]


@QUIET
def test_minari_ids_lie_in_its_own_place(counting, tmp_path, monkeypatch):
    minari = pytest.importorskip("minari")
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "place"))
    result = raywm("data", "export", counting, "count/random-v0", "--format", "minari", "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["open"] == 'minari.load_dataset("count/random-v0")'
    assert minari.load_dataset("count/random-v0").total_episodes == 12
    assert list(minari.list_local_datasets()) == ["count/random-v0"]
    assert os.environ["MINARI_DATASETS_PATH"] == str(tmp_path / "place")
    result = raywm("data", "import", "count/random-v0", tmp_path / "back", "--format", "minari")
    assert result.exit_code == 0, result.output
    with Dataset(counting) as dataset:
        same_dataset(dataset, tmp_path / "back")
    assert "not empty" in raywm("data", "export", counting, "count/random-v0", "--format", "minari").output
    assert "minari download" in raywm("data", "import", "count/no-v1", tmp_path / "x", "--format", "minari").output


SPACES = st.one_of(
    st.builds(lambda n, start: gym.spaces.Discrete(n, start=start), st.integers(1, 9), st.integers(-5, 5)),
    st.builds(
        lambda nvec, dtype: gym.spaces.MultiDiscrete(nvec, dtype=dtype),
        st.lists(st.integers(1, 5), min_size=1, max_size=3),
        st.sampled_from([np.int64, np.int32]),
    ),
    st.builds(gym.spaces.MultiBinary, st.integers(1, 4)),
    st.builds(
        lambda shape, dtype: gym.spaces.Box(1, 7, tuple(shape), dtype),
        st.lists(st.integers(1, 3), max_size=2),
        st.sampled_from([np.float32, np.float64, np.float16, np.uint8, np.int32]),
    ),
)
COLUMNS = st.sampled_from(
    [
        {"vector": gym.spaces.Box(-1, 1, (3,), np.float32)},
        {"odd": gym.spaces.Box(-np.inf, np.inf, (1,), np.float32)},
        {"image": gym.spaces.Box(0, 255, (32, 32, 3), np.uint8)},  # as large as what Minari would make a JPEG of
        {"vector": gym.spaces.Box(0, 255, (2, 2, 1), np.uint8), "z": gym.spaces.Box(-1, 1, (2,), np.float32)},
    ]
)


@QUIET
@settings(max_examples=25, deadline=None)
@given(space=SPACES, columns=COLUMNS, steps=st.lists(st.integers(1, 9), min_size=1, max_size=4), data=st.data())
def test_minari_keeps_every_kind_of_space(tmp_path_factory, space, columns, steps, data):
    pytest.importorskip("minari")
    tmp_path, codec = tmp_path_factory.mktemp("minari"), ActionCodec(space)
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    space.seed(1)
    episodes = []
    for n, length in enumerate(steps):
        obs = {
            name: rng.integers(0, 256, (length + 1, *box.shape), np.uint8)
            if box.dtype == np.uint8
            else rng.standard_normal((length + 1, *box.shape)).astype(np.float32)
            for name, box in columns.items()
        }
        action = np.stack([codec.zero(), *(np.asarray(space.sample(), codec.dtype) for _ in range(length))])
        reward = np.concatenate([[0], rng.standard_normal(length)]).astype(np.float32)
        row = np.arange(length + 1)
        terminal = (row == length) & data.draw(st.booleans())
        info = data.draw(st.dictionaries(st.text(max_size=3), st.integers() | st.text(max_size=3) | st.none()))
        episodes.append(Episode(f"any-{n:09d}", obs, action, reward, row == 0, row == length, terminal, info))
    write_dataset(Source(episodes, None, columns, codec), tmp_path / "data")
    with Dataset(tmp_path / "data") as dataset:
        minari_io.export_minari(dataset, str(tmp_path / "out"))
        source = minari_io.import_minari(str(tmp_path / "out"))
        assert source.codec.space == space and source.codec.dtype == codec.dtype
        write_dataset(source, tmp_path / "back")
    with Dataset(tmp_path / "back") as back:
        for a, b in zip(episodes, back, strict=True):
            same(a, b)
    shutil.rmtree(tmp_path)


@QUIET
@pytest.mark.parametrize("id", ["CartPole-v1", "Pendulum-v1"])
def test_foreign_minari_datasets_are_imported(id, tmp_path, monkeypatch):
    """Made by Minari's own collector: against what a plain loop saw."""
    minari = pytest.importorskip("minari")
    import tree

    if not hasattr(sys.modules.get("jax"), "tree_util"):  # all that the collector wants of jax
        jtu = types.ModuleType("jax.tree_util")
        jtu.tree_map = lambda f, first, *rest: tree.map_structure_up_to(first, f, first, *rest)
        jax = types.ModuleType("jax")
        jax.tree_util = jtu
        monkeypatch.setitem(sys.modules, "jax", jax)
        monkeypatch.setitem(sys.modules, "jax.tree_util", jtu)
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "place"))
    env = minari.DataCollector(gym.wrappers.TimeLimit(gym.make(id), 15), record_infos=True)
    env.action_space.seed(0)
    seen = []
    for seed in range(5):
        obs, rewards, actions, terminated, truncated = [env.reset(seed=seed)[0]], [0.0], [], False, False
        while not (terminated or truncated):
            actions.append(env.action_space.sample())
            o, reward, terminated, truncated, _ = env.step(actions[-1])
            obs.append(o)
            rewards.append(float(reward))
        seen.append((obs, actions, rewards, terminated))
    env.create_dataset("foreign/some-v3", algorithm_name="chance")
    env.close()

    result = raywm("data", "import", "foreign/some-v3", tmp_path / "data", "--format", "minari")
    assert result.exit_code == 0 and "episodes  5" in result.stdout, result.output
    with Dataset(tmp_path / "data") as dataset:
        assert dataset.verify()["ok"] and dataset.card["env"]["id"] == id and dataset.card["policy"] == "chance"
        for number, (episode, (obs, actions, rewards, terminated)) in enumerate(zip(dataset, seen, strict=True)):
            expected = np.stack([to_columns(dataset.columns, o)["vector"] for o in obs])
            assert episode.id == f"minari-{number:09d}" and episode.info["seed"] == number
            assert episode.obs["vector"].tobytes() == expected.tobytes()
            assert np.array_equal(episode.action[1:], np.stack(actions))
            assert np.array_equal(episode.reward, np.array(rewards, np.float32))
            assert bool(episode.is_terminal[-1]) == terminated
    assert any(s[3] for s in seen) == (id == "CartPole-v1")


def test_without_minari_it_says_how_to_get_it(counting, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "minari", None)
    for arguments in (["export", counting, tmp_path / "x"], ["import", counting, tmp_path / "x"]):
        result = raywm("data", *arguments, "--format", "minari")
        assert result.exit_code == 2 and 'pip install "raywm[minari]"' in result.output
    assert not os.listdir(tmp_path)


# The classic repositories' recordings


def step_through(seed, limit):
    """What an environment gives, call by call, so that recordings can be made of it as those repositories do."""
    env = gym.make("raywm/Counting-v0", image=True, max_episode_steps=limit)
    (obs, _), rng, done = env.reset(seed=seed), np.random.default_rng(seed), False
    calls = []
    while not done:
        action = int(rng.integers(5))
        after, reward, terminated, truncated, _ = env.step(action)
        done = terminated or truncated
        calls.append((obs, action, after, reward, done))
        obs = after
    env.close()
    return calls


def test_ctallec_rollouts(tmp_path):
    recorded = []
    for n in range(11):
        calls = step_through(n, 20)
        planned = [c[1] for c in calls] + [4] * 7  # more actions are in the files than were done
        (tmp_path / "in" / "thread_0").mkdir(parents=True, exist_ok=True)
        np.savez(
            tmp_path / "in" / "thread_0" / f"rollout_{n}.npz",
            observations=np.array([c[2]["image"] for c in calls]),
            rewards=np.array([c[3] for c in calls]),
            actions=np.array(planned),
            terminals=np.array([c[4] for c in calls]),
        )
        recorded.append(calls)
    codec = ActionCodec(gym.spaces.Discrete(5))
    source = rollouts.import_rollouts(tmp_path / "in", codec=codec, limit=20)
    assert write_dataset(source, tmp_path / "data") == 11
    with Dataset(tmp_path / "data") as dataset:
        assert dataset.verify()["ok"]
        for n, (episode, calls) in enumerate(zip(dataset, recorded, strict=True)):
            assert episode.info["source"] == f"thread_0/rollout_{n}.npz"  # 10 comes after 9
            assert len(episode) == len(calls)
            for row, (_, action, after, reward, _) in enumerate(calls):
                assert np.array_equal(episode.obs["image"][row], after["image"])
                assert (episode.action[row], episode.reward[row]) == ((action, reward) if row else (0, 0))
            assert bool(episode.is_terminal[-1]) == (len(calls) < 20)
        assert {bool(e.is_terminal[-1]) for e in dataset} == {True, False}


@pytest.mark.parametrize("rewards", [False, True])
def test_hardmaru_records(tmp_path, rewards):
    recorded = []
    for n in range(6):
        calls = step_through(n, 30)
        (tmp_path / "record").mkdir(exist_ok=True)
        more = {"reward": np.array([c[3] for c in calls]), "done": np.array([c[4] for c in calls])} if rewards else {}
        obs, action = np.array([c[0]["image"] for c in calls]), np.array([c[1] / 4 for c in calls], np.float16)
        np.savez_compressed(tmp_path / "record" / f"{n}.npz", obs=obs, action=action, **more)
        recorded.append(calls)
    result = raywm("data", "import", tmp_path / "record", tmp_path / "data", "--format", "world-models")
    assert result.exit_code == 0 and "ends one step early" in result.output, result.output
    assert ("all are 0" in result.output) == (not rewards) and "inferred from what was done" in result.output
    with Dataset(tmp_path / "data") as dataset:
        assert dataset.verify()["ok"] and dataset.codec.space.shape == (1,)
        for episode, calls in zip(dataset, recorded, strict=True):
            assert len(episode) == len(calls)
            for row, (before, *_) in enumerate(calls):
                assert np.array_equal(episode.obs["image"][row], before["image"])
                if row:
                    _, action, _, reward, _ = calls[row - 1]  # it led from the row before to this one
                    assert episode.action[row] == np.float16(action / 4)
                    assert episode.reward[row] == (reward if rewards else 0)
            assert episode.is_terminal[-1]  # all are shorter than Doom's 2100


def test_rollouts_of_a_known_environment(tmp_path):
    pytest.importorskip("Box2D")
    (tmp_path / "in").mkdir()
    rng = np.random.default_rng(0)
    frames = rng.integers(0, 256, (1000, 96, 96, 3), np.uint8)
    actions = rng.uniform([-1, 0, 0], 1, (1000, 3))
    parts = {"observations": frames, "actions": actions, "rewards": np.ones(1000), "terminals": np.arange(1000) == 999}
    np.savez(tmp_path / "in" / "rollout_0.npz", **parts)
    arguments = ["data", "import", tmp_path / "in", tmp_path / "data", "--format", "world-models"]
    result = raywm(*arguments, "--env", "CarRacing-v3")
    assert result.exit_code == 0, result.output
    with Dataset(tmp_path / "data") as dataset:
        assert dataset.card["env"] == {"id": "CarRacing-v3"} and dataset.codec.space.high.tolist() == [1, 1, 1]
        (episode,) = dataset
        assert not episode.is_terminal[-1] and episode.ret == 999  # the time limit; the first reward is dropped
    shutil.rmtree(tmp_path / "data")
    result = raywm(*arguments, "--env", "CartPole-v1")
    assert result.exit_code == 2 and "leave --env out" in result.output and not (tmp_path / "data").exists()


# Errors and interruptions


@pytest.mark.parametrize("export", ["parquet", "rllib", "minari"])
@QUIET
def test_an_interrupted_export_leaves_nothing(counting, tmp_path, monkeypatch, export):
    pytest.importorskip("minari")
    with Dataset(collected(ENVS["cartpole"], tmp_path / "data", range(6))) as dataset:
        monkeypatch.setattr(interchange, "GROUP_BYTES", 1)
        left = []

        def stop(n):
            left.append(n)
            if len(left) == 4:
                raise KeyboardInterrupt

        call = getattr(minari_io if export == "minari" else interchange, f"export_{export}")
        with pytest.raises(KeyboardInterrupt):
            call(dataset, str(tmp_path / "out"), progress=stop)
    assert sorted(os.listdir(tmp_path)) == ["data"]


def test_outputs_are_never_overwritten(counting, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("years")
    (tmp_path / "file").write_text("x")
    (tmp_path / "empty").mkdir()
    for out, why in (("full", "not empty"), ("file", "a file")):
        for command in ("export", "import"):
            result = raywm("data", command, counting, tmp_path / out, "--format", "parquet")
            assert result.exit_code == 2
            assert command == "import" or why in result.output
    assert (tmp_path / "full" / "thesis.tex").read_text() == "years"
    assert raywm("data", "export", counting, tmp_path / "empty", "--format", "parquet").exit_code == 0
    assert os.listdir(tmp_path / "empty") == ["part-00000.parquet"]


def test_a_bad_source_leaves_nothing(tmp_path):
    row = np.arange(3)
    flags = (row == 0, row == 2, row == 9)
    good = Episode("a-000000000", {"v": np.zeros((3, 1), np.float32)}, row, np.zeros(3, np.float32), *flags)
    bad = Episode("a-000000001", good.obs, row, np.full(3, np.nan, np.float32), *flags)
    for episodes, message in (([good, bad], "row 0: reward is NaN"), ([good, good], "comes twice"), ([], "no episode")):
        with pytest.raises(ValueError, match=message):
            write_dataset(Source(episodes, None, None, None), tmp_path / "out")
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["info", "nowhere"], "there is no dataset at nowhere"),
        (["info", "{empty}"], "holds no episodes, expected segment-*.arrows"),
        (["verify", "nosuch://bucket/x"], "nosuch"),
        (["info", "{data}", "--episode", "x"], "no episode 'x' among the 12"),
        (["export", "{data}", "{empty}/o", "--format", "csv"], "expected one of parquet, minari, rllib"),
        (["export", "{data}", "{empty}/o", "--format", "parquet", "--column", "x"], "--column is for --format rllib"),
        (["export", "{data}", "{empty}/o", "--format", "rllib", "--column", "x"], "no observation column 'x'"),
        (["export", "{data}", "s3://bucket/o", "--format", "parquet"], "expected a local directory"),
        (["import", "{empty}", "{empty}/o", "--format", "parquet"], "no *.parquet in"),
        (["import", "{empty}", "{empty}/o", "--format", "world-models"], "no .npz files in"),
        (["import", "{empty}", "{empty}/o", "--format", "hdf5"], "expected one of parquet, minari, world-models"),
    ],
)
def test_bad_input_is_one_line(counting, tmp_path, arguments, message):
    result = raywm("data", *(a.format(empty=tmp_path, data=counting) for a in arguments))
    assert result.exit_code == 2 and message in " ".join(result.output.split()), result.output
    assert "Traceback" not in result.output and not os.listdir(tmp_path)


def test_info_and_verify_on_the_command_line(counting):
    result = raywm("data", "info", counting, "--json")
    info = json.loads(result.stdout)
    assert (
        info["episodes"] == 12 and info["columns"]["obs.image"] == "uint8 (8, 8, 3)" and info["env"] == COUNTING["id"]
    )
    assert "episodes  12" in raywm("data", "info", counting).stdout
    with Dataset(counting) as dataset:
        episode = dataset.get("collect-000000004")
        check_counting(episode)
    shown = json.loads(raywm("data", "info", counting, "--episode", "collect-000000004", "--json").stdout)
    assert (shown["return"], shown["steps"], shown["info"]) == (episode.ret, episode.steps, episode.info)
    result = raywm("data", "verify", counting, "--json")
    assert result.exit_code == 0 and json.loads(result.stdout)["ok"]
    assert "whole" in raywm("data", "verify", counting).stdout
