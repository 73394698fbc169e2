"""Each benchmark at toy size: who takes part, that ratios are printed and JSON written. No figure is judged."""

import itertools
import json
import math
import os
import signal
import sys
from functools import partial

import numpy as np
import pytest
import torch
from rich.console import Console

from raywm import config as configs
from raywm.bench import collect, common, dream, dreamer, flops, memory, replay, scale, serve
from raywm.bench.collect import FAST, FLOOR, PLAIN, POLICY, RAYWM, RLLIB, Heard
from raywm.config import EnvConfig
from raywm.data.episode import validate
from raywm.data.store import EpisodeStore

linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def is_spread(value):
    return set(value) == {"median", "min", "max"} and 0 <= value["min"] <= value["median"] <= value["max"] < math.inf


def test_groups_add_up_and_a_death_is_heard():
    two = common.Group(dict, ({"lumps": partial(max, 3.0, 5.0)},), processes=2)
    assert len(two.pids) == 2 and two.measure("lumps", 0.01) > 10
    os.kill(two.pids[1], signal.SIGKILL)
    with pytest.raises((EOFError, OSError)):
        two.measure("lumps", 0.01)
    with pytest.raises(EOFError):
        common.Group(dict, ({"dies": partial(os._exit, 1)},))


def test_a_ratio_is_the_median_of_the_turns_ratios():
    assert common.spread([3, 1, 2]) == {"median": 2, "min": 1, "max": 3}
    assert common.ratio([2, 30, 8], [1, 10, 2]) == {"median": 3, "min": 2, "max": 4}  # of medians: 4
    assert common.cell({"median": 2500, "min": 1000, "max": 9000}, 1e3, 1, "k") == "2.5k (1.0k to 9.0k)"


@linux
def test_cpu_seconds_are_those_of_the_process():
    before, own = common.cpu_seconds([os.getpid()]), os.times()
    while sum(os.times()[:2]) - sum(own[:2]) < 0.2:
        pass
    assert 0.1 < common.cpu_seconds([os.getpid(), 2**30]) - before < 1


def test_finish_prints_one_and_writes_json(tmp_path, capsys):
    out = tmp_path / "new" / "x.json"
    common.finish(
        lambda say: say("measuring") or {"figure": 1}, lambda result, console: console.print("table"), out=out
    )
    said = capsys.readouterr()
    assert said.out == "table\n" and said.err == "measuring\n" and json.loads(out.read_text()) == {"figure": 1}
    common.finish(lambda say: {"figure": 1}, lambda result, console: console.print("table"), as_json=True)
    assert json.loads(capsys.readouterr().out) == {"figure": 1}


def test_rates_are_from_answer_to_answer():
    # two workers at 100 and 50 steps/s, whose answers come in lumps; what came with a first answer is not theirs
    answers = [Heard(t, 0, 200) for t in (0.0, 2.0, 4.0)] + [Heard(t, 1, 50) for t in (0.5, 1.5, 2.5)]
    assert collect.rate(sorted(answers)) == pytest.approx(150)
    assert collect.steps_of([(0, 20, 20.0), (1, 0, math.nan)]) == 20 and collect.steps_of((3, 70, 9.0)) == 70


def test_a_window_begins_warm_and_ends_when_all_have_answered_twice():
    heard = []

    def answers():
        for n in itertools.count():
            heard.append(Heard(float(n), n % 2, 10))
            yield from range(3)  # several episodes of one unit

    measured = collect.window(answers(), heard, 2, seconds=0.0, warm=3)
    assert [h.at for h in measured] == [5, 6, 7, 8] and collect.rate(measured) == 10


def test_what_an_environment_costs_decides_how_many_are_played_at_once():
    assert collect.environments_at_once(EnvConfig(id="CartPole-v1")) == 8
    assert collect.environments_at_once(EnvConfig(id="raywm/Sleep-v0")) == 1
    assert collect.is_plain(EnvConfig(id="CartPole-v1"))
    assert not collect.is_plain(EnvConfig(id="CartPole-v1", action_repeat=2))


@pytest.mark.slow
def test_collect(ray_session, tmp_path, capsys):
    out = tmp_path / "c.json"
    collect.main(["CartPole-v1", "Missing-v0"], seconds=0.3, turns=2, out=out)
    said, result = capsys.readouterr().out, json.loads(out.read_text())
    assert f"x {FLOOR}" in said and "skipped Missing-v0" in said and f"{RAYWM} / {PLAIN}: " in said
    found = result["environments"]["CartPole-v1"]
    assert list(found["steps_per_second"]) == [FLOOR, PLAIN, RAYWM, FAST, RLLIB, POLICY]
    assert {f"{a} / {b}" for a in (RAYWM, FAST) for b in (FLOOR, PLAIN, RLLIB, POLICY)} == set(found["ratios"])
    assert all(map(is_spread, [*found["steps_per_second"].values(), *found["ratios"].values()]))
    assert all(value["min"] > 0 for value in found["steps_per_second"].values())
    assert set(found["cores_used_by_others"]) == set(found["steps_per_second"])
    assert result["machine"]["cores"] and found["environments_a_process"][RAYWM] == 8


def test_collect_refuses_when_there_is_nothing_to_play():
    with pytest.raises(ValueError, match="Missing-v0"):
        collect.run(["Missing-v0"])


def test_synthetic_episodes_are_episodes():
    made = list(replay.episodes(700))
    assert len(made) == 2
    for episode in made:
        validate(episode, replay.COLUMNS, replay.CODEC)
    again = next(replay.episodes(1))
    assert all(np.array_equal(a, b) for a, b in zip(again.columns().values(), made[0].columns().values()))


def test_all_contenders_bring_whole_batches(tmp_path):
    with EpisodeStore(tmp_path, replay.COLUMNS, replay.CODEC) as store:
        for episode in replay.episodes(1000):
            store.add(episode)
    works = replay.gather_works(1000) | replay.raywm_works(str(tmp_path)) | replay.rllib_works(1000)
    assert {work() for work in works.values()} == {16.0}


@pytest.mark.slow
def test_replay(ray_session, capsys):
    result = common.finish(lambda say: replay.run(0.1, 2, 1000, say), replay._show)
    said = capsys.readouterr().out
    assert "raywm / gather: " in said and "waits" in said
    rates = result["sequences_per_second"]
    assert list(rates) == [replay.GATHER, *replay.LAWS, replay.RLLIB, replay.SHARD]
    assert all(map(is_spread, [*rates.values(), *result["ratios"].values(), result["prefetched"]["wait_share"]]))
    assert rates[replay.GATHER]["max"] == max(way["max"] for way in result["gather"].values())
    assert json.dumps(result)


@pytest.mark.slow
@linux
def test_replay_memory(tmp_path, capsys):
    memory.main(8, 300_000, seconds=0.1, turns=1, out=tmp_path / "m.json")
    said, result = capsys.readouterr().out, json.loads((tmp_path / "m.json").read_text())
    assert "sequential read, cold" in said and "open files" in said
    budget = result["budget"]
    assert budget["stored_mb"] > 30 and 0 < budget["before_mb"] <= budget["appending_mb"]
    assert is_spread(result["cold"]["cold_share_of_sequential"]) and len(result["day"]["points"]) == memory.POINTS
    assert result["day"]["points"][-1]["rows"] >= 300_000


@linux
def test_dropped_pages_are_gone_and_come_back(tmp_path):
    with EpisodeStore(tmp_path, replay.COLUMNS, replay.CODEC) as store:
        store.add(next(replay.episodes(1)))
        store.seal()
        paths, (part,) = store.segments(), store.parts("bench-000000000")
        image = part[0]["obs.image"]
        assert image[:].any() and memory.resident(paths) > 0.99
        memory.drop(paths)
        if memory.resident(paths) > 0.5:
            pytest.skip("this file system keeps its pages (tmpfs)")
        assert np.array_equal(image, next(replay.episodes(1)).obs["image"])


@pytest.mark.slow
def test_scale(ray_session, tmp_path, capsys):
    out = tmp_path / "s.json"
    scale.main([1, 2], seconds=2.5, turns=1, out=out)
    said, result = capsys.readouterr().out, json.loads(out.read_text())
    assert "x ideal" in said and "loaded torch" in said and out.with_suffix(".png").stat().st_size > 5000
    assert [m["collectors"] for m in result["measured"]] == [1, 2]
    for m in result["measured"]:
        assert is_spread(m["share_of_ideal"]) and 0 < m["steps_per_second"]["median"] < 1.5 * m["ideal"]
        assert m["stored"]["rows"] > 0 and m["stored"]["blocks"] > 0 and m["driver_messages_per_second"]["median"] > 0
    assert [p["nodes"] for p in result["projection"]["cluster"]] == list(scale.NODES)
    with pytest.raises(ValueError, match="at least 1"):
        scale.run([0])


def of(value):
    return {"median": value, "min": value, "max": value}


def test_projections_separate_what_is_used_at_rest():
    def measured(collectors):  # 1 unit and 2 blocks a second and collector, 1 ms and 3 ms each, above 0.02 and 0.04
        return {
            **{"collectors": collectors, "units_per_second": of(collectors), "blocks_per_unit": 2},
            **{"steps_per_second": of(400 * collectors), "driver_bytes_per_second": of(50 * collectors)},
            **{"driver_cores": of(0.02 + 0.001 * collectors), "shard_cores": of(0.04 + 0.006 * collectors)},
            "stored": {"blocks": 10, "rows": 2000, "bytes": 60_000},
        }

    found = scale.project([measured(8), measured(16), measured(32)], [1, 1000])
    assert found["costs"] == pytest.approx(
        {"driver_ms_per_unit": 1, "driver_cores_at_rest": 0.02, "shard_ms_per_block": 3, "shard_cores_at_rest": 0.04}
    )
    assert found["cluster"][1]["driver_cores"] == pytest.approx(0.02 + 32)
    assert found["cluster"][1]["driver_messages_per_second"] == 64_000
    assert found["cluster"][1]["storage_bytes_per_second"] == pytest.approx(1000 * 32 * 400 * 30)
    assert found["node"]["shard_messages_per_second"] == 128
    assert found["nodes_at_a_full_driver_core"] * 32 * 0.001 == pytest.approx(0.98)
    flat = [measured(8) | {"driver_cores": of(0.05)}, measured(16) | {"driver_cores": of(0.05)}]
    assert scale.per_unit(flat)["driver_ms_per_unit"] == pytest.approx(50 / 16)  # no line rises


@pytest.mark.slow  # eight processes that import torch
def test_dream_still_measures(monkeypatch, capsys):
    monkeypatch.setattr(dream, "TURNS", 1)
    for name, value in (("POPULATION", 4), ("ROLLOUTS", 2), ("HORIZON", 2), ("ROWS", 8)):
        monkeypatch.setattr(dream, name, value)
    shown = Console(width=200)
    result = dream.run(0.05)
    dream._show(result, shown)
    assert "fp32 floor" in capsys.readouterr().out and len(result["setups"]) == 2


NANO = ["rssm.size=nano", "dreamer.precision=fp32", "dreamer.horizon=3"]


def test_dreamer_measures_an_update_its_flops_and_where_its_time_goes():
    works = dreamer.raywm_works("vector", NANO, (2, 8))
    facts = works["facts"]()
    assert works["update"]() == 1 and facts["losses"][0] != facts["losses"][1]
    assert facts["flop"] > 2 * facts["parameters"] * 16 and 0 < facts["products_s"] < 60
    for shares in facts["where"].values():
        assert sum(shares.values()) == pytest.approx(1, abs=0.05) and min(shares.values()) >= 0
    assert {"matrix products", "norms", "optimiser", "sampling"} <= set(facts["where"]["kinds"])
    assert {"observe", "dream", "backward", "optimiser"} <= set(facts["where"]["phases"])


def test_products_are_counted_by_their_shapes():
    a, b = torch.randn(3, 5, requires_grad=True), torch.randn(5, 7)
    with flops.Products() as products:
        for _ in range(4):
            (a @ b).sum().backward()
    assert products.flop == 4 * (2 * 3 * 5 * 7) * 2  # forward, and backward for a alone
    assert sorted(products.calls.values()) == [4, 4] and products.seconds() > 0


def test_dreamer_is_no_smaller_than_rllibs():
    for what, theirs in (("vector", 3_157_509), ("image", 8_260_388)):  # as test_dreamer_against_rllib counts them
        learner, _ = dreamer.made(what, dreamer.LIKE_XS[what], (1, 2))
        assert theirs <= dreamer.parameters(learner) < 1.02 * theirs


@pytest.mark.slow  # six processes that import torch, one RLlib
@pytest.mark.timeout(900)
def test_dreamer_against_rllib(tmp_path, capsys):
    result = common.finish(lambda say: dreamer.run(["vector"], 0.1, 2, say, shape=(2, 12)), dreamer._show)
    said, found = capsys.readouterr().out, result["cases"]["vector"]
    assert f"x {dreamer.RLLIB}" in said and "wanted 2.5" in said and "official JAX size1m, measured before" in said
    assert "matrix products" in said
    theirs = found["contenders"][dreamer.RLLIB]
    assert theirs["parameters"] == 3_157_509 and theirs["losses"][0] != theirs["losses"][1]
    assert set(found["ratios"]) == set(found["contenders"]) - {dreamer.RLLIB}
    assert all(is_spread(one["update_s"]) and 0 < one["floor_share"]["median"] for one in found["contenders"].values())
    assert json.dumps(result)


def test_dreamer_refuses_what_it_cannot_measure():
    with pytest.raises(ValueError, match="vector, image or all"):
        dreamer.main(what="sound")
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="no GPU"):
            dreamer.main(gpu=True)


@pytest.mark.slow
def test_serve(ray_session, tmp_path, capsys):
    out = tmp_path / "s.json"
    serve.main(["cartpole"], seconds=0.3, turns=2, out=out)
    said, result = capsys.readouterr().out, json.loads(out.read_text())
    assert "to the last bit" in said and "wanted 2,000" in said
    for rows, found in result["presets"]["cartpole"].items():
        assert rows in ("16", "1") and found["answers_checked"] > 0
        assert set(found["decisions_per_second"]) == {serve.RAYWM, serve.ECHO, serve.LOCAL}
        assert all(map(is_spread, [*found["decisions_per_second"].values(), *found["ratios"].values()]))
        assert all(is_spread(value) for who in found["seconds_a_request"].values() for value in who.values())


def test_an_answer_that_is_not_the_local_agent_s_is_counted(tmp_path):
    run = serve.untrained(tmp_path / "run", configs.load("dreamer-cartpole"))
    service = serve.Service(run)
    (client, *_) = serve.clients_of(service.columns, 2)
    state = b""
    for body in client.bodies[:4]:
        (answer,) = service.act([service.read_act(body + state + b"}")])
        state = b"," + answer[answer.index(b'"state":') : answer.index(b"]", answer.index(b'"state":')) + 1]
        client.answers.append(answer)
    assert serve.wrong(service, [client], 2) == 0
    told = json.loads(client.answers[2])
    told["state"].reverse()
    client.answers[2] = json.dumps(told).encode()
    assert serve.wrong(service, [client], 2) == 1
