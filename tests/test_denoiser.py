"""D(x; σ): the three predictions against their definitions, times, casts, and what is refused."""
import math

import pytest
import torch

from ldm import Conditioning, Denoiser, NoiseSchedule

SCHEDULE = NoiseSchedule.scaled_linear()
X        = torch.randn(2, 4, 3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
NOTHING  = Conditioning(torch.zeros(2, 1, 1, dtype=torch.float64))


class Network:
    """Answers with a function of its input and remembers what it was asked."""

    def __init__(self, answer=torch.zeros_like):
        self.answer = answer

    def __call__(self, x, t, context, vector):
        self.x, self.t, self.context, self.vector = x, t, context, vector
        return self.answer(x)


@pytest.mark.parametrize("t", [0, 1, 500, 999])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_the_truth_is_found_again(prediction, t):
    """x_vp = √ᾱ·x₀ + √(1−ᾱ)·ε. A network that tells the true ε, v = √ᾱ·ε − √(1−ᾱ)·x₀ or x₀ makes D = x₀."""
    x0, noise = X, torch.randn(X.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    alpha_bar = math.prod(1 - beta for beta in SCHEDULE.betas[:t + 1].tolist())
    a, s      = math.sqrt(alpha_bar), math.sqrt(1 - alpha_bar)
    told      = {"epsilon": noise, "v_prediction": a * noise - s * x0, "sample": x0}[prediction]
    network   = Network(lambda x: told)
    sigma     = s / a
    found     = Denoiser(network, SCHEDULE, prediction)(x0 + sigma * noise, sigma, NOTHING)
    torch.testing.assert_close(found, x0, rtol=0, atol=1e-10)
    torch.testing.assert_close(network.x, a * x0 + s * noise, rtol=0, atol=1e-10)       # it saw x_vp
    assert network.t.item() == pytest.approx(t, abs=1e-4)
    assert SCHEDULE.sigma(t) == pytest.approx(sigma, rel=1e-9)


def test_output_and_to_x0_are_the_two_halves():
    denoiser = Denoiser(Network(torch.sin), SCHEDULE, "v_prediction")
    halves   = denoiser.to_x0(denoiser.output(X, 3.0, NOTHING), X, 3.0)
    assert torch.equal(halves, denoiser(X, 3.0, NOTHING))
    assert torch.equal(denoiser.output(X, 3.0, NOTHING), torch.sin(X / 10**0.5))


@pytest.mark.parametrize(("whole", "expected"), [(False, 500.7), (True, 501.0)])
def test_times_between_whole_ones(whole, expected):
    network = Network()
    Denoiser(network, SCHEDULE, whole_t=whole)(X, SCHEDULE.sigma(500.7), NOTHING)
    assert network.t.item() == pytest.approx(expected, abs=1e-4)
    assert (network.t.shape, network.t.dtype) == ((), torch.float32)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_state_stays_in_its_dtype_and_the_network_runs_in_its_own(dtype):
    network      = Network(torch.cos)
    conditioning = Conditioning(torch.zeros(2, 1, 1, dtype=dtype), concat=torch.ones(2, 1, 3, 3))
    x            = X.float()
    found        = Denoiser(lambda *inputs: network(*inputs)[:, :4], SCHEDULE)(x, 2.0, conditioning)
    assert network.x.dtype == dtype
    assert network.t.dtype == torch.float32                             # 999 of 1000 is beyond bfloat16
    assert found.dtype == torch.float32
    expected = x - 2 * torch.cos((x / 5**0.5).to(dtype)).float()        # rounded there and nowhere else
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_concat_is_joined_after_scaling_and_the_rest_is_passed_on():
    concat       = torch.full((2, 5, 3, 3), 7.0, dtype=torch.float32)
    context      = torch.rand(2, 6, 8, dtype=torch.float64)
    conditioning = Conditioning(context, vector=torch.rand(2, 9, dtype=torch.float64), concat=concat)
    network      = Network(lambda x: x[:, :4])
    Denoiser(network, SCHEDULE)(X, 1.0, conditioning)
    assert network.x.shape == (2, 9, 3, 3)
    torch.testing.assert_close(network.x[:, :4], X / 2**0.5)
    assert (network.x[:, 4:] == 7).all()
    assert network.context is conditioning.context
    assert network.vector is conditioning.vector


def test_gradients_pass():
    x = X.clone().requires_grad_()
    Denoiser(Network(torch.tanh), SCHEDULE)(x, 2.0, NOTHING).sum().backward()
    expected = 1 - 2 / 5**0.5 * (1 - torch.tanh(X / 5**0.5)**2)
    torch.testing.assert_close(x.grad, expected)


def test_an_unknown_prediction():
    with pytest.raises(ValueError, match="prediction is 'noise'; there are 'epsilon', 'v_prediction', 's"):
        Denoiser(Network(), SCHEDULE, "noise")


def test_conditionings_join_along_the_batch():
    a = Conditioning(torch.zeros(1, 5, 3), vector=torch.zeros(1, 2))
    b = Conditioning(torch.ones(2, 5, 3), vector=torch.ones(2, 2))
    joint = Conditioning.cat([a, b])
    assert (len(a), len(b), len(joint)) == (1, 2, 3)
    assert joint.context[:, 0, 0].tolist() == joint.vector[:, 0].tolist() == [0, 1, 1]
    assert joint.concat is None
    with pytest.raises(ValueError, match="Some conditionings have `vector` and some have not"):
        Conditioning.cat([a, Conditioning(b.context)])
