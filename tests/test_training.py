"""The loss side: against diffusers' schedulers, and against the formulas computed another way."""
import pytest
import torch
from torch import nn

from ldm import training
from ldm.denoiser import PREDICTIONS
from ldm.noise_schedule import NoiseSchedule

SCHEDULE = NoiseSchedule.scaled_linear()
SIGMAS = torch.from_numpy(SCHEDULE.table.copy())
T = torch.tensor([0, 1, 250, 500, 900, 999])


def latents(seed: int) -> torch.Tensor:
    return torch.randn(len(T), 4, 3, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def ddpm():
    import diffusers
    return diffusers.DDPMScheduler(beta_start=.00085, beta_end=.012, beta_schedule="scaled_linear",
                                   prediction_type="v_prediction")


def test_the_network_sees_what_diffusers_add_noise_makes():
    x0, noise = latents(0), latents(1)
    seen = []
    def network(x, t, text):
        seen.append((x, t, text))
        return x
    training.denoising_loss(network, x0, noise, T, SIGMAS[T], "text", "epsilon")
    x, t, text = seen[0]
    torch.testing.assert_close(x, ddpm().add_noise(x0, noise, T).double(), atol=2e-6, rtol=0)
    assert t is T
    assert text == "text"


def test_v_is_diffusers_velocity():
    x0, noise = latents(0), latents(1)
    torch.testing.assert_close(training.target("v_prediction", x0, noise, SIGMAS[T]),
                               ddpm().get_velocity(x0, noise, T).double(), atol=3e-6, rtol=0)


def test_float16_stands_pure_noise():
    """σ = 4096, where a schedule with zero terminal SNR begins: its square is no float16."""
    x0, noise, sigma = latents(0).half(), latents(1).half(), torch.full((len(T),), 4096.0)
    seen = []
    training.denoising_loss(lambda x, t, text: seen.append(x) or x, x0, noise, T, sigma, None, "v_prediction")
    torch.testing.assert_close(seen[0], noise, atol=5e-3, rtol=0)
    torch.testing.assert_close(training.target("v_prediction", x0, noise, sigma), -x0, atol=5e-3, rtol=0)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_the_denoiser_turns_the_target_back_into_x0(prediction):
    from ldm.denoiser import Conditioning, Denoiser
    x0, noise = latents(0), latents(1)
    for i, t in enumerate(T):
        sigma = SIGMAS[t:t + 1]
        answer = training.target(prediction, x0[i:i + 1], noise[i:i + 1], sigma)
        denoiser = Denoiser(lambda x, t, context, vector, answer=answer: answer, SCHEDULE, prediction)
        x = training.add_noise(x0[i:i + 1], noise[i:i + 1], sigma)
        found = denoiser(x, sigma.item(), Conditioning(torch.zeros(1, 1, 1, dtype=torch.float64)))
        torch.testing.assert_close(found, x0[i:i + 1], atol=1e-10, rtol=0)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_the_loss_of_the_right_answer_is_zero_and_of_another_its_weighted_square(prediction):
    x0, noise = latents(0), latents(1)
    right, weight = training.target(prediction, x0, noise, SIGMAS[T]), torch.arange(len(T)).double()
    def loss(offset: torch.Tensor) -> float:
        network = lambda *_: right + offset      # noqa: E731
        return training.denoising_loss(network, x0, noise, T, SIGMAS[T], None, prediction, weight).item()
    offset = torch.arange(len(T)).double().view(-1, 1, 1, 1)
    assert loss(0 * offset) == 0
    assert loss(offset) == pytest.approx(sum(i * i**2 for i in range(len(T))) / len(T), rel=1e-12)


def test_the_loss_of_points_in_a_plane():
    x0, noise = latents(0)[:, 0, 0, :2], latents(1)[:, 0, 0, :2]
    right = training.target("sample", x0, noise, SIGMAS[T])
    found = training.denoising_loss(lambda *_: right + .5, x0, noise, T, SIGMAS[T], None, "sample")
    assert found.item() == pytest.approx(.25)


def test_min_snr_weights_the_same_error_of_x0_alike_in_every_prediction():
    snr = 1 / SIGMAS[T]**2
    error_of_x0 = .3
    # x₀ wrong by e means, at fixed x: ε wrong by e/σ, and v wrong by e·√(1+σ²)/σ.
    errors = {"sample": error_of_x0, "epsilon": error_of_x0 / SIGMAS[T],
              "v_prediction": error_of_x0 * (1 + SIGMAS[T]**2).sqrt() / SIGMAS[T]}
    for prediction, error in errors.items():
        weight = training.min_snr_weight(prediction, SIGMAS[T])
        torch.testing.assert_close(weight * error**2, snr.clamp(max=5) * error_of_x0**2)
    t900 = training.min_snr_weight("v_prediction", SIGMAS[900:901]).item()
    assert t900 == pytest.approx(1 / (1 + SIGMAS[900].item()**2), rel=1e-9)


def test_unknown_predictions_name_the_known_ones():
    with pytest.raises(ValueError, match="'epsilon', 'v_prediction', 'sample'"):
        training.target("x0", latents(0), latents(1), SIGMAS[T])
    with pytest.raises(ValueError, match="'epsilon', 'v_prediction', 'sample'"):
        training.min_snr_weight("x0", SIGMAS[T])


def test_timesteps_cover_the_range_and_favour_the_noisy_end_as_asked():
    generator = torch.Generator().manual_seed(0)
    uniform = training.sample_timesteps(100_000, generator=generator)
    assert uniform.dtype == torch.int64
    assert (uniform.min(), uniform.max()) == (0, 999)
    assert (uniform >= 800).float().mean().item() == pytest.approx(.2, abs=.01)
    tilted = training.sample_timesteps(100_000, noisy_share=.25, generator=generator)
    assert (tilted >= 800).float().mean().item() == pytest.approx(.25 + .75 * .2, abs=.01)
    assert training.sample_timesteps(1000, noisy_share=1, noisy_from=900, generator=generator).min() >= 900
    with pytest.raises(ValueError, match="noisy_from is 800; of 500 timesteps"):
        training.sample_timesteps(10, total=500, noisy_share=.1)


def test_what_is_drawn_is_the_generators_alone():
    noise = torch.ones(2, 4, 3, 5)
    for draw in (lambda g: training.sample_timesteps(9, noisy_share=.3, generator=g),
                 lambda g: training.drop_captions(torch.ones(40, 2, 3), torch.zeros(1, 2, 3), .5, g),
                 lambda g: training.offset_noise(noise, .3, g)):
        before = torch.get_rng_state()
        assert draw(torch.Generator().manual_seed(0)).equal(draw(torch.Generator().manual_seed(0)))
        assert torch.get_rng_state().equal(before)


def test_the_largest_uniform_number_is_not_rounded_to_a_time_that_does_not_exist(monkeypatch):
    largest = torch.nextafter(torch.tensor(1.0), torch.tensor(0.0)).item()
    monkeypatch.setattr(torch, "rand", lambda *shape, **_: torch.full(shape, largest))
    assert training.sample_timesteps(3, noisy_share=1).tolist() == [999] * 3
    assert training.sample_timesteps(3).tolist() == [999] * 3


def test_captions_are_dropped_whole_and_as_often_as_asked():
    text, empty = torch.ones(20_000, 2, 3), torch.zeros(1, 2, 3)
    dropped = training.drop_captions(text, empty, .1, torch.Generator().manual_seed(0))
    shares = dropped.mean(dim=(1, 2))
    assert set(shares.unique().tolist()) == {0.0, 1.0}
    assert 1 - shares.mean().item() == pytest.approx(.1, abs=.01)
    assert training.drop_captions(text, empty, 0).equal(text)


def test_offset_noise_moves_whole_channels_and_nothing_else():
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(2000, 4, 3, 5, generator=generator)
    moved = training.offset_noise(noise, .3, generator) - noise
    offsets = moved.mean((2, 3))
    assert (moved - offsets[..., None, None]).abs().max() < 1e-6                 # one number for each channel
    assert abs(offsets.mean()) < .01
    torch.testing.assert_close(torch.cov(offsets.T), .09 * torch.eye(4), atol=.01, rtol=0)
    assert training.offset_noise(noise, 0).equal(noise)
    left = (1 + NoiseSchedule.scaled_linear().sigma_max ** 2) ** -.5              # of the picture, at the end
    assert round(left, 3) == .068


def test_ema_is_the_recursion_and_survives_a_restart():
    module = nn.Linear(3, 2)
    ema, expected = training.EMA(module, decay=.9), module.weight.detach().clone()
    for step in range(200):
        with torch.no_grad():
            module.weight.add_(.1 * torch.randn(2, 3, generator=torch.Generator().manual_seed(step)))
        ema.update(step)
        d = min(.9, (1 + step) / (10 + step))
        expected = d * expected + (1 - d) * module.weight.detach()
    torch.testing.assert_close(ema.average["weight"], expected)

    other = training.EMA(nn.Linear(3, 2))
    other.load_state_dict(ema.state_dict())
    torch.testing.assert_close(other.average["weight"], expected)


def test_ema_swaps_to_the_average_and_back():
    module = nn.Linear(3, 2)
    ema, start = training.EMA(module, decay=.5), module.weight.detach().clone()
    with torch.no_grad():
        module.weight += 1
    ema.swap()
    torch.testing.assert_close(module.weight, nn.Parameter(start))
    ema.swap()
    torch.testing.assert_close(module.weight, nn.Parameter(start + 1))


def test_a_small_network_learns_to_denoise_two_points():
    """Training with these functions, then sampling with the library, gives the data back."""
    from ldm.denoiser import Conditioning, Denoiser
    from ldm.guidance import unguided
    from ldm.schedulers import dpm_solver_pp
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(2, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 1))

    def network(x, t, text, vector=None):
        time = (t.float() / 1000).expand(len(x)).view(-1, 1)
        return layers(torch.cat([x.flatten(1), time], 1)).view_as(x)

    optimiser = torch.optim.Adam(layers.parameters(), 3e-3)
    for _ in range(800):
        x0 = torch.randint(0, 2, (256, 1, 1, 1), generator=generator) * 2. - 1
        t = training.sample_timesteps(256, generator=generator)
        noise = torch.randn(x0.shape, generator=generator)
        loss = training.denoising_loss(network, x0, noise, t, SIGMAS[t].float(), None, "v_prediction")
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    path = SCHEDULE.sigmas(25)
    x = torch.randn(400, 1, 1, 1, generator=generator) * (1 + path[0]**2)**.5
    with torch.no_grad():
        denoise = unguided(Denoiser(network, SCHEDULE, "v_prediction"), Conditioning(torch.zeros(400, 1, 1)))
        *_, x = dpm_solver_pp(denoise, x, path)
    assert (x.abs() - 1).abs().median() < .1
    assert .35 < (x > 0).float().mean() < .65
