import json
import threading
import time
import zlib
from collections import Counter

import gymnasium as gym
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_data import CODEC, COLUMNS, change, make

from raywm.data.batch import joined
from raywm.data.episode import to_table
from raywm.data.index import Index
from raywm.data.prefetch import Prefetch
from raywm.data.readahead import ReadAhead
from raywm.data.replay import Replay
from raywm.data.segment import DamagedError
from raywm.data.shards import allot, merge, shards_of
from raywm.data.store import EpisodeStore
from raywm.data.sumtree import SumTree
from raywm.spaces import ActionCodec


class Memory:
    """A store in memory: what a replay needs of one."""

    def __init__(self, episodes=()):
        self.lock, self.pieces, self.listeners, self.damaged = threading.RLock(), {}, [], set()
        for episode in episodes:
            self.add(episode)

    def add(self, episode, start=0, stop=None):
        with self.lock:
            stop = len(episode) if stop is None else stop
            if start == 0 and episode.id in self.pieces:
                self.drop(episode.id)
            self.pieces.setdefault(episode.id, []).append((episode.columns(), start, stop - start))
            for listener in self.listeners:
                listener.added(episode.id, stop - start, stop == len(episode))

    def drop(self, id):
        with self.lock:
            del self.pieces[id]
            for listener in self.listeners:
                listener.dropped(id)

    def parts(self, id, complete=True):
        if id in self.damaged:
            raise DamagedError(id)
        return self.pieces[id]

    def watch(self, listener):
        for id, pieces in self.pieces.items():
            for columns, start, rows in pieces:
                listener.added(id, rows, start + rows == len(columns["reward"]))
        self.listeners.append(listener)


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def starts(batch):
    """(number of the episode, row) of every sequence's first row."""
    return [tuple(row) for row in batch.obs["vector"][:, 0].long().tolist()]


def near(count, expected, sigmas=5):
    """Each count (K,) of draws within so many standard deviations of what is expected (K,) of as many draws."""
    count, expected = np.asarray(count, float), np.asarray(expected, float)
    share = expected / expected.sum()
    total = count.sum()
    assert (abs(count - total * share) <= sigmas * np.sqrt(total * share * (1 - share)) + 1e-9).all(), (count, share)


def right(batch, episodes, T, cross=False):
    """Hold every row of a batch against the episodes."""
    by_number = {e.info["number"]: e for e in episodes}
    for b, id in enumerate(batch.ids):
        length = int(batch.mask[b].sum())
        assert batch.mask[b].tolist() == [True] * length + [False] * (T - length)
        number, row = batch.obs["vector"][b, 0].long().tolist()
        assert by_number[number].id == id
        assert length == T if cross else length == min(T, len(by_number[number]))
        for t in range(length):
            n, r = batch.obs["vector"][b, t].long().tolist()
            if (n, r) != (number, row):
                assert cross and r == 0 and batch.is_first[b, t] and batch.is_last[b, t - 1]
                number, row = n, r
            e = by_number[n]
            assert np.array_equal(batch.obs["image"][b, t], e.obs["image"][r])
            assert batch.reward[b, t] == float(e.reward[r])
            assert batch.is_first[b, t] == bool(e.is_first[r]) and batch.is_terminal[b, t] == bool(e.is_terminal[r])
            if not cross or t + 1 == length:
                assert batch.is_last[b, t] == bool(e.is_last[r])
            assert batch.action[b, t].tolist() == (CODEC.encode(e.action[r]) * (r > 0)).tolist()
            row += 1
        for column in (batch.reward, batch.is_first, batch.is_last, batch.is_terminal, batch.action):
            assert not column[b, length:].any()
        assert not any(column[b, length:].any() for column in batch.obs.values())


# What is in a batch


@pytest.mark.parametrize("mode", ["steps", "episodes", "recent", "prioritized"])
@pytest.mark.parametrize("cross", [False, True])
@pytest.mark.parametrize("ends", [0.0, 0.5])
def test_every_row_is_the_one_that_was_stored(mode, cross, ends, rng):
    episodes = [make(n, 1 + n * 5 % 17) for n in range(40)]
    half_life = 100 if mode == "recent" else None
    replay = Replay(Memory(episodes), CODEC, mode, cross=cross, ends=ends, half_life=half_life)
    out = None
    for _ in range(4):  # the same tensors: what one batch left must not shine through in the next
        out = replay.sample(16, 7, rng, out=out)
        right(out, episodes, 7, cross)
        assert (out.keys is not None) == (mode == "prioritized") and 0 < out.weight.max() == 1
    assert replay.sample(3, 7, rng).obs["image"].shape == (3, 7, 4, 5, 3)
    with pytest.raises(ValueError, match="out.action is"):
        replay.sample(8, 7, rng, out=out)


def test_a_batch_is_filled_in_place(rng):
    replay = Replay(Memory([make(n) for n in range(3)]), CODEC)
    out = replay.sample(4, 6, rng)
    before = {name: tensor.data_ptr() for name, tensor in out.tensors().items()}
    assert replay.sample(4, 6, rng, out=out) is out
    assert before == {name: tensor.data_ptr() for name, tensor in out.tensors().items()}
    out.reward = torch.full_like(out.reward, 7.0)  # a tensor that was replaced is filled, not the one before it
    assert not (replay.sample(4, 6, rng, out=out).reward == 7).any()


@pytest.mark.parametrize("space", [
    gym.spaces.Box(-2, 3, (2,)),
    gym.spaces.Discrete(5, start=-1),
    gym.spaces.MultiDiscrete([2, 4]),
    gym.spaces.MultiBinary(3),
])  # fmt: skip
def test_all_action_spaces(space, rng):
    codec, base = ActionCodec(space), make(1, 20)
    action = np.stack([codec.zero(), *(codec.sample(rng) for _ in range(20))])
    episode = change(base, action=action.astype(codec.dtype))
    batch = Replay(Memory([episode]), codec).sample(8, 30, rng)
    expected = codec.encode(episode.action)
    expected[0] = 0
    assert np.array_equal(batch.action[:, :21], np.broadcast_to(expected, (8, *expected.shape)))
    assert not batch.action[:, 21:].any()
    with pytest.raises(ValueError, match="expected members") if codec.groups else pytest.raises(ValueError):
        codec.encode(np.full((3, *codec.shape), 99)) if codec.groups else codec.encode(np.zeros((3, 9)))


def test_crossing_windows_go_on_in_the_next_episode(rng):
    lengths = [5, 3, 9, 2, 6]
    store = Memory([make(n, rows - 1) for n, rows in enumerate(lengths)])
    order = [(n, r) for n, rows in enumerate(lengths) for r in range(rows)]
    replay = Replay(store, CODEC, cross=True)
    batch = replay.sample(4000, 8, rng)
    assert batch.mask.all()
    count = Counter(starts(batch))
    for b, start in enumerate(starts(batch)):
        i = order.index(start)
        assert [tuple(x) for x in batch.obs["vector"][b].long().tolist()] == order[i : i + 8]
    # every row may be the first; those with too little after them give the window of the newest rows
    near([count[row] for row in order[:18]], [1] * 17 + [8])
    assert sum(count.values()) == sum(count[row] for row in order[:18])
    with pytest.raises(ValueError, match="25 training rows in 5 episodes, expected at least 26"):
        replay.sample(1, 26, rng)
    assert replay.sample(1, 25, rng).mask.all()


def test_a_window_that_leaves_an_incomplete_episode_cuts_it(rng):
    store = Memory()
    store.add(make(0, 20), 0, 6)
    store.add(make(1, 3))
    store.add(make(2, 20), 0, 4)
    replay = Replay(store, CODEC, cross=True)
    batch = replay.sample(200, 8, rng)
    for b, (number, row) in enumerate(starts(batch)):
        last = [t for t in range(7) if batch.is_last[b, t]]
        border = [t - 1 for t in range(1, 8) if batch.is_first[b, t]]
        assert last == border and len(last) >= 1
        if number == 0:
            assert last[0] == 5 - row and not batch.is_terminal[b, last[0]]
        number, row = batch.obs["vector"][b, 7].long().tolist()
        assert batch.is_last[b, 7] == ((number, row) == (1, 3))  # the newest row of what goes on is no last one


# Laws


def test_rows_are_uniform_and_ends_are_seen_as_often_as_the_rest(rng):
    T, lengths = 6, [4, 20, 36]
    batch = Replay(Memory([make(n, rows - 1) for n, rows in enumerate(lengths)]), CODEC).sample(6000, T, rng)
    count = Counter(starts(batch))
    near([sum(v for (n, _), v in count.items() if n == i) for i in range(3)], lengths)
    # as in Snapshot.sample: the first start stands for 4 middles, the last for 3, and each other for one
    near([count[2, r] for r in range(31)], [4, *[1] * 29, 3])


def test_episodes_are_uniform(rng):
    lengths = [4, 20, 36]
    replay = Replay(Memory([make(n, rows - 1) for n, rows in enumerate(lengths)]), CODEC, "episodes")
    count = Counter(starts(replay.sample(6000, 6, rng)))
    near([sum(v for (n, _), v in count.items() if n == i) for i in range(3)], [1, 1, 1])
    near([count[2, r] for r in range(31)], [4, *[1] * 29, 3])


def test_recent_rows_weigh_twice_those_a_half_life_older(rng):
    store = Memory([make(n, 0 if n else 9) for n in range(91)])  # 10 rows, and 90 of one each
    store.add(make(200, 20), 0, 10)
    replay = Replay(store, CODEC, "recent", half_life=25, cross=True)
    count = Counter(starts(replay.sample(20000, 1, rng)))
    order = [(0, r) for r in range(10)] + [(n, 0) for n in range(1, 91)] + [(200, r) for r in range(10)]
    near([count[row] for row in order], 0.5 ** (np.arange(110)[::-1] / 25))
    store.drop(make(200).id)  # the newest are gone: draws go on, by what is left
    for n in range(80, 91):
        store.drop(make(n).id)
    count = Counter(starts(replay.sample(5000, 1, rng)))
    assert set(count) == set(order[:89])
    store.add(make(300, 0))
    assert replay.sample(500, 1, rng).ids.count(make(300).id) > 0


@pytest.mark.parametrize("mode", ["steps", "prioritized"])
@pytest.mark.parametrize("cross", [False, True])
def test_ends_are_drawn_as_often_as_asked(mode, cross, rng):
    lengths = [5, 60, 90]
    store = Memory([make(n, rows - 1) for n, rows in enumerate(lengths)])
    store.add(make(3, 200), 0, 100)  # has no end yet
    replay = Replay(store, CODEC, mode, cross=cross, ends=0.3)
    seen, ends = Counter(), 0
    for _ in range(200):
        batch = replay.sample(15, 8, rng)  # 4.5 a batch: 4 or 5
        for b in range(5):
            last = [int(n) for n, end in zip(batch.obs["vector"][b, :, 0], batch.is_last[b]) if end]
            if b < 4:
                assert last
                seen[int(batch.obs["vector"][b, 0, 0])] += 1
        ends += int(batch.is_last.any(1).sum())
    near([seen[n] for n in range(3)], [1, 1, 1])
    assert 4.4 * 200 < ends < 6.5 * 200
    assert not any(i == make(3).id for i in replay.sample(4, 8, rng).ids[:1])


def test_ends_wait_for_the_first_complete_episode(rng):
    store = Memory()
    store.add(make(0, 20), 0, 10)
    replay = Replay(store, CODEC, ends=1.0)
    assert not replay.sample(8, 4, rng).is_last.any()
    store.add(make(0, 20), 10)
    assert replay.sample(8, 4, rng).is_last[:, -1].all()
    assert not Replay(store, CODEC, ends=0.0).sample(8, 4, rng).is_last.all(0).any()


# Priorities


def test_priorities_are_sampled_in_proportion_and_weighed(rng):
    store = Memory([make(n, 9) for n in range(3)])
    replay = Replay(store, CODEC, "prioritized", alpha=0.5, beta=0.8, cross=True)
    priority = {}
    while len(priority) < 30:
        batch = replay.sample(64, 1, rng)
        new = [float(1 + (n * 10 + r) ** 2) for n, r in starts(batch)]
        replay.update(batch.keys, new)
        priority |= dict(zip(starts(batch), new))
    rows = sorted(priority)
    p = np.array([priority[row] for row in rows]) ** 0.5
    p /= p.sum()
    count = Counter()
    for _ in range(50):
        batch = replay.sample(100, 1, rng)
        count.update(starts(batch))
        expected = np.array([(30 * p[rows.index(row)]) ** -0.8 for row in starts(batch)])
        assert np.allclose(batch.weight, expected / expected.max(), rtol=1e-4)
    near([count[row] for row in rows], p)
    assert replay.mass == pytest.approx(sum(v**0.5 for v in priority.values()), rel=1e-5)

    replay.update(batch.keys[:1], [1e6])
    store.add(make(3, 9))  # new rows: as likely as the likeliest so far
    count = Counter(starts(replay.sample(2200, 1, rng)))
    near([*(count[3, r] for r in range(10)), count[starts(batch)[0]]], [1] * 11)


def test_priorities_of_what_is_gone_are_passed_over(rng):
    store = Memory([make(n, 9) for n in range(4)])
    replay = Replay(store, CODEC, "prioritized")
    batch = replay.sample(40, 3, rng)
    store.drop(make(0).id)  # the oldest, and one in the middle
    store.drop(make(2).id)
    replay.update(batch.keys, np.full(40, 5.0))
    assert set(replay.sample(200, 3, rng).ids) == {make(1).id, make(3).id}
    for n in range(10, 3000):  # far round the tree
        store.add(make(n, 9))
        if n >= 16:
            store.drop(make(n - 6).id)
    store.drop(make(1).id)
    store.drop(make(3).id)
    replay.update(batch.keys, np.full(40, 1e9))
    assert set(replay.sample(500, 3, rng).ids) == {make(n).id for n in range(2994, 3000)}
    # the 60 rows that are left have what was the largest priority, and 1e9 is none of theirs
    assert replay.mass == pytest.approx(60 * 5.0**0.6, rel=1e-4) and replay._tree.size > 29_000


def test_a_growing_tree_keeps_priorities(rng):
    store = Memory([make(0, 9)])
    replay = Replay(store, CODEC, "prioritized", cross=True, alpha=1.0)
    batch = replay.sample(200, 1, rng)
    replay.update(batch.keys, [float(10 + r) for _, r in starts(batch)])
    before = replay._tree[np.arange(10)].copy()
    assert sorted(before) == pytest.approx(np.arange(10, 20), rel=1e-4)
    for n in range(1, 40):
        store.add(make(n, 299))
    assert replay._tree.size > 11000 and np.array_equal(replay._tree[np.arange(10)], before)
    assert replay.mass == pytest.approx(before.sum() + 39 * 300 * 19, rel=1e-4)


def test_keys_of_ends_are_those_of_their_first_rows(rng):
    for cross in (False, True):
        store = Memory()
        for a in range(0, 30, 4):  # two episodes, their pieces one after the other's
            store.add(make(0, 29), a, min(a + 4, 30))
            store.add(make(1, 29), a, min(a + 4, 30))
        replay = Replay(store, CODEC, "prioritized", ends=0.5, cross=cross)
        batch = replay.sample(40, 7, rng)
        slot, row = replay._train.find(batch.keys[:20])
        assert [(s, r) for s, r in zip(slot.tolist(), row.tolist())] == starts(batch)[:20]
        if cross:
            slot, row = replay._train.find(batch.keys[20:])
            moved = [s != w for s, w in zip(zip(slot.tolist(), row.tolist()), starts(batch)[20:])]
            assert sum(moved) < 8


def test_wrong_priorities_say_so(rng):
    store = Memory([make(0)])
    replay = Replay(store, CODEC, "prioritized")
    keys = replay.sample(2, 3, rng).keys
    for bad in ([np.nan, 1], [-1, 1], [np.inf, 0]):
        with pytest.raises(ValueError, match="finite numbers >= 0"):
            replay.update(keys, bad)
    with pytest.raises(ValueError, match="expected .N,. of both"):
        replay.update(keys, [1.0])
    with pytest.raises(ValueError, match="mode='prioritized'"):
        Replay(store, CODEC).update(keys, [1.0, 1.0])
    replay.update(keys, [0.0, 0.0])
    assert replay.mass > 0


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_a_sum_tree_is_its_brute_force(data):
    size = data.draw(st.sampled_from([1, 5, 64, 65, 1000, 5000]))
    tree, brute = SumTree(size), np.zeros(size)
    for _ in range(data.draw(st.integers(1, 8))):
        leaves = np.array(data.draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=20, unique=True)))
        values = data.draw(st.lists(st.floats(0, 1e4, width=32), min_size=len(leaves), max_size=len(leaves)))
        tree.set(leaves, np.array(values))
        brute[leaves] = values
    assert np.array_equal(tree[np.arange(size)], brute.astype(np.float32))
    assert tree.total == pytest.approx(brute.sum(), rel=1e-9)
    if brute.sum() > 0:
        mass = np.random.default_rng(0).random(50) * tree.total
        found, ends = tree.find(mass), np.cumsum(brute)
        assert (brute[found] > 0).all()
        slack = 1e-9 * tree.total
        assert (mass <= ends[found] + slack).all() and (mass >= ends[found] - brute[found] - slack).all()


# The index


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 12), st.integers(1, 9), st.booleans(), st.booleans()), max_size=150), st.randoms()
)
def test_an_index_is_its_brute_force(events, random):
    index, rows, gone = Index(), {}, set()  # rows: id -> keys in order
    complete, begun, key = set(), [], 0
    for number, n, last, drop in events:
        id = f"e{number}"
        if drop or id in complete:
            got = {k for first, many in index.drop(id) for k in range(first, first + many)}
            assert got == set(rows.pop(id, []))
            gone |= got
            complete.discard(id)
            begun = [b for b in begun if b != id]
        else:
            assert index.add(id, n, last) == key
            rows.setdefault(id, []).extend(range(key, key + n))
            key += n
            begun += [id] if id not in begun else []
            complete |= {id} if last else set()
        if random.random() < 0.1:
            index.compact()
    assert index.rows == sum(map(len, rows.values())) and len(index) == len(rows) and index.collected == key
    rng = np.random.default_rng(0)
    if rows:
        slot, row = index.draw_rows(lambda n, N: rng.integers(N, size=n), 50)
        for s, r in zip(slot.tolist(), row.tolist()):
            assert index.key(s, r) == rows[index.ids[s]][r]
            n = random.randint(1, len(rows[index.ids[s]]) - r)
            assert index.keys(s, r, n).tolist() == rows[index.ids[s]][r : r + n]
        for id, keys in rows.items():
            slot, row = index.find(np.array(keys))
            assert {index.ids[s] for s in slot.tolist()} == {id} and row.tolist() == list(range(len(keys)))
        assert index.oldest == min(k for keys in rows.values() for k in keys)
        assert {index.ids[s] for s in index.draw_episodes(200, rng).tolist()} == set(rows)
        assert {index.ids[s] for s in index.draw_ends(200, rng).tolist()} == complete
        flat = [(id, r) for id in begun for r in range(len(rows[id]))]
        i, T = random.randrange(len(flat)), random.randint(1, len(flat))
        id, r = flat[i]
        spans = index.spans(index.slots[id], r, T)
        got = [(index.ids[s], x) for s, first, n in spans for x in range(first, first + n)]
        i = min(i, len(flat) - T)
        assert got == flat[i : i + T]


def test_a_day_of_appends_does_not_grow():
    """10,000 episodes pass through a store of 200, interleaved by eights: what is kept follows what is stored."""
    index, kept = Index(), []
    for n in range(0, 10_000, 8):
        for piece in range(3):
            for k in range(8):
                index.add(f"e{n + k}", 7, piece == 2)
        kept += range(n, n + 8)
        for k in kept[:-200]:
            index.drop(f"e{k}")
        kept = kept[-200:]
        assert index.rows == 21 * len(kept) and index.pieces.size < 3 * 500 and len(index.ids) < 500
    assert index.collected == 210_000 and all(len(c) < 3000 for c in index.pieces._columns.values())
    assert set(index.slots) == {f"e{k}" for k in kept}


# What a model knows of the rows


def known_rows(batch):
    """(B, T, 2) the number of the episode and the row of every row, and the flat keys and states of all but context."""
    who = batch.obs["vector"]
    return batch.rows[:, 1:].reshape(-1), {"who": who[:, 1:].flatten(0, 1).clone().numpy()}


def check(batch, context=1):
    """Hold what is stored against the rows it belongs to. Returns how many sequences had something."""
    if batch.stored is None:
        return 0
    last = batch.obs["vector"][:, context - 1]
    assert torch.equal(batch.stored["who"][batch.known], last[batch.known])
    assert not batch.stored["who"][~batch.known].any()
    return int(batch.known.sum())


@pytest.mark.parametrize("cross", [False, True])
@pytest.mark.parametrize("mode", ["steps", "prioritized"])
def test_states_come_back_with_the_rows_they_were_written_for(mode, cross, rng):
    store = Memory()
    replay = Replay(store, CODEC, mode, cross=cross, context=1)
    episodes = [make(n, 5 + n % 20) for n in range(40)]
    for first in range(0, 40, 8):  # interleaved, in pieces of 3 rows
        for start in range(0, 27, 3):
            for episode in episodes[first : first + 8]:
                if start < len(episode):
                    store.add(episode, start, min(start + 3, len(episode)))
    batch = replay.sample(16, 8, rng)
    assert batch.stored is None and batch.known is None and batch.rows.shape == (16, 8)
    assert (batch.rows == -1).sum() == (~batch.mask).sum()
    seen = [check(batch)]
    for _ in range(60):
        replay.write(*known_rows(batch))
        batch = replay.sample(16, 8, rng, out=batch)
        seen.append(check(batch))
    assert seen[1] < 16 and sum(seen[-10:]) > 100


def test_the_last_row_of_the_context_counts(rng):
    store = Memory([make(n, 30) for n in range(4)])
    replay = Replay(store, CODEC, cross=True, context=3)
    for _ in range(30):
        batch = replay.sample(8, 7, rng)
        check(batch, 3)
        replay.write(batch.rows[:, 3:].reshape(-1), {"who": batch.obs["vector"][:, 3:].flatten(0, 1).clone().numpy()})
    assert check(replay.sample(50, 7, rng), 3) > 20
    with pytest.raises(ValueError, match="sequences of 3 rows, expected more than the 3 of context"):
        replay.sample(8, 3, rng)


def test_states_of_what_is_gone_are_forgotten(rng):
    """The chunks of evicted rows are freed; what comes late for them is passed over, and meets no other row."""
    store = Memory()
    replay, late = Replay(store, CODEC, cross=True, context=1), []
    for n in range(400):
        store.add(make(n, 99))
        if n >= 100:
            store.drop(make(n - 100).id)
        if n > 2:
            batch = replay.sample(16, 60, rng)
            check(batch)
            late.append(known_rows(batch))
        if len(late) > 30:
            replay.write(*late.pop(0))
    rows = 10_000 + 2 * 4096  # and two chunks that are partly gone
    assert 0 < replay.latent_bytes <= rows * 9
    assert check(replay.sample(200, 20, rng)) > 100
    for n in range(300, 400):
        store.drop(make(n).id)
    assert replay.latent_bytes == 0
    for told in late:
        replay.write(*told)
    assert replay.latent_bytes == 0


def test_states_of_another_replay_are_passed_over(rng):
    """One that is made again with another number, as of a shard that was restarted, has its rows at other keys."""
    store = Memory([make(n, 20) for n in range(9)])
    before = Replay(store, CODEC, cross=True, context=1, shard=1)
    old = before.sample(64, 10, rng)
    store.drop(make(0).id)
    after = Replay(store, CODEC, cross=True, context=1, shard=3)
    after.write(*known_rows(old))
    assert after.latent_bytes == 0 and not after.sample(8, 10, rng).known.any()
    new = after.sample(64, 10, rng)
    after.write(*known_rows(new))
    after.write(np.full(3, -1), {"who": np.ones((3, 2), np.float32)})  # padding
    parts = [after.sample(32, 10, rng), before.sample(32, 10, rng)]
    both = merge(parts)
    assert set(shards_of(both.rows).flatten().tolist()) == {1, 3}
    assert check(both) > 5 and not both.known[32:].any()
    assert merge(parts[::-1]).known.tolist() == [False] * 32 + parts[0].known.tolist()


def test_states_that_do_not_fit_are_refused(rng):
    replay = Replay(Memory([make(0, 20)]), CODEC, context=1)
    keys, states = known_rows(replay.sample(4, 6, rng))
    replay.write(keys, states)
    with pytest.raises(ValueError, match=r"got states .*\(3,\).*expected.*\(2,\)"):
        replay.write(keys, {"who": np.zeros((20, 3), np.float32)})
    with pytest.raises(ValueError, match="expected 20, as many"):
        replay.write(keys, {"who": states["who"][:5]})
    with pytest.raises(ValueError, match=r"context=1\) keeps states"):
        Replay(Memory([make(0, 20)]), CODEC).write(keys, states)
    with pytest.raises(ValueError, match="context=-1"):
        Replay(Memory(), CODEC, context=-1)


# Held-out episodes, incomplete ones, damage


@pytest.mark.parametrize("mode", ["steps", "prioritized"])
def test_held_out_episodes_are_never_trained_on(mode, rng):
    episodes = [make(n, 5) for n in range(200)]
    replay = Replay(Memory(episodes), CODEC, mode, held_out=0.2, cross=True)
    held = {e.id for e in episodes if zlib.crc32(e.id.encode()) / 2**32 < 0.2}
    seen = replay.sample(3000, 8, rng)
    there = replay.sample(3000, 8, rng, held=True)
    every = [{make(int(n)).id for n in b.obs["vector"][..., 0].flatten().tolist()} for b in (seen, there)]
    assert every[1] == held and every[0] == {e.id for e in episodes} - held
    assert replay.episodes == 200 - len(held) and len(replay) == 6 * replay.episodes
    with pytest.raises(ValueError, match="0 held-out rows"):
        Replay(Memory(episodes), CODEC).sample(1, 1, rng, held=True)


def test_what_has_come_of_an_episode_can_be_sampled(rng):
    store = Memory()
    eager, patient = Replay(store, CODEC), Replay(store, CODEC, include_incomplete=False)
    with pytest.raises(ValueError, match="0 training rows in 0 episodes, expected at least 1; collect"):
        eager.sample(1, 1, rng)
    store.add(make(0, 20), 0, 7)
    batch = eager.sample(50, 4, rng)
    assert batch.obs["vector"][..., 1].max() == 6 and not batch.is_last.any() and len(patient) == 0
    store.add(make(0, 20), 7, 14)
    store.add(make(1, 3))
    assert len(eager) == 18 and len(patient) == 4
    store.add(make(0, 20), 14)
    assert len(eager) == len(patient) == 25
    right(patient.sample(100, 6, rng), [make(0, 20), make(1, 3)], 6)
    store.add(make(0, 20), 0, 5)  # begun again
    assert len(eager) == 9 and len(patient) == 4
    assert eager.sample(100, 6, rng).obs["vector"][..., 1].max() == 4


def test_damaged_episodes_are_passed_over(rng):
    store = Memory([make(n) for n in range(4)])
    replay = Replay(store, CODEC, "prioritized")
    store.damaged.add(make(2).id)
    assert set(replay.sample(100, 4, rng).ids) == {make(n).id for n in (0, 1, 3)} and len(replay) == 39
    store.damaged |= set(store.pieces)
    with pytest.raises(ValueError, match="0 training rows"):
        replay.sample(1, 4, rng)


def test_adding_evicting_and_sampling_take_turns(rng):
    store, stop, wrong = Memory([make(n, 9) for n in range(20)]), threading.Event(), []
    replay = Replay(store, CODEC, "prioritized", cross=True, ends=0.2)

    def add():
        for n in range(20, 100_000):
            if stop.is_set():
                return
            store.add(make(n, 9), 0, 4)
            store.add(make(n, 9), 4)
            store.drop(make(n - 20).id)

    def sample(seed):
        try:
            mine, out = np.random.default_rng(seed), None
            while not stop.is_set():
                out = replay.sample(8, 12, mine, out=out)
                replay.update(out.keys, mine.random(8))
                for b in range(8):
                    right_rows = out.obs["vector"][b].long()
                    assert (out.is_first[b] == (right_rows[:, 1] == 0)).all()
                    assert (right_rows[1:, 1] == (right_rows[:-1, 1] + 1) * ~out.is_first[b, 1:]).all()
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=add)] + [threading.Thread(target=sample, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    time.sleep(1.0)
    stop.set()
    for thread in threads:
        thread.join()
    assert not wrong, wrong[0]


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"mode": "priorized"}, "did you mean 'prioritized'"),
        ({"mode": "recent"}, "half_life=None"),
        ({"half_life": 5.0}, "expected rows > 0 with 'recent'"),
        ({"ends": 1.5}, r"ends=1.5, expected a number in \[0, 1\]"),
        ({"held_out": -0.1}, "held_out=-0.1"),
    ],
)
def test_arguments_that_make_no_sense_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        Replay(Memory(), CODEC, **arguments)


def test_empty_batches_are_refused(rng):
    with pytest.raises(ValueError, match="0 sequences of 3 rows"):
        Replay(Memory([make(0)]), CODEC).sample(0, 3, rng)


# Resuming


def ids(replay, rng):
    return set(replay.sample(600, 2, rng).ids) if len(replay) else set()


def test_a_resumed_replay_does_not_see_the_future(rng):
    store = Memory([make(n, 5) for n in range(100)])
    store.add(make(100, 9), 0, 4)  # under way at the mark
    first = Replay(store, CODEC)
    mark = json.loads(json.dumps(first.mark))
    for n in (*range(101, 120), 7):
        store.add(make(n, 5)) if n != 7 else None
    store.add(make(100, 9), 4)
    resumed = Replay(store, CODEC, until=mark)
    assert len(resumed) == 604 and ids(resumed, rng) <= {make(n).id for n in range(101)}
    assert make(100).id in ids(resumed, rng) and resumed.sample(600, 9, rng).obs["vector"][..., 1].max() <= 5
    store.add(make(500, 5))  # what comes now is no future
    assert make(500).id in ids(resumed, rng) and len(resumed) == 610 and make(110).id not in ids(resumed, rng)
    resumed.release()
    assert len(resumed) == 610 + 19 * 6 + 6 == len(first) and make(110).id in ids(resumed, rng)
    right(resumed.sample(50, 9, rng), [make(n, 9 if n == 100 else 5) for n in range(501)], 9)


@pytest.mark.parametrize("include_incomplete", [True, False])
def test_a_mark_holds_after_evictions_and_second_beginnings(include_incomplete, rng):
    store = Memory([make(n, 5) for n in range(100)])
    store.add(make(1000, 9), 0, 4)
    mark = Replay(store, CODEC, include_incomplete=include_incomplete).mark
    for n in range(100, 120):
        store.add(make(n, 5))
    for n in (*range(95), 97):
        store.drop(make(n).id)
    store.add(make(97, 5))  # damaged, and collected again
    for n in (1000, 1001):  # begun again, as a resumed run does with what was under way
        store.add(make(n, 9), 0, 4)
        store.add(make(n, 9), 4)
    resumed = Replay(store, CODEC, until=mark, include_incomplete=include_incomplete)
    past = {make(n).id for n in (95, 96, 98, 99)}
    assert ids(resumed, rng) - {make(1000).id} == past and len(resumed) == 24 + 4 * include_incomplete
    for n in (95, 96, 98, 99):
        store.drop(make(n).id)
    with pytest.warns(UserWarning, match="all of it counts as later"):
        assert len(Replay(store, CODEC, until=mark, include_incomplete=False)) == 0
    resumed.release()
    assert len(resumed) == 20 * 6 + 6 + 20
    store.add(make(1001, 9), 0, 3)
    assert len(Replay(store, CODEC, until=Replay(Memory(), CODEC).mark)) == 0


def test_the_mark_of_a_resumed_replay_counts_what_was_set_aside_as_past(rng):
    store = Memory([make(n, 5) for n in range(10)])
    mark = Replay(store, CODEC).mark
    for n in range(10, 14):
        store.add(make(n, 5))
    resumed = Replay(store, CODEC, until=mark)
    store.add(make(20, 5))
    mark = resumed.mark
    store.add(make(21, 5))
    assert ids(Replay(store, CODEC, until=mark), rng) == {make(n).id for n in (*range(14), 20)}


# With the store on disk


def test_a_replay_of_a_store_on_disk(tmp_path, rng):
    episodes = [make(n, 5 + n % 20) for n in range(60)]
    with EpisodeStore(tmp_path, COLUMNS, CODEC, segment_bytes=20_000, capacity_bytes=60_000) as store:
        replay = Replay(store, CODEC, "prioritized", cross=True)
        out = None
        for a in range(0, 60, 4):
            group = episodes[a : a + 4]  # side by side, in pieces of 6
            for row in range(0, 25, 6):
                for e in group:
                    if row < len(e):
                        store.add(to_table(e, row, row + 6))
                out = replay.sample(8, 9, rng, out=out) if len(replay) > 9 else None
                if out is not None:
                    right(out, episodes, 9, cross=True)
                    replay.update(out.keys, rng.random(8))
        assert len(replay) == sum(len(store.get(id)) for id in store.ids()) < 800
        mark = replay.mark
        stored = set(store.ids())
        for n in range(100, 105):
            store.add(make(n, 6))
        left = set(store.ids()) & stored
    with EpisodeStore(tmp_path, COLUMNS, CODEC) as again:
        resumed = Replay(again, CODEC, until=mark)
        assert ids(resumed, rng) == left and len(again) == len(left) + 5
        path = again.segments()[-1]
        resumed.release()
        assert len(resumed) == sum(len(again.get(id)) for id in again.ids())
    data = bytearray(path.read_bytes())
    data[data.index(make(104, 6).obs["vector"].tobytes())] ^= 1
    path.write_bytes(data)
    with EpisodeStore(tmp_path, COLUMNS, CODEC) as again, pytest.warns(UserWarning):
        replay = Replay(again, CODEC)
        for _ in range(5):
            assert make(104).id not in replay.sample(100, 4, rng).ids
        assert make(104).id not in again.ids()


def test_reading_ahead_begins_with_a_fault_and_ends_without(rng):
    ahead = ReadAhead()
    assert not ahead.cold
    ahead.copied(ahead.count() - 3)  # as if three pages had come from disk
    assert ahead.cold and ahead.faults == 3
    ahead.ask(make(0).obs["image"])
    ahead.ask(make(0).obs["image"][::2])
    for _ in range(16):
        assert ahead.cold
        ahead.copied(ahead.count())
    assert not ahead.cold
    episodes = [make(n) for n in range(4)]
    replay = Replay(Memory(episodes), CODEC)
    replay._ahead.copied(replay._ahead.count() - 1)
    right(replay.sample(8, 5, rng), episodes, 5)


# Shards


def test_allotments_are_exact_on_average_and_never_off_by_one(rng):
    masses = np.array([0.0, 1000.0, 1.0, 333.0, 0.0, 77.0, 0.0])
    share = 16 * masses / masses.sum()
    counts = np.array([allot(16, masses, rng) for _ in range(4000)])
    assert (counts.sum(1) == 16).all() and (abs(counts - share) < 1).all()
    assert np.allclose(counts.mean(0), share, atol=0.04) and counts[:, 2].max() == 1
    for bad in ([], [0.0, 0.0], [1.0, -1.0], [np.nan]):
        with pytest.raises(ValueError, match="masses"):
            allot(4, bad, rng)


def test_shards_together_are_one_prioritised_replay(rng):
    stores = [Memory([make(n, 9) for n in numbers]) for numbers in ([0, 1, 2], [3], [4, 5])]
    replays = [Replay(s, CODEC, "prioritized", alpha=1.0, beta=1.0, cross=True, shard=i) for i, s in enumerate(stores)]
    for k, replay in enumerate(replays):
        batch = replay.sample(300, 1, rng)
        for other in replays:  # keys of other shards are not theirs
            other.update(batch.keys, np.full(300, 1.0 + k))
    masses = [replay.mass for replay in replays]
    assert np.allclose(masses, [30, 20, 60], rtol=0.01)
    density = sum(map(len, replays)) / sum(masses)
    count, out = Counter(), None
    for _ in range(100):
        parts = [
            replay.sample(int(n), 1, rng, density=density) for replay, n in zip(replays, allot(22, masses, rng)) if n
        ]
        out = merge(parts, out)
        assert out.weight.max() == 1 and len(out.ids) == 22
        number = out.obs["vector"][:, 0, 0].long()
        assert shards_of(out.keys).tolist() == [[0, 0, 0, 1, 2, 2][n] for n in number.tolist()]
        p = torch.tensor([1.0, 1, 1, 2, 3, 3])[number]
        assert torch.allclose(out.weight, p.min() / p, rtol=1e-3)
        count.update(number.tolist())
    near([count[n] for n in range(6)], [1, 1, 1, 2, 3, 3])
    assert joined(parts).obs["image"].shape == (22, 1, 4, 5, 3)
    with pytest.raises(ValueError, match="expected"):
        merge(parts[:1], out)


# Prefetching


def test_prefetched_batches_are_those_sampled_directly():
    store = Memory([make(n) for n in range(9)])
    direct, rng = Replay(store, CODEC, ends=0.2), np.random.default_rng(3)
    with Prefetch(Replay(store, CODEC, ends=0.2), 4, 6, np.random.default_rng(3), depth=3) as ahead:
        held = []
        for _ in range(30):
            batch, expected = ahead.next(), direct.sample(4, 6, rng)
            held = [*held[-2:], (batch, {n: t.clone() for n, t in expected.tensors().items()}, expected.ids)]
            for mine, theirs, names in held:  # the batches of depth - 1 calls ago still stand
                assert mine.ids == names and all(torch.equal(t, theirs[n]) for n, t in mine.tensors().items())
        time.sleep(0.1)
        assert len({id(b) for b, *_ in held}) == 3 and len(ahead._ready) == 3
        buffers = {id(ahead.next()) for _ in range(40)}
        assert len(buffers) <= 6 and ahead.waited >= 0
    with pytest.raises(ValueError, match="closed"):
        ahead.next()


class Broken:
    def __init__(self, replay, after, block=None):
        self.replay, self.left, self.block = replay, after, block

    def sample(self, B, T, rng, out=None):
        if self.left == 0:
            if self.block is not None:
                self.block.wait(20)
            raise RuntimeError("the source broke")
        self.left -= 1
        return self.replay.sample(B, T, rng, out)


def test_what_the_source_raises_comes_out_of_next(rng):
    ahead = Prefetch(Broken(Replay(Memory([make(0)]), CODEC), 5), 2, 3, rng)
    for _ in range(5):
        ahead.next()
    for _ in range(2):
        with pytest.raises(RuntimeError, match="the source broke"):
            ahead.next()
    ahead.close()
    with pytest.raises(ValueError, match="depth=0"):
        Prefetch(Replay(Memory(), CODEC), 1, 1, rng, depth=0)


def test_closing_wakes_who_waits(rng):
    block = threading.Event()
    ahead = Prefetch(Broken(None, 0, block), 2, 3, rng)
    raised = []

    def wait():
        try:
            ahead.next()
        except ValueError as error:
            raised.append(error)

    thread = threading.Thread(target=wait)
    thread.start()
    time.sleep(0.05)
    threading.Timer(0.1, block.set).start()
    began = time.perf_counter()
    ahead.close()
    thread.join(5)
    assert raised and not thread.is_alive() and time.perf_counter() - began < 5 and ahead.waited > 0.01
    ahead.close()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_batches_arrive_on_the_gpu():
    store = Memory([make(n) for n in range(9)])
    direct, rng = Replay(store, CODEC), np.random.default_rng(3)
    with Prefetch(Replay(store, CODEC), 4, 6, np.random.default_rng(3), device="cuda") as ahead:
        kept = [(ahead.next(), direct.sample(4, 6, rng)) for _ in range(20)]
        for mine, theirs in kept:
            assert mine.ids == theirs.ids
            assert all(t.is_cuda and torch.equal(t.cpu(), theirs.tensors()[n]) for n, t in mine.tensors().items())
