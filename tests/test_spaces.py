import json
import subprocess
import sys

import gymnasium as gym
import numpy as np
import pytest
import torch

from raywm.spaces import ActionCodec, columns_from_json, columns_to_json, is_image, obs_columns, to_columns

SPACES = [
    gym.spaces.Box(-2, 3, (3,), np.float32),
    gym.spaces.Box(np.array([0.0, -1.0]), np.array([1.0, 5.0]), dtype=np.float64),
    gym.spaces.Box(-1, 1, (2, 2), np.float32),
    gym.spaces.Box(0, 9, (2,), np.int64),
    gym.spaces.Discrete(4),
    gym.spaces.Discrete(3, start=-5),
    gym.spaces.MultiDiscrete([2, 5, 3]),
    gym.spaces.MultiDiscrete([[2, 3], [4, 2]]),
    gym.spaces.MultiBinary(5),
    gym.spaces.MultiBinary([2, 3]),
]


@pytest.mark.parametrize("space", SPACES, ids=str)
def test_encode_and_decode_are_inverse(space):
    codec, rng = ActionCodec(space), np.random.default_rng(0)
    for lead in [(), (7,), (2, 3)]:
        count = int(np.prod(lead))
        actions = np.stack([codec.sample(rng) for _ in range(count)]).reshape((*lead, *codec.shape))
        vector = codec.encode(actions)
        assert vector.shape == (*lead, codec.dim) and vector.dtype == np.float32
        assert vector.min() >= -1 and vector.max() <= 1
        again = codec.decode(vector)
        assert again.shape == actions.shape and again.dtype == codec.dtype
        np.testing.assert_allclose(again, actions, atol=1e-5)


@pytest.mark.parametrize("space", SPACES, ids=str)
def test_whatever_is_decoded_sampled_or_zero_is_in_the_space(space):
    codec, rng = ActionCodec(space), np.random.default_rng(1)
    assert space.contains(codec.zero())
    codec.encode(codec.zero())
    for _ in range(50):
        assert space.contains(codec.sample(rng))
        assert space.contains(codec.decode(rng.normal(0, 2, codec.dim)))


@pytest.mark.parametrize("space", SPACES, ids=str)
def test_squash_gives_what_encode_gives(space):
    codec = ActionCodec(space)
    encoded = codec.squash(torch.randn(6, 4, codec.dim, generator=torch.Generator().manual_seed(0)))
    assert encoded.shape == (6, 4, codec.dim) and encoded.dtype == torch.float32
    actions = codec.decode(encoded.numpy())
    if codec.dtype.kind == "f" or codec.kind != "box":
        np.testing.assert_allclose(codec.encode(actions), encoded.numpy(), atol=1e-5)
    assert sum(codec.groups) in (0, codec.dim)


@pytest.mark.parametrize("space", SPACES, ids=str)
def test_a_codec_survives_json(space):
    again = ActionCodec.from_json(json.loads(json.dumps(ActionCodec(space).to_json())))
    assert again.space == space and again.dim == ActionCodec(space).dim
    assert ActionCodec.from_json(json.dumps(again.to_json())).space == space


def test_bounds_map_to_the_ends_and_beyond_them_is_clipped():
    codec = ActionCodec(gym.spaces.Box(np.array([0.0, -1.0]), np.array([1.0, 5.0]), dtype=np.float32))
    assert codec.encode([[0, -1], [1, 5], [0.5, 2], [9, -9]]).tolist() == [[-1, -1], [1, 1], [0, 0], [1, -1]]
    assert codec.decode([[-1, -1], [1, 1], [5, -5]]).tolist() == [[0, -1], [1, 5], [1, -1]]


def test_discrete_uses_its_start():
    codec = ActionCodec(gym.spaces.Discrete(3, start=10))
    assert codec.encode([10, 12]).tolist() == [[1, 0, 0], [0, 0, 1]]
    assert codec.zero() == 10
    with pytest.raises(ValueError, match="expected members of"):
        codec.encode(0)


def test_squash_of_a_box_has_gradients():
    raw = torch.zeros(2, 3, requires_grad=True)
    ActionCodec(SPACES[0]).squash(raw).sum().backward()
    assert (raw.grad == 1).all()


@pytest.mark.parametrize(
    "space",
    [
        gym.spaces.Box(-np.inf, np.inf, (2,)),
        gym.spaces.Box(np.finfo(np.float32).min, np.finfo(np.float32).max, (2,)),
        gym.spaces.Dict({"a": gym.spaces.Discrete(2)}),
        gym.spaces.Text(4),
    ],
    ids=str,
)
def test_other_action_spaces_are_refused_with_a_way_out(space):
    with pytest.raises(ValueError, match=r"expected .*wrap the environment"):
        ActionCodec(space)


def test_wrong_shapes_are_refused():
    codec = ActionCodec(SPACES[0])
    with pytest.raises(ValueError, match="expected"):
        codec.encode(np.zeros((4, 2)))
    with pytest.raises(ValueError, match="expected"):
        codec.decode(np.zeros((4, 2)))
    with pytest.raises(ValueError, match="expected"):
        codec.squash(torch.zeros(4, 2))


def test_observation_columns():
    frame, grey = gym.spaces.Box(0, 255, (8, 6, 3), np.uint8), gym.spaces.Box(0, 255, (8, 6), np.uint8)
    vector, matrix = gym.spaces.Box(-np.inf, np.inf, (4,), np.float64), gym.spaces.Box(0, 1, (2, 3), np.float32)
    assert obs_columns(frame) == {"image": frame} and is_image(obs_columns(frame)["image"])
    assert obs_columns(grey)["image"].shape == (8, 6, 1)
    assert obs_columns(vector)["vector"].dtype == np.float32
    assert obs_columns(matrix)["vector"].shape == (6,)
    both = obs_columns(gym.spaces.Dict({"eyes": frame, "body": matrix}))
    assert {name: is_image(box) for name, box in both.items()} == {"eyes": True, "body": False}
    columns = to_columns(both, {"eyes": frame.sample(), "body": matrix.sample()})
    assert all(both[name].contains(column) for name, column in columns.items())
    assert to_columns(obs_columns(vector), np.arange(4.0))["vector"].dtype == np.float32
    assert columns_from_json(json.dumps(columns_to_json(both | obs_columns(vector)))) == both | obs_columns(vector)
    for space in [gym.spaces.Discrete(3), gym.spaces.Box(0, 255, (9,), np.uint8), gym.spaces.Dict({})]:
        with pytest.raises(ValueError, match="expected"):
            obs_columns(space)


def test_importing_spaces_does_not_import_torch():
    code = "import sys, raywm.spaces, raywm.envs; assert 'torch' not in sys.modules and 'pandas' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
