import errno
import os
import subprocess
import sys
import warnings
import zlib

import gymnasium as gym
import numpy as np
import pyarrow as pa
import pytest
import torch

from raywm.data import lineage as lineage_module
from raywm.data import segment as segment_module
from raywm.data.episode import (
    Episode,
    from_block,
    from_table,
    join,
    piece_header,
    table_meta,
    to_block,
    to_table,
    validate,
)
from raywm.data.store import DamagedError, EpisodeStore, Snapshot
from raywm.spaces import ActionCodec

COLUMNS = {
    "image": gym.spaces.Box(0, 255, (4, 5, 3), np.uint8),
    "vector": gym.spaces.Box(-np.inf, np.inf, (2,), np.float32),
}
CODEC = ActionCodec(gym.spaces.Discrete(3))


def make(number, steps=12, terminal=None, prefix="e", **info):
    """An episode whose every cell tells its number and row."""
    rows, row = steps + 1, np.arange(steps + 1)
    last = row == steps
    return Episode(
        id=f"{prefix}-{number:06d}",
        obs={
            "vector": np.stack([np.full(rows, number), row], 1).astype(np.float32),
            "image": np.broadcast_to(((number * 31 + row) % 256)[:, None, None, None], (rows, 4, 5, 3)).astype(
                np.uint8
            ),
        },
        action=np.where(row > 0, (number + row) % 3, 0),
        reward=np.where(row > 0, number + row / 8, 0).astype(np.float32),
        is_first=row == 0,
        is_last=last,
        is_terminal=last & (number % 2 == 0 if terminal is None else terminal),
        info={"number": number, **info},
    )


def same(a, b):
    assert a.id == b.id and a.info == b.info
    for name, column in a.columns().items():
        assert b.columns()[name].dtype == column.dtype, name
        assert np.array_equal(b.columns()[name], column), name


def change(episode, **changes):
    return Episode(**(vars(episode) | changes))


def changed(column, row, value):
    column = column.copy()
    column[row] = value
    return column


@pytest.fixture
def store(tmp_path):
    with EpisodeStore(tmp_path / "store", COLUMNS, CODEC) as store:
        yield store


# Episodes


def test_a_table_gives_the_episode_back_without_copies():
    episode = make(3, level=2)
    assert episode.steps == 12 and len(episode) == 13 and episode.ret == pytest.approx(float(episode.reward.sum()))
    table = to_table(episode)
    again = from_table(table)
    same(episode, again)
    for name in ("image", "vector"):
        assert np.shares_memory(again.obs[name], episode.obs[name])
    piece = to_table(episode, 4, 9)
    assert (
        table_meta(piece)["pieces"][0]["first_row"] == 4
        and from_table(piece).reward.tolist() == episode.reward[4:9].tolist()
    )
    assert from_table(table.slice(4, 5)).obs["image"].tolist() == episode.obs["image"][4:9].tolist()
    chunks = pa.concat_tables([to_table(episode, 0, 6), to_table(episode, 6)])
    same(episode, from_table(chunks.replace_schema_metadata(table.schema.metadata)))
    with pytest.raises(ValueError, match="to_table"):
        from_table(table.replace_schema_metadata(None))


def test_continuous_actions_and_odd_shapes_survive_a_table():
    plain = make(1)
    rows = len(plain)
    for action in (np.ones((rows, 2), np.float32), np.ones((rows, 2, 3)), np.ones((rows, 4), np.int8)):
        episode = change(plain, action=action)
        same(episode, from_table(to_table(episode)))


E = make(5)
WRONG = {
    "reward .*NaN": change(E, reward=changed(E.reward, 4, np.nan)),
    "row 7: obs.vector is NaN": change(E, obs=E.obs | {"vector": changed(E.obs["vector"], 7, np.inf)}),
    "13 rows|12 rows": change(E, action=E.action[1:]),
    "row 0: is_first is False": change(E, is_first=E.is_first & False),
    "row 3: is_first is True": change(E, is_first=changed(E.is_first, 3, True)),
    "row 12: is_last is False": change(E, is_last=E.is_last & False),
    "row 6: is_last is True": change(E, is_last=changed(E.is_last, 6, True)),
    "row 6: is_terminal": change(E, is_terminal=changed(E.is_terminal, 6, True)),
    "row 0: reward is": change(E, reward=changed(E.reward, 0, 1.0)),
    "float64.*expected float32": change(E, reward=E.reward.astype(np.float64)),
    "image.*expected uint8": change(E, obs=E.obs | {"image": E.obs["image"][:, :3]}),
    "expected \\['image', 'vector'\\]": change(E, obs={"vector": E.obs["vector"]}),
    "action is": change(E, action=E.action.astype(np.float32)),
    "expected bool": change(E, is_last=E.is_last.astype(np.uint8)),
    "expected a non-empty string": change(E, id=""),
}


@pytest.mark.parametrize("message", WRONG)
def test_what_breaks_the_timing_rule_is_refused_by_name_and_row(message, store):
    validate(E, COLUMNS, CODEC)
    with pytest.raises(ValueError, match=message):
        validate(WRONG[message], COLUMNS, CODEC)
    with pytest.raises(ValueError, match=message):
        store.add(WRONG[message])
    assert len(store) == 0 and store.add(E)


# Snapshots


def test_a_snapshot_is_ordered_and_samples_what_is_there():
    snapshot = Snapshot([make(n, 3 + n) for n in (4, 0, 9, 2)], CODEC)
    assert snapshot.ids == sorted(snapshot.ids) and snapshot.rows == 31 and snapshot.steps == 27
    batch = snapshot.sample(64, 8, np.random.default_rng(0))
    by_id = {e.id: e for e in snapshot.episodes}
    assert batch.obs["image"].shape == (64, 8, 4, 5, 3) and batch.obs["image"].dtype == torch.uint8
    assert batch.action.shape == (64, 8, 3) and batch.action.dtype == torch.float32 and batch.start is None
    assert batch.weight.tolist() == [1.0] * 64 and not batch.mask.all() and batch.mask[:, 0].all()
    for b, id in enumerate(batch.ids):
        episode, length = by_id[id], int(batch.mask[b].sum())
        assert batch.mask[b].tolist() == [True] * length + [False] * (8 - length)
        assert length == min(8, len(episode))
        start = int(batch.obs["vector"][b, 0, 1])
        rows = slice(start, start + length)
        assert np.array_equal(batch.obs["vector"][b, :length], episode.obs["vector"][rows])
        assert np.array_equal(batch.obs["image"][b, :length], episode.obs["image"][rows])
        assert np.array_equal(batch.reward[b, :length], episode.reward[rows])
        for flag in ("is_first", "is_last", "is_terminal"):
            assert np.array_equal(getattr(batch, flag)[b, :length], getattr(episode, flag)[rows])
            assert not getattr(batch, flag)[b, length:].any()
        expected = CODEC.encode(episode.action[rows])
        expected[episode.is_first[rows]] = 0
        assert np.array_equal(batch.action[b, :length], expected)
        for padded in (batch.action, batch.reward, *batch.obs.values()):
            assert not padded[b, length:].any()
    moved = batch.to("cpu")
    assert moved.ids == batch.ids and moved.obs.keys() == batch.obs.keys()


def test_sampling_is_uniform_over_steps_and_sees_the_ends():
    T, lengths = 6, [4, 20, 36]
    snapshot = Snapshot([make(n, rows - 1) for n, rows in enumerate(lengths)], CODEC)
    rng, B = np.random.default_rng(0), 6000
    batch = snapshot.sample(B, T, rng)
    number = batch.obs["vector"][:, 0, 0].long()
    share = torch.bincount(number, minlength=3) / B
    assert torch.allclose(share, torch.tensor(lengths) / sum(lengths), atol=0.03)
    starts = batch.obs["vector"][number == 2, 0, 1].long()
    count = torch.bincount(starts, minlength=31) / len(starts)
    # u is uniform in [-3, 33): four values of it give the first start, three the last, and one each other
    assert len(count) == 31 and abs(count[0] - 4 / 36) < 0.02 and abs(count[30] - 3 / 36) < 0.02
    assert (abs(count[1:30] - 1 / 36) < 0.012).all()


def test_the_same_generator_gives_the_same_batch_from_snapshot_and_store(store):
    for n in (5, 1, 3):
        store.add(make(n))
    a = store.sample(8, 5, np.random.default_rng(4))
    b = store.snapshot().sample(8, 5, np.random.default_rng(4))
    assert a.ids == b.ids and torch.equal(a.obs["vector"], b.obs["vector"]) and torch.equal(a.action, b.action)


def test_precomputed_columns_replace_the_observations():
    snapshot = Snapshot([make(n, 3 + n) for n in range(5)], CODEC)
    latents = [{"mu": e.obs["vector"] + 0.5} for e in snapshot.episodes]
    plain = snapshot.sample(16, 6, np.random.default_rng(0))
    batch = snapshot.sample(16, 6, np.random.default_rng(0), obs=latents)
    assert set(batch.obs) == {"mu"} and batch.ids == plain.ids
    assert torch.equal(batch.obs["mu"], (plain.obs["vector"] + 0.5) * plain.mask[..., None])
    with pytest.raises(ValueError, match="expected 5"):
        snapshot.sample(2, 2, np.random.default_rng(0), obs=latents[1:])


def test_frames_are_uniform_over_rows():
    snapshot = Snapshot([make(n, 3 + 9 * n) for n in range(3)], CODEC)
    frames = snapshot.frames("image", 500, np.random.default_rng(0))
    assert frames.shape == (500, 4, 5, 3) and frames.dtype == torch.uint8
    rows = snapshot.frames("vector", 4000, np.random.default_rng(0))
    seen = torch.bincount(rows[:, 0].long() * 100 + rows[:, 1].long())
    assert (seen > 0).sum() == snapshot.rows and seen.max() < 160
    with pytest.raises(ValueError, match="expected one of"):
        snapshot.frames("pixels", 1, np.random.default_rng(0))


def test_the_split_is_stable_and_leaves_nothing_empty():
    episodes = [make(n, 3) for n in range(200)]
    train, held = Snapshot(episodes, CODEC).split(0.2)
    assert set(train.ids) | set(held.ids) == {e.id for e in episodes} and not set(train.ids) & set(held.ids)
    assert held.ids == [i for i in sorted(e.id for e in episodes) if zlib.crc32(i.encode()) / 2**32 < 0.2]
    more = Snapshot(episodes + [make(n, 3) for n in range(200, 300)], CODEC).split(0.2)[1]
    assert set(held.ids) <= set(more.ids)
    for n in range(2, 12):
        for fraction in (0.0, 0.1, 1.0):
            train, held = Snapshot(episodes[:n], CODEC).split(fraction)
            assert len(train) >= 1 and len(held) >= 1 and len(train) + len(held) == n
    assert len(Snapshot(episodes[:10], CODEC).split(0.0, least=3)[1]) == 3
    assert [len(part) for part in Snapshot(episodes[:1], CODEC).split(0.5)] == [1, 0]


def test_empty_and_doubled_snapshots_say_so():
    with pytest.raises(ValueError, match="collect episodes"):
        Snapshot([], CODEC).sample(1, 1, np.random.default_rng(0))
    with pytest.raises(ValueError, match="given twice"):
        Snapshot([make(1), make(1)], CODEC)


# The store


def test_the_store_gives_back_what_was_added_and_drops_duplicates(store):
    episodes = [make(n, 5 + n) for n in range(20)]
    for episode in reversed(episodes):
        assert store.add(episode)
        assert not store.add(episode)
    assert (
        store.ids() == [e.id for e in episodes] and len(store) == 20 and store.steps == sum(e.steps for e in episodes)
    )
    for episode in episodes:
        same(episode, store.get(episode.id))
    assert store.snapshot(["e-000003", "e-000001"]).ids == ["e-000001", "e-000003"]
    with pytest.raises(KeyError, match="no complete episode 'x'"):
        store.get("x")


def test_pieces_join_into_one_episode_and_may_be_begun_again(store):
    episode = make(1, 11)
    pieces = [to_table(episode, a, min(a + 4, 12)) for a in (0, 4, 8)]
    assert store.add(pieces[0]) and store.add(pieces[1])
    assert not store.add(pieces[0]) and not store.add(pieces[1])
    assert len(store) == 0 and store.steps == 0
    with pytest.raises(ValueError, match="begins at row 9, expected 8"):
        store.add(to_table(episode, 9))
    assert store.add(pieces[2]) and not store.add(pieces[2])
    same(episode, store.get(episode.id))
    batch = store.sample(32, 6, np.random.default_rng(0))  # windows across pieces
    assert torch.equal(batch.obs["vector"][:, 1:, 1], batch.obs["vector"][:, :1, 1] + torch.arange(1, 6))

    other = change(make(2, 11), reward=make(2, 11).reward * 2)  # a worker died and its twin played differently
    store.add(to_table(make(2, 11), 0, 7))
    for a in (0, 4, 8):
        assert store.add(to_table(other, a, min(a + 4, 12)))
    same(other, store.get(other.id))
    with EpisodeStore(store.path, COLUMNS, CODEC, read_only=True) as reader:
        same(other, reader.get(other.id))


def block(*pieces, common=None):
    """Pieces (episode, first row, stop) as one block."""
    parts = [{name: column[a:b] for name, column in e.columns().items()} for e, a, b in pieces]
    heads = [piece_header(e.id, a, min(b, len(e)) - a, b >= len(e), e.info) for e, a, b in pieces]
    return to_block({name: np.concatenate([p[name] for p in parts]) for name in parts[0]}, heads, common)


class Heard:
    def __init__(self):
        self.said = []

    def added(self, id, rows, last):
        self.said.append((id, rows, last))

    def dropped(self, id):
        self.said.append((id, "dropped"))


def test_a_block_holds_many_pieces_and_duplicates_in_it_are_dropped(tmp_path):
    a, b, c = make(1, 11), make(2, 3), make(3, 6)
    for one, two in zip(from_block(join([a, b])), (a, b)):
        same(one, two)
    with EpisodeStore(tmp_path, COLUMNS, CODEC) as store:
        heard = Heard()
        store.watch(heard)
        assert store.add(block((a, 0, 5), (b, 0, 99), common={"collector": "x"})) == 2
        assert store.add(block((a, 0, 5), (b, 0, 99))) == 0
        # what is here, the rest of an episode in two pieces, and a new one
        assert store.add(block((b, 0, 99), (a, 5, 9), (a, 9, 12), (c, 0, 7))) == 3
        for reader in (store, EpisodeStore(tmp_path, COLUMNS, CODEC, read_only=True)):
            assert reader.ids() == [a.id, b.id, c.id] and reader.rows == 12 + 4 + 7
            same(a, reader.get(a.id))
            same(c, reader.get(c.id))
            assert reader.get(b.id).info == b.info | {"collector": "x"}
            assert reader.info(c.id) == c.info and reader.known(c.id) and not reader.known("x")
        assert heard.said == [(a.id, 5, False), (b.id, 4, True), (a.id, 4, False), (a.id, 3, True), (c.id, 7, True)]
        late = Heard()
        store.watch(late)
        assert late.said == heard.said
        with pytest.raises(ValueError, match="begins at row 4, expected 0"):
            store.add(block((make(7), 0, 99), (make(8), 4, 9)))
        assert len(store) == 3 and not store.known(make(7).id)  # all of a block or nothing
        wrong = block((make(7), 0, 99), (change(make(8), reward=make(8).reward + 1), 0, 99))
        with pytest.raises(ValueError, match="'e-000008', row 0: reward is"):
            store.add(wrong)


def test_a_broken_episode_is_marked_and_kept_out(tmp_path):
    a, b = make(1, 11), make(2, 3)
    with EpisodeStore(tmp_path, COLUMNS, CODEC) as store:
        store.mark("e-000009", {"broken": "at once"})
        heard = Heard()
        store.watch(heard)
        store.add(block((a, 0, 5), (b, 0, 99)))
        store.mark(a.id, {"broken": "step 6: nan"})
        assert heard.said == [(a.id, 5, False), (b.id, 4, True), (a.id, "dropped")]
        for reader in (store, EpisodeStore(tmp_path, read_only=True)):
            assert reader.broken == {"e-000009": {"broken": "at once"}, a.id: {"broken": "step 6: nan"}}
            assert reader.ids() == [b.id] and reader.known(a.id)
        store.mark(a.id, {"broken": "step 6: nan"})
        assert store.add(to_table(a, 5)) == 0 and store.ids() == [b.id]
        assert store.verify()["broken"] == 2
        assert store.add(a) == 1 and store.ids() == [a.id, b.id] and list(store.broken) == ["e-000009"]  # mended
    table = pa.ipc.open_stream(next(tmp_path.glob("segment*")).read_bytes()).read_all()
    assert table.num_rows == 5 + 4 + 12


@pytest.mark.parametrize("sealed", [True, False])
def test_a_reopened_store_has_everything(tmp_path, sealed):
    store = EpisodeStore(tmp_path, COLUMNS, CODEC, segment_bytes=4000)
    episodes = [make(n, 5 + n % 7) for n in range(30)]
    for episode in episodes:
        store.add(episode)
    store.add(to_table(make(99), 0, 5))
    assert len(store.segments()) > 3
    read_before = store.get(episodes[-1].id)
    if sealed:
        store.close()
    else:
        store._release()  # as if the process had died
    with EpisodeStore(tmp_path, COLUMNS, CODEC) as again:
        for episode in episodes:
            same(episode, again.get(episode.id))
        assert len(again) == 30 and again.verify()["incomplete"] == 1
        assert not again.add(episodes[0]) and not again.add(to_table(make(99), 0, 5))
        assert again.add(to_table(make(99), 5))
        same(make(99), again.get(make(99).id))
    same(episodes[-1], read_before)
    assert all(name.endswith(".arrows") and ".open" not in name for name in os.listdir(tmp_path) if name != ".lock")


def test_segments_are_plain_arrow_streams(store):
    store.add(make(1, 9))
    store.seal()
    (path,) = store.segments()
    table = pa.ipc.open_stream(pa.memory_map(str(path))).read_all()
    assert table.num_rows == 10 and "obs.image" in table.column_names


def test_what_was_read_is_a_view_of_the_disk(store):
    store.add(make(1))
    store.seal()
    image = store.get(make(1).id).obs["image"]
    assert not image.flags.writeable and not image.flags.owndata


KILLED = """
import os, sys
sys.path.insert(0, os.path.dirname({here!r}))
from test_data import COLUMNS, CODEC, make
from raywm.data.episode import to_table
from raywm.data.store import EpisodeStore
store = EpisodeStore({path!r}, COLUMNS, CODEC, segment_bytes=20000)
for n in range(10**6):
    episode = make(n, 5 + n % 50)
    if n % 3:
        store.add(episode)
    else:
        for a in range(0, len(episode), 7):
            store.add(to_table(episode, a, a + 7))
    print(episode.id, flush=True)
"""


def test_kill_9_loses_nothing_acknowledged(tmp_path):
    path, acknowledged = str(tmp_path / "store"), []
    for _ in range(2):  # the second life begins with the first one's duplicates
        code = KILLED.format(here=os.path.abspath(__file__), path=path)
        with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
            for line in process.stdout:
                acknowledged.append(line.strip())
                if len(acknowledged) % 150 == 0:
                    process.kill()
                    break
            acknowledged += [line.strip() for line in process.stdout if line.endswith("\n")]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a tail may have been cut
            with EpisodeStore(path, COLUMNS, CODEC) as store:
                for id in acknowledged:
                    number = int(id.split("-")[1])
                    same(make(number, 5 + number % 50), store.get(id))
                assert store.verify()["damaged"] == []


def test_a_truncated_open_segment_is_cut_at_the_last_whole_piece(tmp_path):
    rng = np.random.default_rng(0)
    episodes = [make(n, 4 + n % 3) for n in range(6)]
    store = EpisodeStore(tmp_path / "a", COLUMNS, CODEC)
    ends = [(store.add(e), next((tmp_path / "a").glob("segment-*")).stat().st_size)[1] for e in episodes]
    store._release()
    (path,) = (tmp_path / "a").glob("segment-00000001-*.open.arrows")
    data = path.read_bytes()
    for cut in [0, 1, 5, 200, *ends, *(e - 1 for e in ends), *rng.integers(0, len(data), 25)]:
        path = tmp_path / f"cut-{cut}"
        path.mkdir(exist_ok=True)
        (path / "segment-00000001.open.arrows").write_bytes(data[:cut])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with EpisodeStore(path, COLUMNS, CODEC, read_only=True) as reader:
                whole = sum(end <= cut for end in ends)
                assert len(reader) == whole
            with EpisodeStore(path, COLUMNS, CODEC) as again:
                assert again.ids() == [e.id for e in episodes[:whole]] and again.set_aside == []
                for episode in episodes:
                    assert again.add(episode) == (episode.id not in [e.id for e in episodes[:whole]])
                assert len(again) == 6 and again.verify()["damaged"] == []


def test_a_damaged_sealed_segment_is_set_aside_and_the_rest_served(tmp_path):
    rng = np.random.default_rng(1)
    with EpisodeStore(tmp_path / "a", COLUMNS, CODEC, segment_bytes=1) as store:
        for n in range(3):
            store.add(make(n))
    files = sorted(name for name in os.listdir(tmp_path / "a") if name != ".lock")
    assert len(files) == 3
    size = os.path.getsize(tmp_path / "a" / files[1])
    for case, cut in enumerate([0, 3, *rng.integers(4, size - 8, 12)]):
        path = tmp_path / str(case)
        path.mkdir()
        for name in files:
            data = (tmp_path / "a" / name).read_bytes()
            (path / name).write_bytes(data[:cut] if name == files[1] else data)
        with pytest.warns(UserWarning) as caught:
            store = EpisodeStore(path, COLUMNS, CODEC)
        assert len(caught) == 1 and "set aside" in str(caught[0].message)
        assert store.ids() == [make(0).id, make(2).id] and store.verify()["set_aside"] == [files[1]]
        assert (path / f"{files[1]}.damaged").exists() and store.add(make(1)) and len(store) == 3
        store.close()


@pytest.mark.parametrize("name", ["segment-00000007.arrows", "segment-00000007.open.arrows"])
def test_foreign_files_are_set_aside(tmp_path, name):
    with EpisodeStore(tmp_path, COLUMNS, CODEC) as store:
        store.add(make(1))
    foreign = [b"not arrow at all, " * 50]
    if ".open" not in name:
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, pa.schema({"x": pa.int64()})) as writer:
            writer.write_batch(pa.record_batch({"x": [1, 2]}))
        foreign.append(sink.getvalue().to_pybytes())
    for data in foreign:
        (tmp_path / name).write_bytes(data)
        (tmp_path / "notes.txt").write_text("not ours, left alone")
        with pytest.warns(UserWarning, match="set aside"):
            store = EpisodeStore(tmp_path, COLUMNS, CODEC)
        with store:
            assert store.ids() == [make(1).id]
            same(make(1), store.get(make(1).id))
    assert not (tmp_path / name).exists() and (tmp_path / "notes.txt").exists()
    assert sum(n.startswith(name) and n.endswith(".damaged") for n in os.listdir(tmp_path)) == len(foreign)


def test_a_flipped_bit_is_found_at_first_touch(tmp_path):
    with EpisodeStore(tmp_path, COLUMNS, CODEC) as store:
        for n in range(4):
            store.add(make(n))
        (path,) = (store.seal(), store.segments())[1]
    data = bytearray(path.read_bytes())
    at = data.index(make(2).obs["vector"].tobytes())
    data[at] ^= 1
    path.write_bytes(data)
    with EpisodeStore(tmp_path, COLUMNS, CODEC) as store:
        assert len(store) == 4  # bodies are not read at opening
        with pytest.warns(UserWarning, match="no longer served"):
            batch = store.sample(64, 4, np.random.default_rng(0))
        assert make(2).id not in batch.ids and len(store) == 3 and len(store.snapshot()) == 3
        with pytest.raises(KeyError):
            store.get(make(2).id)
        assert store.add(make(2))
        same(make(2), store.get(make(2).id))
    with EpisodeStore(tmp_path, COLUMNS, CODEC, read_only=True) as store:
        same(make(2), store.get(make(2).id))


def test_the_rest_of_an_episode_whose_beginning_is_damaged_is_left_out(tmp_path):
    """Under way when the damage is found, by whoever reads it or by the arrival of its next piece."""
    for found in ("read", "again", "verify"):
        path, episode, other = tmp_path / found, make(2, 9), make(3)
        store = EpisodeStore(path, COLUMNS, CODEC)
        store.add(to_table(episode, 0, 4))
        store.close()
        (file,) = path.glob("segment*")
        data = bytearray(file.read_bytes())
        data[data.index(episode.obs["vector"][:4].tobytes())] ^= 1
        file.write_bytes(data)
        with EpisodeStore(path, COLUMNS, CODEC) as store:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                if found == "read":
                    with pytest.raises(DamagedError):
                        store.parts(episode.id, complete=False)
                elif found == "again":  # a call that was lost with a shard is made again
                    assert store.add(block((episode, 0, 4), (other, 0, 99))) == 2
                    assert store.add(to_table(episode, 4)) == 1
                    same(episode, store.get(episode.id))
                    continue
                else:
                    assert store.verify()["damaged"] == [episode.id]
            assert store.add(block((episode, 4, 99), (other, 0, 99))) == 1 and store.ids() == [other.id]
            assert store.add(episode) == 1
            same(episode, store.get(episode.id))


def test_a_thousand_damaged_segments_never_crash_and_never_lie(tmp_path):
    """Flipped, zeroed, doubled and cut bytes, headers and bodies alike: right data, or none and a name."""
    rng = np.random.default_rng(0)
    episodes = {e.id: e for e in (make(n, 3 + n) for n in range(9))}
    with EpisodeStore(tmp_path / "a", COLUMNS, CODEC) as store:
        store.add(join([episodes[id] for id in sorted(episodes)[:4]]))
        store.add(block((make(4, 7), 0, 3), (make(5, 8), 0, 99), (make(4, 7), 3, 99)))
        store.add(join([episodes[id] for id in sorted(episodes)[6:8]]))
        store.seal()
        store.add(episodes["e-000008"])
    damaged, rest = sorted(name for name in os.listdir(tmp_path / "a") if name != ".lock")
    data, other = ((tmp_path / "a" / name).read_bytes() for name in (damaged, rest))
    served = noticed = 0
    for case in range(1000):
        path = tmp_path / "b"
        path.mkdir(exist_ok=True)
        for name in os.listdir(path):
            os.unlink(path / name)
        bad, at = bytearray(data), int(rng.integers(len(data)))
        match case % 4:
            case 0:
                bad[at] ^= 1 << int(rng.integers(8))
            case 1:
                bad[at : at + int(rng.integers(1, 64))] = bytes(rng.integers(0, 256, 16, np.uint8))
            case 2:
                bad[at : at + 8] = b"\xff" * 8
            case 3:
                del bad[at:]
        if bytes(bad) == data:
            continue
        (path / damaged).write_bytes(bad)
        (path / rest).write_bytes(other)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            with EpisodeStore(path, COLUMNS, CODEC) as store:
                found = store.snapshot().episodes
                report = store.verify()
        for episode in found:
            same(episodes.get(episode.id) or make(int(episode.info["number"]), len(episode) - 1), episode)
        assert "e-000008" in [e.id for e in found]
        if len(found) < 8:  # of 6 episodes in the damaged segment, e-000006 and 7, and the other one
            assert any(
                damaged in str(w.message) or "damaged" in str(w.message) or "cut" in str(w.message) for w in caught
            )
            noticed += 1
        served += len(found) == 8 + 1
        assert store.set_aside in ([], [damaged]) and (store.set_aside == [] or report["set_aside"] == [damaged])
    assert noticed > 500


def test_verify_reads_every_byte(tmp_path):
    with EpisodeStore(tmp_path, COLUMNS, CODEC) as store:
        for n in range(4):
            store.add(make(n))
        (path,) = (store.seal(), store.segments())[1]
        assert store.verify() == {
            "episodes": 4,
            "steps": 48,
            "incomplete": 0,
            "broken": 0,
            "segments": 1,
            "bytes": os.path.getsize(path) - 8,
            "damaged": [],
            "damaged_files": [],
            "set_aside": [],
        }
        with open(path, "r+b") as file:
            data = file.read()
            file.seek(data.index(make(3).reward.tobytes()))
            file.write(b"\x01")
        report = store.verify()
        assert report["damaged"] == [make(3).id] and report["episodes"] == 3
    assert issubclass(DamagedError, OSError)


@pytest.mark.parametrize("room", [0, 1, 500, 3000])
def test_a_full_disk_leaves_a_whole_and_usable_store(tmp_path, monkeypatch, room):
    real, left = os.pwrite, [10**9]

    def pwritev(fd, parts, offset):
        data = b"".join(parts)
        count = min(len(data), left[0])
        if count == 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        left[0] -= count
        return real(fd, data[:count], offset)

    monkeypatch.setattr(segment_module.os, "pwritev", pwritev)
    with EpisodeStore(tmp_path, COLUMNS, CODEC) as store:
        for fill in range(3):
            left[0] = room
            number = 10 * fill
            with pytest.raises(OSError, match="disk is full") as caught:
                for number in range(10 * fill, 10 * fill + 10):
                    store.add(make(number, 40))
            assert caught.value.errno == errno.ENOSPC
            left[0] = 10**9
            assert store.add(make(number, 40)) and store.verify()["damaged"] == []
        stored = store.ids()
        left[0] = 0  # not even room for the end mark
    with pytest.warns(UserWarning, match="no end mark"):
        again = EpisodeStore(tmp_path, COLUMNS, CODEC, read_only=True)
    with again:
        assert again.ids() == stored
        for id in stored:
            same(make(int(id[2:]), 40), again.get(id))


def test_whole_segments_are_evicted_oldest_first(tmp_path):
    with EpisodeStore(tmp_path, COLUMNS, CODEC, segment_bytes=5000, capacity_bytes=20000) as store:
        kept = None
        for n in range(60):
            store.add(make(n))
            kept = kept or store.get(make(0).id)
            assert store.bytes <= 20000 + 5000 + 3000
        ids = store.ids()
        assert ids == [make(n).id for n in range(60 - len(ids), 60)] and 4 < len(ids) < 30
        assert store.steps == 12 * len(ids) and sum(map(os.path.getsize, store.segments())) < 25000
        store.sample(8, 4, np.random.default_rng(0))
        same(make(0), kept)  # what was read stays valid
        store.add(to_table(make(900), 0, 5))
        for n in range(100, 140):
            store.add(make(n))
        assert not store.add(to_table(make(900), 5))  # its beginning is gone
        store.seal()
        oldest = store.ids()
    with EpisodeStore(tmp_path, COLUMNS, CODEC) as again:
        assert again.ids() == oldest


def test_a_directory_has_one_writer_and_any_readers(store, monkeypatch):
    monkeypatch.setattr(lineage_module, "LOCK_PATIENCE", 0.1)
    store.add(make(1))
    with pytest.raises(ValueError, match="read_only=True"):
        EpisodeStore(store.path)
    before = sorted(os.listdir(store.path))
    with EpisodeStore(store.path, read_only=True, codec=CODEC) as reader:
        same(make(1), reader.get(make(1).id))
        with pytest.raises(ValueError, match="read-only"):
            reader.add(make(2))
        store.seal()  # renames the file under the reader
        same(make(1), reader.get(make(1).id))
        assert reader.sample(2, 3, np.random.default_rng(0)).ids == [make(1).id] * 2
    assert len(os.listdir(store.path)) == len(before)
    store.close()
    with pytest.raises(ValueError, match="closed"):
        store.add(make(3))
    with pytest.raises(ValueError, match="closed"):
        store.get(make(1).id)
    with pytest.raises(ValueError, match="no store at"):
        EpisodeStore(store.path / "missing", read_only=True)


def test_another_environment_is_refused(tmp_path):
    with EpisodeStore(tmp_path) as store:
        store.add(make(1))
        with pytest.raises(ValueError, match="expected"):
            store.add(change(make(2), action=np.zeros((13, 2), np.float32)))
        with pytest.raises(ValueError, match="codec"):
            store.sample(1, 1, np.random.default_rng(0))
        with pytest.raises(ValueError, match="not JSON"):
            store.add(change(make(2), info={"x": np.zeros(2)}))
        assert len(store) == 1
    for columns, codec in [
        ({"vector": COLUMNS["vector"]}, None),
        (COLUMNS | {"image": gym.spaces.Box(0, 255, (8, 8, 3), np.uint8)}, None),
        (None, ActionCodec(gym.spaces.Box(-1, 1, (2,)))),
    ]:
        with pytest.raises(ValueError, match="another environment"):
            EpisodeStore(tmp_path, columns, codec)
    with EpisodeStore(tmp_path, COLUMNS, CODEC) as store:
        assert len(store) == 1


def test_sampling_and_adding_take_turns(store):
    for n in range(30):
        store.add(make(n, 5 + n))
        batch = store.sample(4, 6, np.random.default_rng(n))
        number = batch.obs["vector"][:, 0, 0].long().tolist()
        assert batch.ids == [make(i).id for i in number] and max(number) <= n
