"""σ(t), t(σ) and the lists of σ's: against diffusers, scipy and formulas written a second time."""
import copy
import math
import re
from pathlib import Path

import diffusers
import numpy as np
import oracles
import pytest
import torch
from scipy import stats

from ldm import NoiseSchedule, noise_schedule
from ldm.schedulers import SCHEDULERS

SD = oracles.SD_SCHEDULE


# ── The table ───────────────────────────────────────────────────────────────────────────────────────────────

TRAINED = np.geomspace(1e-4, 0.03, 700).tolist()
CONFIGS = {
    "SD":               oracles.SD,
    "linear":           {"beta_schedule": "linear", "beta_start": 0.0001, "beta_end": 0.02},
    "cosine":           {"beta_schedule": "squaredcos_cap_v2"},
    "trained":          {"trained_betas": TRAINED},
    "500 steps":        {**oracles.SD, "num_train_timesteps": 500},
    "class defaults":   {},
    "nulls":            {"beta_schedule": None, "beta_start": None, "trained_betas": None},
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_sigmas_are_those_of_diffusers(kind):
    config = CONFIGS[kind]
    given  = {key: value for key, value in config.items() if value is not None}
    theirs = diffusers.DDIMScheduler.from_config(given)
    ours   = NoiseSchedule.from_hf(config)
    alphas = theirs.alphas_cumprod.double().numpy()                          # from float32 β's, hence 1e-4
    np.testing.assert_allclose(ours.betas, theirs.betas.numpy(), rtol=1e-4)
    np.testing.assert_allclose(1 / (1 + ours.table**2), alphas, rtol=1e-4)
    assert len(ours) == len(alphas)


@pytest.mark.filterwarnings("ignore:__array_wrap__")                  # of diffusers' KDPM2, from numpy
@pytest.mark.parametrize("kind", [
    "DDIM", "DDPM", "PNDM", "EulerDiscrete", "EulerAncestralDiscrete", "HeunDiscrete", "LMSDiscrete", "LCM",
    "DPMSolverSinglestep", "DPMSolverMultistep", "DEISMultistep", "UniPCMultistep", "TCD", "KDPM2Discrete",
    "KDPM2AncestralDiscrete"])
def test_a_file_without_betas_has_those_of_its_class(kind):
    theirs = getattr(diffusers, f"{kind}Scheduler")()
    np.testing.assert_allclose(NoiseSchedule.from_hf({"_class_name": f"{kind}Scheduler"}).betas,
                               theirs.betas.numpy(), rtol=1e-4)


def test_a_file_without_betas_has_those_of_the_sde_class_which_needs_another_package():
    source = (Path(diffusers.__file__).parent / "schedulers/scheduling_dpmsolver_sde.py").read_text("utf-8")
    start, end, kind = (re.search(rf"{field}: .* = (\S+),", source)[1]
                        for field in ("beta_start", "beta_end", "beta_schedule"))
    theirs = NoiseSchedule.from_hf({"beta_start": float(start), "beta_end": float(end),
                                    "beta_schedule": kind.strip('"')})
    ours   = NoiseSchedule.from_hf({"_class_name": "DPMSolverSDEScheduler"})
    np.testing.assert_array_equal(ours.betas, theirs.betas)
    assert ours.betas[0] != NoiseSchedule.from_hf({}).betas[0]


@pytest.mark.parametrize("kind", ["SD", "linear", "cosine"])
def test_zero_terminal_snr_is_that_of_diffusers(kind):
    config   = {**CONFIGS[kind], "rescale_betas_zero_snr": True}
    ours     = NoiseSchedule.from_hf(config)
    for cls, end in ((diffusers.EulerDiscreteScheduler, 2.0**-24), (diffusers.DDIMScheduler, 0.0)):
        alphas = cls.from_config(config).alphas_cumprod.double().numpy()
        np.testing.assert_allclose(1 / (1 + ours.table[:-1]**2), alphas[:-1], rtol=1e-4, atol=1e-9)
        assert alphas[-1] == end
    assert ours.betas[-1] == 1
    if kind != "linear":                                            # whose ᾱ falls below 2⁻²⁴ before the end
        assert ours.sigma_max == pytest.approx(4096, rel=1e-6)      # √(2²⁴ − 1) stands for ∞
    assert 4000 < ours.sigma_max < 1e5
    assert ours.t(ours.sigma_max) == 999


def test_zero_terminal_snr_is_the_papers_algorithm():
    """Lin et al. 2023, Algorithm 1, line by line."""
    betas = SD.betas
    alphas_bar_sqrt = np.sqrt(np.cumprod(1 - betas))
    first, last = alphas_bar_sqrt[0], alphas_bar_sqrt[-1]
    alphas_bar_sqrt = (alphas_bar_sqrt - last) * first / (first - last)
    ours = SD.zero_terminal_snr()
    np.testing.assert_allclose(np.sqrt(np.cumprod(1 - ours.betas)), alphas_bar_sqrt, rtol=1e-9, atol=1e-12)
    assert ours.betas[0] == pytest.approx(betas[0])


def test_the_numbers_of_stable_diffusion():
    np.testing.assert_array_equal(NoiseSchedule.scaled_linear().betas, SD.betas)
    assert (round(SD.sigma_min, 4), round(SD.sigma_max, 4)) == (0.0292, 14.6146)
    assert SD.sigma_min == SD.sigma(0) == SD.table[0]
    assert SD.sigma_max == SD.sigma(999) == SD.table[-1]


def test_t_and_sigma_are_inverse():
    for t in [0, 1, 0.25, 17.5, 998.999, 999]:
        assert SD.t(SD.sigma(t)) == pytest.approx(t, abs=1e-9)
    assert SD.sigma(10.25) == pytest.approx(0.75 * SD.table[10] + 0.25 * SD.table[11])     # linear in between
    assert (SD.sigma(-1), SD.sigma(2000)) == (SD.sigma_min, SD.sigma_max)
    assert (SD.t(0.0), SD.t(1e9)) == (0, 999)
    assert SD.t(SD.midpoint(SD.sigma(100), SD.sigma(201))) == pytest.approx(150.5)


def test_a_schedule_cannot_change():
    betas = SD.betas.copy()
    made  = NoiseSchedule(betas)
    betas[0] = 0.5
    np.testing.assert_array_equal(made.betas, SD.betas)
    for array in (made.betas, made.table):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 1
    assert {made: "hashable"}[made] == "hashable"
    np.testing.assert_array_equal(copy.deepcopy(made).table, SD.table)


@pytest.mark.parametrize(("betas", "message"), [
    ([0.1], "at least two numbers"), ([[0.1, 0.2]], "at least two numbers"), ([0.1, 1.5], "below 1"),
    ([0.1, -0.1], "above 0"), ([0.1, math.nan], "above 0"), ([1.0, 1.0], "only the last may be 1"),
    ([0.0, 0.1], "above 0"), ([0.1, 0.0, 0.1], "above 0"), ([0.1, 1e-20], "grow"),
])
def test_impossible_betas(betas, message):
    with pytest.raises(ValueError, match=message):
        NoiseSchedule(np.array(betas))


def test_an_unknown_beta_schedule():
    with pytest.raises(ValueError, match="beta_schedule = 'sigmoid'; implemented are 'linear'"):
        NoiseSchedule.from_hf({"beta_schedule": "sigmoid"})


# ── Times ───────────────────────────────────────────────────────────────────────────────────────────────────

COUNTS = (1, 2, 3, 9, 27, 50, 999, 1000)
DPM    = {name for name, row in SCHEDULERS.items() if row.drop_last}


def our_times(name, config, steps):
    return [SD.t(sigma) for sigma in SCHEDULERS[name].sigmas(SD, steps, config=config)[:-1]]


def their_times(name, config, steps):
    """Where the steps of diffusers' scheduler begin: Heun and PLMS list some times twice."""
    scheduler = oracles.their_scheduler(SCHEDULERS[name], config)
    scheduler.set_timesteps(steps)
    times = scheduler.timesteps
    return (times.unique_consecutive() if name in ("heun", "pndm") else times).tolist()


def beyond_the_table(name, spacing, steps):
    """Where diffusers leaves the model's times or repeats one; the next two tests are about ours there."""
    return (spacing == "leading" and name not in ("dpm", "dpm_3") and steps + (name in DPM) >= 1000
            or spacing == "linspace" and name in DPM and steps == 1000
            or name in ("dpm", "dpm_3") and steps == 1000
            or name == "lcm" and steps > 50)


@pytest.mark.parametrize("spacing", oracles.SPACINGS)
@pytest.mark.parametrize("name", [name for name in SCHEDULERS if name != "pndm_prk"])   # see test_schedulers
def test_times_are_those_of_diffusers(name, spacing):
    config = oracles.config_of(spacing)
    for steps in COUNTS:
        if not beyond_the_table(name, spacing, steps):
            theirs = their_times(name, config, steps)
            assert our_times(name, config, steps) == pytest.approx(theirs, abs=1e-4), steps


def test_leading_times_stay_in_the_table():
    """steps_offset=1 with all 1000 steps: diffusers asks for t = 1000 (its issue 10003), and its DPM-Solver++
    a thousand times for t = 1."""
    for name in SCHEDULERS.keys() - {"dpm", "dpm_3", "lcm"}:
        ours = our_times(name, oracles.config_of("leading"), 1000)
        assert ours == pytest.approx(range(999, -1, -1)), name
    assert their_times("ddim", oracles.config_of("leading"), 1000)[0] == 1000
    assert set(their_times("dpmpp_2m", oracles.config_of("leading"), 1000)) == {1}


@pytest.mark.parametrize("name", sorted(DPM))
def test_no_time_is_visited_twice(name):
    """1001 rounded points between 0 and 999: two of diffusers' are the same, a step of length zero."""
    config = oracles.config_of("linspace")
    ours   = our_times(name, config, 1000)
    assert len(set(their_times(name, config, 1000))) == 999
    assert all(b < a for a, b in zip(ours, ours[1:], strict=False))
    assert ours[0] == 999


RAMPED = [name for name, row in SCHEDULERS.items() if row.ramps and row.last != "sigma_min"]


@pytest.mark.parametrize("ramp", oracles.RAMPS)
@pytest.mark.parametrize("name", RAMPED)
def test_ramps_are_those_of_diffusers(name, ramp):
    """σ's to 1.3e-5, the precision of 1 − ᾱ at t = 0 in float32. Times: between whole t, σ is linear here and
    log σ is there, which makes up to .05; the DPM classes have whole times."""
    row, config = SCHEDULERS[name], oracles.config_of(ramp)
    for steps in (2, 3, 9, 50):
        scheduler = oracles.their_scheduler(row, config)
        scheduler.set_timesteps(steps)
        whole = {"karras": 0.5, "exponential": 1, "beta": 1}[ramp]        # rounded or, wrongly, cut off
        same  = slice(None, None, 2) if name == "heun" else slice(None)          # Heun lists two of each
        ours  = row.sigmas(SD, steps, config=config)
        np.testing.assert_allclose(ours, [*scheduler.sigmas[:-1].tolist()[same], 0.0], rtol=2e-5)
        np.testing.assert_allclose(our_times(name, config, steps), scheduler.timesteps.tolist()[same],
                                   atol=whole if row.whole else 0.05)


def test_a_ramp_has_the_whole_trained_range():
    """diffusers' Euler, Heun and LMS take the range from the model's spacing: with SDXL's "leading" it misses
    the noisiest times (its issue 5077), and a single step is one of σ_min. Its DPM classes, k-diffusion and
    ours take the trained range."""
    for name in ("euler", "heun", "lms"):
        for config, steps, theirs in ((oracles.config_of("karras", timestep_spacing="leading"), 20, 11.0336),
                                      (oracles.config_of("karras"), 1, 0.029168)):
            scheduler = oracles.their_scheduler(SCHEDULERS[name], config)
            scheduler.set_timesteps(steps)
            assert scheduler.sigmas[0].item() == pytest.approx(theirs, rel=1e-3)
            assert SCHEDULERS[name].sigmas(SD, steps, config=config)[0] == pytest.approx(14.6146, abs=1e-3)
    config    = oracles.config_of("karras", timestep_spacing="leading")
    scheduler = oracles.their_scheduler(SCHEDULERS["dpmpp_2m"], config)
    scheduler.set_timesteps(20)
    assert scheduler.sigmas[0].item() == pytest.approx(14.6146, abs=1e-3)


# ── The ramps themselves ────────────────────────────────────────────────────────────────────────────────────

LOW, HIGH = 0.0292, 14.6146


@pytest.mark.parametrize("steps", [1, 2, 5, 33])
def test_karras_is_equation_5_of_edm(steps):
    first, last = HIGH ** (1 / 7), LOW ** (1 / 7)
    expected    = [(first + i / (steps - 1 or 1) * (last - first)) ** 7 for i in range(steps)]
    np.testing.assert_allclose(noise_schedule.karras(steps, LOW, HIGH), expected, rtol=1e-12)


@pytest.mark.parametrize("rho", [1.0, 2.0, 0.5])
@pytest.mark.parametrize("steps", [1, 2, 5, 33])
def test_polyexponential_is_that_of_k_diffusion(steps, rho):
    """σ_i = exp(log σ_min + (1 − i/(n−1))^ρ · (log σ_max − log σ_min)); ρ = 1 is exponential."""
    expected = [LOW * (HIGH / LOW) ** ((1 - i / (steps - 1 or 1)) ** rho) for i in range(steps)]
    np.testing.assert_allclose(noise_schedule.polyexponential(steps, LOW, HIGH, rho), expected, rtol=1e-12)
    if rho == 2:
        assert np.array_equal(noise_schedule.polyexponential(steps, LOW, HIGH),
                              noise_schedule.polyexponential(steps, LOW, HIGH, rho))
    if rho == 1:
        np.testing.assert_allclose(noise_schedule.exponential(steps, LOW, HIGH), expected, rtol=1e-12)


@pytest.mark.parametrize("alpha", [0.6, 0.5, 1.0])
def test_beta_is_that_of_scipy(alpha):
    for steps in (1, 2, 3, 20, 101):
        expected = LOW + stats.beta.ppf(np.linspace(1, 0, steps), alpha, alpha) * (HIGH - LOW)
        np.testing.assert_allclose(noise_schedule.beta(steps, LOW, HIGH, alpha), expected, rtol=1e-9)


@pytest.mark.parametrize("ramp", noise_schedule.RAMPS)
def test_every_ramp_falls_from_end_to_end(ramp):
    for steps in (1, 2, 3, 9, 27, 1000):
        for last, end in (("zero", 0.0), ("sigma_min", SD.sigma_min)):
            sigmas = SD.sigmas(steps, ramp, last=last)
            assert len(sigmas) == steps + 1
            assert sigmas[0] == pytest.approx(SD.sigma_max)
            assert sigmas[-1] == pytest.approx(end)
            assert all(b < a for a, b in zip(sigmas, sigmas[1:], strict=False))
            if last == "zero" and steps > 1:
                assert sigmas[-2] == pytest.approx(SD.sigma_min)


# ── Lists of σ's ────────────────────────────────────────────────────────────────────────────────────────────

def test_the_spacings_of_lin_et_al():
    """Table 2 of the paper, T = 1000 and ten steps; its times count from 1, ours from 0."""
    assert SD.timesteps(10, "leading").tolist()  == [900, 800, 700, 600, 500, 400, 300, 200, 100, 0]
    assert SD.timesteps(10, "linspace").tolist() == [999, 888, 777, 666, 555, 444, 333, 222, 111, 0]
    assert SD.timesteps(10, "trailing").tolist() == [999, 899, 799, 699, 599, 499, 399, 299, 199, 99]
    assert SD.timesteps(10, "leading", offset=1)[-1] == 1
    assert SD.timesteps(4, "trailing").tolist() == [999, 749, 499, 249]               # SDXL-Turbo
    assert SD.timesteps(2, "linspace", drop_last=True).tolist() == [999, 500]
    assert SD.timesteps(4, "linspace", whole=False).tolist() == [999, 666, 333, 0]
    assert SD.timesteps(3, "linspace", whole=False)[1] == 499.5


def test_the_last_sigma():
    assert SD.sigmas(5)[-1] == 0
    assert SD.sigmas(5, last="sigma_min")[-1] == SD.sigma_min
    assert SD.sigmas(5)[:-1] == SD.sigmas(5, last="sigma_min")[:-1]
    assert SCHEDULERS["ddim"].sigmas(SD, 5, config={"set_alpha_to_one": True})[-1] == 0
    assert SCHEDULERS["ddim"].sigmas(SD, 5, config={})[-1] == 0                       # diffusers' default
    assert SCHEDULERS["ddim"].sigmas(SD, 5, config=oracles.SD)[-1] == SD.sigma_min
    assert SCHEDULERS["pndm"].sigmas(SD, 5, config={"set_alpha_to_one": None})[-1] == SD.sigma_min
    for name in ("euler", "dpmpp_2m", "dpmpp_3m", "dpmpp_2m_sde"):
        assert SCHEDULERS[name].sigmas(SD, 5, config={"final_sigmas_type": "sigma_min"})[-1] == SD.sigma_min
    both = {"final_sigmas_type": "sigma_min", "set_alpha_to_one": False}
    for name in ("lms", "heun", "euler_a", "ddpm"):                     # their classes have neither field
        assert SCHEDULERS[name].sigmas(SD, 5, config=both)[-1] == 0


def test_an_argument_goes_before_the_file():
    euler, ddim = SCHEDULERS["euler"], SCHEDULERS["ddim"]
    config = oracles.config_of("karras")
    ramp   = noise_schedule.karras(5, SD.sigma_min, SD.sigma_max).tolist()
    assert euler.sigmas(SD, 5, config=config)[:-1] == ramp
    assert euler.sigmas(SD, 5, spacing="trailing", config=config) == SD.sigmas(5, "trailing")
    assert ddim.sigmas(SD, 5, config=config) == ddim.sigmas(SD, 5, config=oracles.SD)       # heeds no ramp
    assert ddim.sigmas(SD, 5, spacing="karras")[:-1] == ramp


@pytest.mark.parametrize("name", ["FlowMatchEulerDiscreteScheduler", "EDMEulerScheduler"])
def test_a_file_without_betas_is_refused(name):
    with pytest.raises(ValueError, match=f"is of {name}: its model was trained on other noise levels"):
        NoiseSchedule.from_hf({"_class_name": name, "num_train_timesteps": 1000, "shift": 3.0})


@pytest.mark.parametrize(("arguments", "message"), [
    ({"steps": 0}, "steps is 0; it must be a whole"), ({"steps": -3, "spacing": "karras"}, "at least 1"),
    ({"steps": 2.5}, "steps is 2.5; it must be a whole"), ({"steps": "5", "spacing": "beta"}, "'5'; it"),
    ({"steps": 1001}, "knows 1000 times: use at most that many"),
    ({"steps": 1001, "spacing": "linspace"}, "at most that many"),
    ({"steps": 5, "spacing": "sideways"}, "spacing is 'sideways'; there are 'leading', 'linspace', 'tr"),
    ({"steps": 5, "last": "one"}, "last is 'one'; there are 'zero' and 'sigma_min'"),
])
def test_impossible_spacings(arguments, message):
    with pytest.raises(ValueError, match=message):
        SD.sigmas(**arguments)


def test_more_steps_than_times():
    assert len(SD.sigmas(2500, "linspace", whole=False)) == 2501
    assert len(SD.sigmas(2500, "karras")) == 2501


@pytest.mark.parametrize("sigmas", [[], [1.0], [1.0, 1.0], [1.0, 2.0], [1.0, -0.1], [math.inf, 1.0],
                                    [1.0, math.nan], [math.nan, 0.0]])
def test_a_list_of_ones_own_is_checked(sigmas):
    with pytest.raises(ValueError, match="at least two falling numbers"):
        noise_schedule.check_sigmas(sigmas)


def test_a_list_of_ones_own_may_be_anything_that_falls():
    assert noise_schedule.check_sigmas(torch.tensor([5.0, 1.0, 0.0])) == [5, 1, 0]
    assert noise_schedule.check_sigmas((3, 0.5)) == [3, 0.5]
