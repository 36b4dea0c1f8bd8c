"""Guidance: one batch or two calls, the formulas, and what they cost."""
import pytest
import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg

from ldm import Conditioning, Denoiser, NoiseSchedule
from ldm.guidance import classifier_free, interval, rescaled, switch, unguided

SCHEDULE = NoiseSchedule.scaled_linear()
SIGMA    = 2.5


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


X      = random(2, 4, 3, 5)
COND   = Conditioning(random(2, 7, 6, seed=1), vector=random(2, 3, seed=2), concat=random(2, 2, 3, 5, seed=3))
UNCOND = Conditioning(random(2, 7, 6, seed=4), vector=random(2, 3, seed=5), concat=random(2, 2, 3, 5, seed=6))


class Network:
    """Mixes all of its inputs, picture by picture; out of memory beyond `limit` pictures."""

    def __init__(self, limit=99, error=None):
        self.limit = limit
        self.error = error or torch.OutOfMemoryError("CUDA out of memory")
        self.sizes = []

    def __call__(self, x, t, context, vector):
        self.sizes.append(len(x))
        if len(x) > self.limit:
            raise self.error
        told = context.mean(dim=(1, 2)) + (0 if vector is None else vector.sum(dim=1))
        more = x[:, 4:].sum(dim=1, keepdim=True)
        return torch.tanh(x[:, :4] + told[:, None, None, None]) + more * (t / 1000)


def by_hand(denoiser, scale):
    """The formula, from two separate calls."""
    cond, uncond = denoiser(X, SIGMA, COND), denoiser(X, SIGMA, UNCOND)
    return uncond + scale * (cond - uncond)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("scale", [7.5, 0.0, -1.0])
def test_one_call_for_both(scale, prediction):
    network  = Network()
    denoiser = Denoiser(network, SCHEDULE, prediction)
    guided   = classifier_free(denoiser, COND, UNCOND, scale)(X, SIGMA)
    assert network.sizes == [4]
    torch.testing.assert_close(guided, by_hand(denoiser, scale), rtol=0, atol=1e-12)


@pytest.mark.parametrize("error", [None, *map(RuntimeError, [
    "MPS backend out of memory (MPS allocated: 17.87 GB)", "DefaultCPUAllocator: not enough memory",
    "DefaultCPUAllocator: can't allocate memory"])], ids=str)
def test_two_calls_from_the_moment_the_memory_is_short(error):
    network  = Network(limit=3, error=error)
    denoiser = Denoiser(network, SCHEDULE)
    denoise  = classifier_free(denoiser, COND, UNCOND, 7.5)
    guided   = denoise(X, SIGMA)
    assert network.sizes == [4, 2, 2]
    denoise(X, SIGMA)
    assert network.sizes == [4, 2, 2, 2, 2]                              # not tried again
    torch.testing.assert_close(guided, by_hand(denoiser, 7.5), rtol=0, atol=1e-12)


def test_out_of_memory_for_a_single_picture_is_an_error():
    denoise = classifier_free(Denoiser(Network(limit=1), SCHEDULE), COND, UNCOND, 7.5)
    with pytest.raises(torch.OutOfMemoryError):
        denoise(X, SIGMA)


def test_other_errors_are_not_taken_for_short_memory():
    def broken(*_):
        raise RuntimeError("shapes do not fit")
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        classifier_free(Denoiser(broken, SCHEDULE), COND, UNCOND, 7.5)(X, SIGMA)


def test_a_scale_of_one_costs_nothing():
    network  = Network()
    denoiser = Denoiser(network, SCHEDULE)
    found    = classifier_free(denoiser, COND, UNCOND, 1.0)(X, SIGMA)
    assert network.sizes == [2]
    assert torch.equal(found, denoiser(X, SIGMA, COND))
    assert torch.equal(found, unguided(denoiser, COND)(X, SIGMA))


def test_contexts_of_different_lengths_take_two_calls():
    network  = Network()
    denoiser = Denoiser(network, SCHEDULE)
    short    = Conditioning(UNCOND.context[:, :3], UNCOND.vector, UNCOND.concat)
    guided   = classifier_free(denoiser, COND, short, 3.0)(X, SIGMA)
    assert network.sizes == [2, 2]
    cond, uncond = denoiser(X, SIGMA, COND), denoiser(X, SIGMA, short)
    torch.testing.assert_close(guided, uncond + 3 * (cond - uncond), rtol=0, atol=1e-12)


def test_as_many_negative_prompts_as_prompts():
    one = Conditioning(UNCOND.context[:1], UNCOND.vector[:1], UNCOND.concat[:1])
    with pytest.raises(ValueError, match="2 prompts but 1 negative prompts"):
        classifier_free(Denoiser(Network(), SCHEDULE), COND, one, 7.5)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("rescale", [0.0, 0.7, 1.0])
def test_rescale_is_that_of_diffusers(rescale, prediction):
    network  = Network()
    denoiser = Denoiser(network, SCHEDULE, prediction)
    found    = rescaled(denoiser, COND, UNCOND, 7.5, rescale)(X, SIGMA)
    assert network.sizes == [4]
    cond, uncond = denoiser.output(X, SIGMA, COND), denoiser.output(X, SIGMA, UNCOND)
    theirs   = rescale_noise_cfg(uncond + 7.5 * (cond - uncond), cond, guidance_rescale=rescale)
    torch.testing.assert_close(found, denoiser.to_x0(theirs, X, SIGMA), rtol=0, atol=1e-12)
    if rescale == 0:
        torch.testing.assert_close(found, by_hand(denoiser, 7.5), rtol=0, atol=1e-12)


def test_rescale_restores_the_standard_deviation_of_each_picture():
    denoiser = Denoiser(Network(), SCHEDULE, "sample")                 # so that D is the network's output
    found    = rescaled(denoiser, COND, UNCOND, 7.5, 1.0)(X, SIGMA)
    cond     = denoiser(X, SIGMA, COND)
    for i in range(2):
        assert found[i].std().item() == pytest.approx(cond[i].std().item())


def test_guidance_only_within_an_interval():
    network  = Network()
    denoiser = Denoiser(network, SCHEDULE)
    guided, plain = classifier_free(denoiser, COND, UNCOND, 7.5), unguided(denoiser, COND)
    denoise  = interval(guided, plain, low=1.0, high=5.0)
    for sigma, size in ((0.5, 2), (1.0, 2), (1.001, 4), (5.0, 4), (5.001, 2)):     # low < σ ≤ high
        network.sizes.clear()
        assert torch.equal(denoise(X, sigma), {2: plain, 4: guided}[size](X, sigma))
        assert network.sizes[0] == size, sigma


def test_switch_hands_over_below_its_sigma():
    denoise = switch(lambda x, sigma: ("above", x, sigma), lambda x, sigma: ("below", x, sigma), 2.0)
    assert [denoise(7, sigma) for sigma in (2.001, 2.0, 1.999)] == [
        ("above", 7, 2.001), ("above", 7, 2.0), ("below", 7, 1.999)]
