"""Noise keyed by (seed, k): pure, the same in every batch, and the stream that diffusers draws from."""
import pytest
import torch
from diffusers.utils.torch_utils import randn_tensor

from ldm.noise import seeded

SHAPE = (4, 6, 5)


def test_the_same_key_is_the_same_noise_in_any_order():
    noise = seeded([7, 8], SHAPE)
    first = {k: noise(k) for k in (0, 1, 2, 3)}
    for k in (2, 2, 0, 3, 1, 0):
        assert torch.equal(noise(k), first[k])
    assert torch.equal(seeded([7, 8], SHAPE)(3), first[3])               # without asking for 0, 1, 2
    assert len({tensor.sum().item() for tensor in first.values()}) == 4


def test_a_picture_is_the_same_alone_in_a_batch_and_in_any_place():
    seeds = [3, 2**64 - 1, 0, 3]
    batch = seeded(seeds, SHAPE)
    for k in (0, 4):
        together = batch(k)
        assert together.shape == (4, *SHAPE)
        assert together.dtype == torch.float32
        for i, seed in enumerate(seeds):
            assert torch.equal(together[i], seeded([seed], SHAPE)(k)[0])
        assert not torch.equal(together[0], together[1])


def test_it_leaves_the_global_generator_alone():
    torch.manual_seed(0)
    expected = torch.randn(3)
    torch.manual_seed(0)
    seeded([1], SHAPE)(2)
    assert torch.equal(torch.randn(3), expected)


def test_it_does_not_depend_on_defaults_of_pytorch():
    expected = seeded([1], SHAPE)(1)
    try:
        torch.set_default_dtype(torch.float64)
        torch.set_default_device("meta")
        assert torch.equal(seeded([1], SHAPE)(1), expected)
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)


@pytest.mark.parametrize("shape", [(4, 8, 8), (4, 1, 3), (4, 64, 96)])   # fewer than 16 are drawn otherwise
def test_it_is_the_stream_of_diffusers(shape):
    seeds      = [5, 6, 2**63]
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    noise      = seeded(seeds, shape)
    for k in range(3):
        assert torch.equal(noise(k), randn_tensor((3, *shape), generator=generators, dtype=torch.float32))


def test_float16_runs_of_diffusers_start_from_the_same_noise():
    """PyTorch draws in blocks of 16. Where the last is not full, float32 and float16 fill it differently."""
    for shape, same in (((4, 64, 64), None), ((4, 6, 5), -16)):
        generator = torch.Generator().manual_seed(5)
        theirs = randn_tensor((1, *shape), generator=[generator], dtype=torch.float16).flatten()
        ours   = seeded([5], shape)(0).half().flatten()
        assert torch.equal(ours[:same], theirs[:same])
        assert torch.equal(ours, theirs) == (same is None)


def test_it_is_standard_normal():
    noise = seeded(range(64), (4, 32, 32))(1)             # n = 262,144: standard errors .002, .003, .02
    assert abs(noise.mean().item()) < 0.01
    assert abs(noise.var().item() - 1) < 0.014
    assert abs(noise.pow(4).mean().item() - 3) < 0.1
