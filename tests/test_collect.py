"""The path of a transition from env.step to an Episode: integrity, and the same bits however the work is shared out."""

import copy
import hashlib
import math
import sys
import threading
import time

import gymnasium as gym
import numpy as np
import pytest

from raywm.agent import Agent, Exploring, LiveAgent, MixedAgent, RandomAgent, StickyAgent
from raywm.collect import Collector
from raywm.data.episode import from_block, table_meta, validate
from raywm.data.store import EpisodeStore
from raywm.envs.classic import check_counting
from raywm.seeding import derive
from raywm.spaces import ActionCodec

COUNTING = {"id": "raywm/Counting-v0", "kwargs": {"image": True}}


DIGESTS = {RandomAgent: "3b7b933933680a67", StickyAgent: "3f5b2b38d0b9a7a4", MixedAgent: "43bd2d28adefff0e"}


class Listening(Agent):
    """Acts by a running mean of all it has seen, and by chance: its every action depends on its whole past."""

    name = "listening"

    def __init__(self, codec):
        self.codec = codec

    def initial(self, B):
        return np.zeros(B)

    def act(self, obs, state, is_first, rngs):
        seen = np.where(is_first, 0, state) * 0.9 + obs["vector"].sum(-1)
        draws = np.array([rng.random() for rng in rngs])
        return ((seen + 100 * draws) % self.codec.dim).astype(self.codec.dtype), seen


def same(a, b):
    assert a.id == b.id and a.info == b.info
    for (name, left), right in zip(a.columns().items(), b.columns().values(), strict=True):
        assert left.dtype == right.dtype and left.tobytes() == right.tobytes(), name


@pytest.mark.parametrize("envs", [1, 3, 8])
@pytest.mark.parametrize(
    "make", [RandomAgent, StickyAgent, MixedAgent, Listening, lambda c: Exploring(Listening(c), c, 0.3)]
)
def test_integrity_and_grouping(envs, make):
    one = Collector(COUNTING, seed=3, envs=envs)
    agent = make(one.codec)
    whole = {e.id: e for e in one.collect(agent, range(20))}
    assert sorted(whole) == [f"collect-{n:09d}" for n in range(20)]
    for episode in whole.values():
        validate(episode, one.columns, one.codec)
        check_counting(episode)
        assert set(episode.info) == {"number", "seed", "env", "policy", "version", "return"}
    assert len({e.obs["vector"].tobytes() for e in whole.values()}) == 20
    two = Collector(COUNTING, seed=3, envs=envs)
    for numbers in ([19, 2, 3], [0], [1, 4, 5, 6, 7, 8, 9, 10], range(11, 19)):
        for episode in two.collect(agent, numbers):
            same(episode, whole.pop(episode.id))
    assert not whole


def test_data_of_earlier_releases_is_played_again():
    """The same seeds give the very bits that they gave when the collector was first written."""
    for make, expected in DIGESTS.items():
        collector = Collector(COUNTING, seed=3, envs=3)
        digest = hashlib.sha256()
        for episode in sorted(collector.collect(make(collector.codec), range(20)), key=lambda e: e.id):
            for name, column in episode.columns().items():
                digest.update(f"{name} {column.dtype} {column.shape}".encode() + column.tobytes())
        assert digest.hexdigest()[:16] == expected, make


def test_streams_and_seeds_differ():
    collector = Collector(COUNTING, seed=3, envs=2)
    agent = RandomAgent(collector.codec)
    (a,) = collector.collect(agent, [0])
    (b,) = collector.collect(agent, [0], stream="evaluate")
    (c,) = Collector(COUNTING, seed=4, envs=2).collect(agent, [0])
    assert len({float(e.obs["vector"][0, 0]) for e in (a, b, c)}) == 3


def test_play_is_collect_without_keeping():
    collector = Collector(COUNTING, seed=1, envs=3)
    agent = Listening(collector.codec)
    kept = {e.info["number"]: e for e in collector.collect(agent, range(7), "trial")}
    played = collector.play(agent, [6, 0, 1, 2, 3, 4, 5], "trial")
    assert [p.number for p in played] == [6, 0, 1, 2, 3, 4, 5]
    for number, ret, steps, info, broken in played:
        assert (ret, steps, info) == (kept[number].ret, kept[number].steps, kept[number].info)
        assert info["return"] == ret and broken is None


def test_long_episodes_outgrow_and_outlive_the_recording(monkeypatch):
    monkeypatch.setattr("raywm.recording.BLOCK_BYTES", 1)
    env = {"id": "raywm/Counting-v0", "kwargs": {"lengths": [1, 1500]}}
    collector = Collector(env, seed=0, envs=2)
    lengths = []
    for episode in collector.collect(RandomAgent(collector.codec), range(12)):
        check_counting(episode, (1, 1500))
        lengths.append(len(episode))
    assert max(lengths) > 1024 and collector.recording(True).room >= 2048  # of 64 at first: several doublings
    assert sorted(p.steps + 1 for p in collector.play(RandomAgent(collector.codec), range(12), "collect")) == sorted(
        lengths
    )


def stored(blocks, path, collector):
    """What a store makes of blocks: {id: Episode}; and all that was played."""
    played = []
    with EpisodeStore(path, columns=collector.columns, codec=collector.codec) as store:
        for block, some in blocks:
            store.add(block)
            played += some
        return {id: store.get(id) for id in store.ids()}, store.broken, played


@pytest.mark.parametrize("envs", [1, 3, 8])
@pytest.mark.parametrize("make", [RandomAgent, Listening])
@pytest.mark.parametrize(
    "how", [{}, {"piece_rows": 1}, {"piece_rows": 7}, {"block_bytes": 1}, {"block_s": 0.0, "piece_rows": 10}]
)
def test_blocks_hold_what_collect_yields(envs, make, how, tmp_path):
    one, two = Collector(COUNTING, seed=3, envs=envs), Collector(COUNTING, seed=3, envs=envs)
    whole = {e.id: e for e in one.collect(make(one.codec), range(30))}
    blocks = list(two.blocks(make(two.codec), [*range(29, 9, -1)], common={"collector": "c7"}, **how))
    blocks += list(two.blocks(make(two.codec), range(10), common={"collector": "c7"}, **how))
    if not how:
        assert len(blocks) == 2  # a whole call fits into a block
    for block, _ in blocks:
        for head in table_meta(block)["pieces"]:
            assert head["rows"] <= how.get("piece_rows", 99) and head["last"] == ("return" in head["info"])
            assert head["last"] or head["rows"] == how["piece_rows"]
    kept, broken, played = stored(blocks, tmp_path / "store", two)
    assert not broken and sorted(kept) == sorted(whole)
    for id, episode in kept.items():
        check_counting(episode)
        assert episode.info.pop("collector") == "c7"
        same(episode, whole[id])
    assert sorted(played) == sorted((e.info["number"], e.ret, e.steps, e.info, None) for e in whole.values())


def test_blocks_come_by_size_and_by_time():
    collector = Collector(COUNTING, seed=0, envs=4)
    agent = RandomAgent(collector.codec)
    small = [b for b, _ in collector.blocks(agent, range(200), block_bytes=20_000, block_s=1e9)]
    row = small[0].nbytes / small[0].num_rows
    assert all(20_000 <= b.num_rows * row < 20_000 + 4 * 41 * row for b in small[:-1]) and len(small) > 10
    assert len(list(collector.blocks(agent, range(200), block_bytes=10**9, block_s=1e9))) == 1
    alike = Collector({"id": "raywm/Counting-v0", "kwargs": {"lengths": [30, 30]}}, seed=0, envs=8)
    blocks = list(alike.blocks(agent, range(80), block_bytes=1000, block_s=1e9))
    assert [len(played) for _, played in blocks] == [1] * 80  # though eight of them end at once
    timed = list(collector.blocks(agent, range(200), block_bytes=10**9, block_s=0.0))
    assert max(len(played) for _, played in timed) <= 4  # whatever ended with one vector step
    with pytest.raises(ValueError, match="piece_rows is 0"):
        next(collector.blocks(agent, [0], piece_rows=0))
    with pytest.raises(ValueError, match="pickup is 0"):
        next(collector.blocks(agent, [0], pickup=0))


def test_a_full_recording_is_handed_over_and_reused(monkeypatch):
    monkeypatch.setattr("raywm.recording.BLOCK_BYTES", 1)
    env = {"id": "raywm/Counting-v0", "kwargs": {"lengths": [1, 300], "image": True}}
    collector = Collector(env, seed=0, envs=8)
    agent = RandomAgent(collector.codec)
    play = collector.blocks(agent, range(200), block_bytes=10**9, block_s=1e9)
    blocks = [block for block, _ in play]
    room = collector.recording(True).room
    assert 512 <= room <= 1024 and len(blocks) > 4  # handed over because it was full
    episodes = [e for block in blocks for e in from_block(block)]
    assert len(episodes) == 200 and sum(map(len, episodes)) / 8 > 3 * room  # or it was not reused
    for episode in episodes:
        check_counting(episode, (1, 300))
    pieces = Collector(env | {"kwargs": {"lengths": [2000, 2000], "image": True}}, seed=0, envs=2)
    rows = sum(block.num_rows for block, _ in pieces.blocks(agent, range(2), piece_rows=50))
    assert rows == 2 * 2001 and pieces.recording(True).room == 64  # pieces need no room for whole episodes


def broken_numbers(seed, stream, numbers, every):
    return [n for n in numbers if derive(seed, stream, "env", n) % every == 0]


@pytest.mark.parametrize("fault", ["raise", "nan_obs", "nan_reward"])
@pytest.mark.parametrize("at", [0, 1, 5, 20])
@pytest.mark.parametrize("piece_rows", [None, 4])
def test_broken_episodes_are_kept_out(fault, at, piece_rows, tmp_path):
    if fault == "nan_reward" and at == 0:
        return  # a reset gives no reward
    here = Collector({"id": "raywm/Faulty-v0", "kwargs": {"fault": None}}, seed=2, envs=4)
    clean = {e.id: e for e in here.collect(Listening(here.codec), range(100))}
    kwargs = {"fault": fault, "at": at, "every": 20}
    expected = broken_numbers(2, "collect", range(100), 20)
    assert 2 <= len(expected) <= 10
    collector = Collector({"id": "raywm/Faulty-v0", "kwargs": kwargs}, seed=2, envs=4)
    blocks = collector.blocks(Listening(collector.codec), range(100), piece_rows=piece_rows, block_s=0.0)
    kept, marks, played = stored(blocks, tmp_path / "store", collector)
    assert collector.broken == len(expected) and collector.restarts == 2 * len(expected)
    assert sorted(marks) == [f"collect-{n:09d}" for n in expected]
    assert sorted(kept) == sorted(set(clean) - set(marks))
    for id, episode in kept.items():
        same(episode, clean[id])
    for info in marks.values():
        assert set(info) == {"number", "seed", "env", "policy", "version", "broken"}
        assert info["broken"].startswith(f"step {at}: ") and f"step {at} " not in info["broken"][8:] or fault == "raise"
    assert sorted(p.number for p in played) == list(range(100))
    for p in played:
        assert (p.broken is None) == (p.number not in expected) == math.isfinite(p.ret)
        assert p.broken == p.info.get("broken")
    assert {e.id for e in collector.collect(Listening(collector.codec), range(100))} == set(kept)
    with pytest.raises(ValueError, match=f"episode {expected[0]}, step {at}: .*broke"):
        collector.play(Listening(collector.codec), expected[:1], "collect")


@pytest.mark.parametrize("fault", ["raise", "nan_obs", "nan_reward"])
@pytest.mark.parametrize("piece_rows", [None, 4])
def test_a_transient_fault_leaves_no_trace_but_the_count(fault, piece_rows, tmp_path):
    here = Collector({"id": "raywm/Faulty-v0", "kwargs": {"fault": None}}, seed=2, envs=4)
    clean = {e.id: e for e in here.collect(Listening(here.codec), range(30))}
    struck = tmp_path / "struck"
    struck.mkdir()
    kwargs = {"fault": fault, "at": 9, "once": str(struck / "{seed}"), "every": 3}
    collector = Collector({"id": "raywm/Faulty-v0", "kwargs": kwargs}, seed=2, envs=4)
    blocks = collector.blocks(Listening(collector.codec), range(30), piece_rows=piece_rows, block_s=0.0)
    kept, marks, played = stored(blocks, tmp_path / "store", collector)
    assert collector.restarts == len(list(struck.iterdir())) == len(broken_numbers(2, "collect", range(30), 3)) > 3
    assert not marks and collector.broken == 0 and len(played) == 30
    assert sorted(kept) == sorted(clean)
    for id, episode in kept.items():
        same(episode, clean[id])
    assert [p.ret for p in collector.play(Listening(collector.codec), range(30), "collect")] == [20.0] * 30


def test_one_in_ten_may_break():
    env = {"id": "raywm/Faulty-v0", "kwargs": {"every": 4}}
    collector = Collector(env, seed=2, envs=4)
    with pytest.raises(
        ValueError, match=r"'raywm/Faulty-v0', episode \d+, step 5: RuntimeError.*; \d+ of \d+ episodes"
    ):
        list(collector.blocks(RandomAgent(collector.codec), range(200)))
    assert collector.broken == 4 and collector.played < 40
    collector.played = 10**6  # as after a long time without
    assert len(list(collector.collect(RandomAgent(collector.codec), range(20)))) < 20


def test_a_stall_is_seen_from_another_thread():
    env = {"id": "raywm/Faulty-v0", "kwargs": {"fault": "stall", "seconds": 0.5, "every": 20}}
    collector = Collector(env, seed=2, envs=4)
    (number, *_) = broken_numbers(2, "collect", range(100), 20)
    assert collector.stalled() is None
    seen, over = [], threading.Event()

    def watch():
        while not over.wait(0.02):
            seen.append(collector.stalled())

    thread = threading.Thread(target=watch)
    thread.start()
    episodes = collector.collect(RandomAgent(collector.codec), [number, number + 1])
    list(episodes)
    over.set()
    thread.join()
    most = max((look for look in seen if look is not None), key=lambda look: look[1])
    assert most[0] == number and 0.3 < most[1] < 0.6
    assert collector.stalled() is None


class Voting(Agent):
    """Always does the action that is its version."""

    name = "voting"

    def __init__(self, codec, version):
        self.codec, self.version = codec, version

    def act(self, obs, state, is_first, rngs):
        for rng in rngs:
            rng.random()
        return np.full(len(is_first), self.version, self.codec.dtype), state


def test_offered_agents_play_the_episodes_that_begin_from_then_on():
    env = {"id": "raywm/Counting-v0", "kwargs": {"lengths": [5, 60]}}
    collector = Collector(env, seed=0, envs=4)
    episodes, offered = [], 0
    for block, _ in collector.blocks(Voting(collector.codec, 0), range(80), block_s=0.0):
        episodes += from_block(block)
        if len(episodes) >= 15 * (offered + 1) and offered < 4:
            offered += 1
            collector.offer(Voting(collector.codec, 99))  # never seen: a newer one comes before the next step
            collector.offer(Voting(collector.codec, offered))
    versions = [e.info["version"] for e in episodes]
    assert set(versions) == {0, 1, 2, 3, 4} and versions != sorted(versions)  # some went on while others were newer
    for episode in episodes:
        check_counting(episode, (5, 60))
        assert (episode.action[1:] == episode.info["version"]).all() and "versions" not in episode.info
    # An episode by one version has the same bits, whatever other versions played beside it.
    whole = {e.id: e for e in Collector(env, seed=0, envs=4).collect(Voting(collector.codec, 3), range(80))}
    third = [e for e in episodes if e.info["version"] == 3]
    assert third
    for episode in third:
        same(episode, whole[episode.id])


def test_versions_beside_each_other_do_not_disturb_one_another():
    env = {"id": "raywm/Counting-v0", "kwargs": {"lengths": [5, 60]}}
    collector, other = Collector(env, seed=0, envs=4), Collector(env, seed=0, envs=4)
    agents = [Exploring(Listening(collector.codec), collector.codec, 0.3) for _ in range(8)]
    for version, agent in enumerate(agents):
        agent.version = version
    kept = []
    for block, _ in collector.blocks(agents[0], range(40), block_s=0.0):
        kept += from_block(block)
        collector.offer(agents[min(7, len(kept) // 3)])
    assert len({e.info["version"] for e in kept}) == 8
    plain = {e.id: e for e in other.collect(agents[0], range(40))}
    for episode in kept:
        episode.info["version"] = 0  # they differ in name only
        same(episode, plain[episode.id])


def test_offers_at_a_step_interval():
    env = {"id": "raywm/Counting-v0", "kwargs": {"lengths": [50, 60], "actions": 9}}
    collector = Collector(env, seed=0, envs=3)
    episodes, offered = [], 0
    for block, _ in collector.blocks(Voting(collector.codec, 0), range(12), pickup=7, piece_rows=5, block_s=0.0):
        offered += 1
        episodes += from_block(block)
        collector.offer(Voting(collector.codec, min(8, offered // 3)))
    whole = {}
    for piece in episodes:
        whole.setdefault(piece.id, []).append(piece)
    mixed = 0
    for pieces in whole.values():
        action = np.concatenate([p.action for p in pieces])[1:]
        assert pieces[0].info["version"] == action[0] and (np.diff(action) >= 0).all()
        first, last = pieces[-1].info.get("versions", (action[0], action[0]))
        assert (first, last) == (action[0], action[-1]) and ("versions" in pieces[-1].info) == (first != last)
        changes = np.flatnonzero(np.diff(action))
        assert len(changes) < 2 or (np.diff(changes) % 7 == 0).all()
        mixed += first != last
    assert mixed >= 3
    # From one kind of agent to another, whose memory begins in the middle of an episode.
    collector.offer(RandomAgent(collector.codec))
    blocks = collector.blocks(Listening(collector.codec), range(3), pickup=20)
    infos = [p.info for _, played in blocks for p in played]
    assert [i["policy"] for i in infos] == ["listening"] * 3


def test_closing_early_and_crossing():
    collector = Collector(COUNTING, seed=3, envs=3)
    agent = RandomAgent(collector.codec)
    running = collector.collect(agent, range(9))
    next(running)
    running.close()
    for episode in collector.collect(agent, range(9)):
        check_counting(episode)
    first = collector.collect(agent, range(9))
    next(first)
    next(collector.collect(agent, range(9)))
    with pytest.raises(RuntimeError, match="another collect"):
        next(first)


@pytest.mark.parametrize(
    "fault, message",
    [
        ("nan_obs", r"'raywm/Faulty-v0', episode \d, step 5: observation 'vector' is \[nan nan nan\], expected finite"),
        ("nan_reward", r"'raywm/Faulty-v0', episode \d, step 5: reward nan, expected a finite number"),
        ("raise", r"'raywm/Faulty-v0', episode \d, step 5: RuntimeError: .* was told to fail"),
    ],
)
def test_faults_are_named(fault, message):
    for at, text in ((5, message), (0, message.replace("step 5", "step 0"))):
        collector = Collector({"id": "raywm/Faulty-v0", "kwargs": {"fault": fault, "at": at}}, seed=0, envs=3)
        if at == 0 and fault == "nan_reward":
            continue  # a reset gives no reward
        agent = RandomAgent(collector.codec)
        with pytest.raises(ValueError, match=text):
            collector.play(agent, [4, 5])
        collector.broken = 0
        assert list(collector.collect(agent, [4, 5, 6])) == [] and collector.broken == 3
        with pytest.raises(ValueError, match=text + r".*\(twice\); 4 of 4 episodes broke"):
            list(collector.collect(agent, [7, 8]))


class Wrong(gym.Env):
    observation_space = gym.spaces.Box(-1, 1, (3,), np.float32)
    action_space = gym.spaces.Discrete(2)

    def reset(self, *, seed=None, options=None):
        return np.zeros(3, np.float32), {}

    def step(self, action):
        return np.zeros(4, np.float32), 0.0, False, False, {}


def test_wrong_shapes_and_endless_episodes_are_named():
    collector = Collector({"id": "test_collect:Wrong"}, seed=0, envs=2)
    with pytest.raises(ValueError, match="'test_collect:Wrong', episode 0, step 1: "):
        collector.play(RandomAgent(collector.codec), [0])
    endless = Collector({"id": "raywm/Faulty-v0", "kwargs": {"steps": 10**9, "fault": None}}, 0, envs=2, max_steps=30)
    with pytest.raises(ValueError, match=r"episode 1, step 30: .*time_limit"):
        endless.play(RandomAgent(endless.codec), [1])


@pytest.mark.parametrize(
    "space",
    [
        gym.spaces.Discrete(3, start=2),
        gym.spaces.MultiDiscrete([2, 4]),
        gym.spaces.MultiBinary(3),
        gym.spaces.Box(np.array([-2, 0], np.float32), np.array([2, 1], np.float32)),
        gym.spaces.Box(0, 3, (2,), np.int64),
    ],
)
def test_random_agents_act_within_the_space_and_uniformly(space):
    codec = ActionCodec(space)
    for agent in (
        RandomAgent(codec),
        StickyAgent(codec, 3),
        MixedAgent(codec, 9),
        Exploring(RandomAgent(codec), codec, 0.5),
    ):
        rngs = [np.random.default_rng(i) for i in range(4)]
        state, first, seen = agent.initial(4), np.ones(4, bool), []
        for _ in range(400):
            before = copy.deepcopy(state)
            action, after = agent.act({}, state, first, rngs)
            np.testing.assert_equal(state, before)  # a state is a value
            state, first = after, np.zeros(4, bool)
            assert all(space.contains(a if space.shape else a.item()) for a in action)
            seen.append(codec.encode(action))
        mean = np.stack(seen).mean((0, 1))
        expected = {"box": 0.0, "multi_binary": 0.5}
        for group, size in zip(np.split(mean, np.cumsum(codec.groups)[:-1]), codec.groups, strict=False):
            np.testing.assert_allclose(group, 1 / size, atol=0.12)
        if codec.kind in expected:
            np.testing.assert_allclose(mean, expected[codec.kind], atol=0.12)


def test_sticky_holds():
    codec = ActionCodec(gym.spaces.Box(-1, 1, (1,), np.float32))
    agent, rngs = StickyAgent(codec, hold=10), [np.random.default_rng(0)]
    state, first, actions = agent.initial(1), np.ones(1, bool), []
    for _ in range(2000):
        action, state = agent.act({}, state, first, rngs)
        first = np.zeros(1, bool)
        actions.append(float(action[0, 0]))
    changes = np.flatnonzero(np.diff(actions))
    held = np.diff(changes)
    assert held.min() == 1 and held.max() == 10 and abs(held.mean() - 5.5) < 0.6


def test_live_agent():
    collector = Collector(COUNTING, seed=0)
    live = LiveAgent(Listening(collector.codec), collector.codec, {"vector": collector.columns["vector"]})
    one = live.act(np.zeros(4, np.float32))
    assert np.shape(one) == () and collector.codec.space.contains(one)
    live.reset(3)
    assert live.act({"vector": np.zeros((3, 4))}, is_first=[True, False, False]).shape == (3,)
    with pytest.raises(ValueError, match=r"shape \(4,\), expected \(3, 4\)"):
        live.act(np.zeros(4))
    with pytest.raises(ValueError, match="lacks"):
        live.act({"picture": np.zeros((3, 4))})
    live.reset()
    with pytest.raises(ValueError, match=r"reset\(N\)"):
        live.act(np.zeros((3, 4)))


def test_collecting_at_random_needs_no_torch():
    import subprocess

    code = "import sys, raywm.collect, raywm.agent, raywm.fast; assert not {'torch', 'ray'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_sleep_keeps_its_rate():
    collector = Collector({"id": "raywm/Sleep-v0", "kwargs": {"seconds": 0.002, "length": 25}}, seed=0, envs=4)
    agent = RandomAgent(collector.codec)
    collector.play(agent, range(4))
    begin = time.monotonic()
    played = collector.play(agent, range(4))
    took = time.monotonic() - begin
    assert [p.steps for p in played] == [25] * 4
    assert 0.19 < took < 0.4  # 100 steps of 2 ms, one after the other
