import json
import random
import threading
import time

import pytest

from raywm.loops import governor as module
from raywm.loops.governor import TrainRatio


def run(ratio, slack, warmup, unit, batch, steps, collectors=1, collect_s=0.0, replay_s=0.0, governor=None, seed=0):
    """Threads that collect units and replay batches with random sleeps, until `steps` are collected."""
    governor = governor or TrainRatio(ratio, slack, warmup)
    stop, wrong, rng = threading.Event(), [], random.Random(seed)
    under_way = unit * collectors

    def pause(mean):
        if mean:
            time.sleep(rng.random() * 2 * mean)

    def collect():
        while not stop.is_set():
            if governor.wait_to_collect(0.05):
                pause(collect_s)
                governor.collected(unit)
                state = governor.state()
                ahead = state["collected"] - warmup - state["replayed"] / ratio
                if ahead > max(slack, batch / ratio) + under_way + 1e-6:
                    wrong.append(f"collection is {ahead} steps ahead")
                if state["collected"] >= steps:
                    stop.set()

    def replay():
        while not stop.is_set():
            if governor.wait_to_replay(batch, 0.05):
                pause(replay_s)
                governor.replayed(batch)
                state = governor.state()
                if state["replayed"] > ratio * (state["collected"] - warmup) + 1e-6:
                    wrong.append(f"replay is ahead: {state}")

    threads = [threading.Thread(target=collect) for _ in range(collectors)] + [threading.Thread(target=replay)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads) and not wrong, wrong[:1]
    return governor


@pytest.mark.parametrize("collect_s, replay_s", [(1e-4, 0.0), (0.0, 1e-4), (1e-4, 1e-4)])
@pytest.mark.parametrize("ratio, unit, batch", [(1.0, 1, 16), (0.25, 16, 64), (8.0, 8, 64)])
def test_the_ratio_is_held_whichever_side_is_slow(collect_s, replay_s, ratio, unit, batch):
    least = max(64, batch / ratio) + unit
    state = run(ratio, 64, 0, unit, batch, int(60 * least), 1, collect_s, replay_s).state()
    assert 0.98 * ratio <= state["ratio"] <= ratio and state["set_ratio"] == ratio
    assert state["waiting_to_collect"] == state["waiting_to_replay"] == 0


def test_bursts_of_several_collectors_and_a_long_warm_up():
    """Four collectors in units of 512 and a warm-up of 20,000 steps: within 2% after 50 times slack and units."""
    warmup, after = 20_000, 50 * (1024 + 4 * 512)
    governor = run(64.0, 1024, warmup, 512, 16 * 64, warmup + after, 4, 1e-4, 0.0)
    state = governor.state()
    assert 0.98 * 64 <= state["ratio"] <= 64
    assert state["ratio"] == pytest.approx(state["replayed"] / (state["collected"] - warmup))


def test_nothing_is_replayed_in_the_warm_up():
    governor = TrainRatio(2.0, 10, warmup=1000)
    assert governor.may_collect() and not governor.may_replay(1)
    governor.collected(1000)
    assert governor.may_collect() and not governor.may_replay(1)
    governor.collected(8)
    assert governor.may_replay(16) and not governor.may_replay(17)
    assert governor.state()["ratio"] == 0 and TrainRatio(1.0).state()["ratio"] == 0
    governor.collected(2)
    assert not governor.may_collect()  # 10 steps ahead
    governor.replayed(1)
    assert governor.may_collect()


def test_a_slack_below_one_batch_does_not_lock_both():
    governor = run(0.01, 0, 0, 1, 16, 20_000)  # 1600 steps for a batch
    assert governor.state()["ratio"] == pytest.approx(0.01, rel=0.2)


def test_who_waits_is_seen_said_and_counted(monkeypatch):
    monkeypatch.setattr(module, "SAY_AFTER", 0.05)
    said = []
    governor = TrainRatio(1.0, 4, 0, say=said.append)
    assert not governor.wait_to_replay(8, timeout=0.18)
    assert len(said) == 3 and "waiting to replay for 0 s at the train ratio of 1" in said[0]
    assert "0 steps collected" in said[0] and "collectors alive" in said[0]
    waiter = threading.Thread(target=governor.wait_to_replay, args=(8,))
    waiter.start()
    time.sleep(0.02)
    assert governor.state()["waiting_to_replay"] == 1 and governor.state()["waiting_to_collect"] == 0
    governor.collected(8)
    waiter.join(5)
    state = governor.state()
    assert state["waiting_to_replay"] == 0 and 0.18 <= state["waited_to_replay"] < 2 and state["waited_to_collect"] == 0
    said.clear()
    assert not governor.wait_to_collect(timeout=0.07)
    assert "learners alive" in said[0] and governor.state()["waited_to_collect"] >= 0.07
    assert not governor.wait_to_collect(timeout=0)


def test_a_resumed_run_keeps_its_ratio():
    governor = TrainRatio(4.0, 8, warmup=100)
    governor.collected(400)
    governor.replayed(1000)
    saved = json.loads(json.dumps(governor.save()))
    again = TrainRatio(4.0, 8, warmup=100)
    again.load(saved)
    assert again.save() == saved and again.may_replay(200) and not again.may_replay(201)
    assert again.state()["ratio"] == governor.state()["ratio"] == pytest.approx(1000 / 300)

    other = TrainRatio(1000.0, 8, warmup=100)  # a ratio set anew holds from here: no backlog of 300,000 rows
    other.load(saved)
    assert not other.may_replay(1) and other.may_collect()
    other.collected(2)
    assert other.may_replay(2000) and not other.may_replay(2001)
    third = TrainRatio(1000.0, 8, warmup=100)
    third.load(other.save())
    assert third.may_replay(2000) and not third.may_replay(2001)


@pytest.mark.parametrize("arguments", [{"ratio": 0.0}, {"ratio": 1.0, "slack": -1}, {"ratio": 1.0, "warmup": -1}])
def test_senseless_arguments_are_refused(arguments):
    with pytest.raises(ValueError, match="expected ratio > 0"):
        TrainRatio(**arguments)
