"""The table of schedulers against diffusers': the same numbers; and where not, why, measured."""
import inspect
import warnings

import diffusers
import numpy as np
import oracles
import pytest
import torch
from oracles import SD_SCHEDULE, Gaussian, config_of, draws, relative, run_ours, run_theirs, their_scheduler

from ldm import NoiseSchedule, schedulers
from ldm.schedulers import SCHEDULERS, default_name, find

CASES = [(name, spacing, prediction) for prediction in oracles.PREDICTIONS for name, row in SCHEDULERS.items()
         for spacing in oracles.SPACINGS + oracles.RAMPS * row.ramps
         if any(not oracles.differs_on_purpose(name, spacing, steps) for steps in oracles.STEPS)]


@pytest.mark.parametrize(("name", "spacing", "prediction"), CASES, ids=["-".join(case) for case in CASES])
def test_equals_diffusers(name, spacing, prediction):
    difference, times = oracles.tolerances(name, spacing, prediction)
    for steps in oracles.STEPS:
        if not oracles.differs_on_purpose(name, spacing, steps):
            found = oracles.compare(name, spacing, prediction, steps)
            assert found.calls[0] == found.calls[1], steps
            assert found.times <= times, steps
            assert found.difference <= difference, steps


def same(name, config, steps=10, network=oracles.curved, options=None, tolerance=1e-5, **arguments):
    """Both runs, equal; returns ours."""
    ours   = run_ours(SCHEDULERS[name], config, steps, network, options=arguments.pop("our_options", options))
    theirs = run_theirs(SCHEDULERS[name], config, steps, network, options=options, **arguments)
    assert relative(ours.x, theirs.x) <= tolerance
    return ours.x


@pytest.mark.parametrize("prediction", oracles.PREDICTIONS)
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_ddim_with_any_eta(eta, prediction):
    for steps in (1, 2, 20):
        same("ddim", config_of("leading", prediction), steps, options={"eta": eta})


def test_ddim_with_eta_1_is_ddpm_and_euler_ancestral():
    config = config_of("trailing", set_alpha_to_one=True)
    ddim   = run_ours(SCHEDULERS["ddim"], config, 10, options={"eta": 1.0}).x
    ddpm   = run_ours(SCHEDULERS["ddpm"], config, 10).x
    assert torch.equal(ddim, ddpm)
    start  = draws(1)[0] * (1 + SD_SCHEDULE.sigma_max**2)**0.5
    assert relative(run_ours(SCHEDULERS["euler_a"], config, 10, x=start).x, ddpm) <= 1e-12


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_lms_of_every_order(order):
    for steps in (1, 2, 5, 20):
        same("lms", config_of("linspace"), steps, options={"order": order})


@pytest.mark.parametrize(("name", "order"), [
    ("dpm", 1), ("dpm", 2), ("dpm", 3), ("dpmpp_2m", 1), ("dpmpp_2m", 2), ("dpmpp_2m", 3),
    ("dpmpp_2m_sde", 1), ("dpmpp_2m_sde", 2)])
def test_dpm_solvers_of_every_order(name, order):
    for steps in (1, 2, 5, 14, 15, 20):                                     # the end differs below 15 steps
        same(name, config_of(), steps, our_options={"order": order}, solver_order=order)


@pytest.mark.parametrize("name", ["ddim", "pndm", "euler", "dpmpp_2m", "dpmpp_3m", "dpmpp_2m_sde"])
def test_both_ends(name):
    field  = "final_sigmas_type" if SCHEDULERS[name].last_field == "final_sigmas_type" else "set_alpha_to_one"
    values = ("zero", "sigma_min") if field == "final_sigmas_type" else (True, False)
    for steps in (2, 14, 15, 20):                             # below 15 steps DPM-Solver++ ends otherwise
        ends = [same(name, config_of(**{field: value}), steps) for value in values]
        assert relative(*ends) > 1e-3


@pytest.mark.parametrize("taught", [25, 50, 100])
def test_lcm_chooses_from_the_times_it_was_taught(taught):
    row, config = SCHEDULERS["lcm"], config_of(original_inference_steps=taught)
    theirs = their_scheduler(row, config)
    for steps in range(1, taught + 1):
        theirs.set_timesteps(steps)
        ours = [SD_SCHEDULE.t(sigma) for sigma in row.sigmas(SD_SCHEDULE, steps, config=config)[:-1]]
        assert ours == pytest.approx(theirs.timesteps.tolist(), abs=1e-6), steps
    with pytest.raises(ValueError, match=f"steps is {taught + 1}, but the model was taught {taught} of 1000"):
        row.sigmas(SD_SCHEDULE, taught + 1, config=config)
    assert row.sigmas(SD_SCHEDULE, 3, spacing="trailing", config=config) == SD_SCHEDULE.sigmas(3, "trailing")


@pytest.mark.parametrize("t", [19, 39, 999])
def test_what_lcm_leaves_out_is_small(t):
    """Its authors' parametrisation mixes some of x_vp into D, and makes D a little smaller."""
    theirs = their_scheduler(SCHEDULERS["lcm"], oracles.SD)
    c_skip, c_out = theirs.get_scalings_for_boundary_condition_discrete(t)
    assert 0 < c_skip < 7e-6
    assert 1 - c_out < 4e-6


SCHEDULES = {"linear": {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02},
             "cosine": {"beta_schedule": "squaredcos_cap_v2"},
             "trained": {"trained_betas": np.geomspace(1e-4, 0.03, 1000).tolist()}}


@pytest.mark.parametrize("kind", SCHEDULES)
@pytest.mark.parametrize("name", ["ddim", "pndm", "euler", "heun", "lms", "dpmpp_2m", "euler_a"])
def test_other_noise_schedules(name, kind):
    """Leading: away from the far end, where diffusers' float32 does not tell ᾱ from 0 (cosine: 2e-9)."""
    same(name, config_of("leading", **SCHEDULES[kind]), 10)


@pytest.mark.parametrize("name", ["ddim", "euler", "euler_a", "dpmpp_2m"])
def test_zero_terminal_snr(name):
    """diffusers has σ = 4096 at the end too, but for DDIM, where ᾱ = 0: x₀ = −v there, and here a 4096th part
    of the input more."""
    config    = config_of("trailing", "v_prediction", rescale_betas_zero_snr=True)
    tolerance = 1e-5 if name != "ddim" else 3 / 4096
    for steps in (1, 5, 20):
        same(name, config, steps, tolerance=tolerance)


# ── Where diffusers differs, and why we do ──────────────────────────────────────────────────────────────────

GAUSSIAN = Gaussian()
POINT    = Gaussian(std=torch.zeros(1, 4, dtype=torch.float64))


def errors(name, config, steps, prediction="epsilon", skip=0, data=GAUSSIAN):
    """Distance of (our end, diffusers' end) from the exact solution through the start, on Gaussian data."""
    row    = SCHEDULERS[name]
    config = {**config, "prediction_type": prediction}
    their  = their_scheduler(row, config)
    their.set_timesteps(steps)
    start  = SD_SCHEDULE.sigma(float(their.timesteps[skip * their.order]))
    sigmas = row.sigmas(SD_SCHEDULE, steps, config=config)
    ours_from, end = sigmas[skip], sigmas[-1]

    def unit(sigma):                                                # of the states of diffusers' class
        return (1 + sigma**2)**0.5 if row.start_vp else 1
    perfect = data.network(SD_SCHEDULE, prediction)
    ours    = run_ours(row, config, steps, perfect, x=data.state(ours_from), skip=skip).x * unit(end)
    x_start = data.state(start) / unit(start)
    theirs  = run_theirs(row, config, steps, perfect, x=x_start, skip=skip).x * unit(end)
    return ((ours - data.exact(data.state(ours_from), ours_from, end)).abs().max().item(),
            (theirs - data.exact(data.state(start), start, end)).abs().max().item())


@pytest.mark.parametrize("spacing", ["linspace", "trailing"])
@pytest.mark.parametrize("name", ["ddim", "pndm", "pndm_prk"])
def test_the_next_time_is_the_next_of_the_list(name, spacing):
    """diffusers' DDIM and PNDM step from t to t − ⌊T/N⌋, and are evaluated next at the time that the list
    says, which is another for "linspace", and for "trailing" where N does not divide T (its issue 9261). On
    data that is a single point the solution is a straight line and every method is exact; theirs misses it.
    With many steps its error grows."""
    steps = 20 if spacing == "linspace" else 19
    assert oracles.differs_on_purpose(name, spacing, steps)
    ours, theirs = errors(name, config_of(spacing), steps, data=POINT)
    assert ours < 1e-5
    assert theirs > 4e-4
    ours, theirs = errors(name, config_of(spacing), 300)
    assert theirs > 10 * ours


@pytest.mark.parametrize("name", ["pndm", "pndm_prk"])
def test_pndm_takes_epsilon(name):
    """The paper's method combines ε's. diffusers combines the v's of different times as if they were one
    quantity, and has no x₀-prediction at all; `oracles.compare` therefore gives it ε."""
    ours, theirs = errors(name, config_of("leading"), 20, "v_prediction")
    assert theirs > 2 * ours
    with pytest.raises(ValueError, match="must be one of `epsilon` or `v_prediction`"):
        run_theirs(SCHEDULERS[name], config_of("leading", "sample"), 10)
    with pytest.raises(NotImplementedError):
        run_theirs(SCHEDULERS["euler_a"], config_of("leading", "sample"), 10)


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_runge_kutta_start_with_fewer_steps_than_it_takes(steps):
    with pytest.raises(ValueError, match="could not be broadcast"):
        run_theirs(SCHEDULERS["pndm_prk"], config_of("leading"), steps)
    ours = run_ours(SCHEDULERS["pndm_prk"], config_of("leading"), steps)
    assert len(ours.times) == 4 * steps                                     # all of them Runge–Kutta steps


@pytest.mark.parametrize("steps", [9, 27])
def test_runge_kutta_start_where_the_middle_is_no_whole_time(steps):
    """⌊T/N⌋ odd: the middle lies between two times. diffusers takes the earlier one, we the σ in between. A
    small difference that neither gains nor loses on Gaussian data."""
    config = config_of("leading")
    ours, theirs = (run(SCHEDULERS["pndm_prk"], config, steps).x for run in (run_ours, run_theirs))
    assert 1e-5 < relative(ours, theirs) < 1e-3
    ours, theirs = errors("pndm_prk", config, steps)
    assert ours == pytest.approx(theirs, rel=0.02)


@pytest.mark.parametrize("ramp", oracles.RAMPS)
@pytest.mark.parametrize("name", ["euler", "heun", "lms"])
def test_a_single_step_starts_at_the_top(name, ramp):
    config = config_of(ramp)
    assert run_theirs(SCHEDULERS[name], config, 1).times == [0.0]
    assert run_ours(SCHEDULERS[name], config, 1).times == [999.0]


@pytest.mark.parametrize("ramp", oracles.RAMPS)
@pytest.mark.parametrize("name", ["dpm", "dpm_3"])
def test_a_ramp_that_ends_at_sigma_min_reaches_it_once(name, ramp):
    """diffusers appends σ_min to a ramp that is there already, and so has one interval less than asked for.
    On its σ's, ours gives its result."""
    row = SCHEDULERS[name]
    for steps in (2, 3, 5, 20):
        scheduler = their_scheduler(row, config_of(ramp))
        scheduler.set_timesteps(steps)
        theirs = scheduler.sigmas.tolist()
        assert theirs[-1] == pytest.approx(theirs[-2], rel=1e-5)
        ours   = row.sigmas(SD_SCHEDULE, steps, config=config_of(ramp))
        assert len(ours) == len(theirs)
        assert ours[-1] < 0.95 * ours[-2]
        theirs[-1] = theirs[-2]
        found  = run_ours(row, config_of(ramp), steps, oracles.curved_timeless, sigmas=theirs).x
        wanted = run_theirs(row, config_of(ramp), steps, oracles.curved_timeless).x
        assert relative(found, wanted) < 2e-5, steps


@pytest.mark.parametrize("name", ["dpmpp_2m", "dpmpp_3m", "dpmpp_2m_sde"])
def test_times_are_rounded_not_cut_off(name):
    """diffusers hands the network int64 times; without "karras" it forgets to round first, and 998.9999
    becomes 998. Where two σ's share a time it loses its place and leaves the list."""
    for ramp in ("exponential", "beta"):
        ours, theirs = (run(SCHEDULERS[name], config_of(ramp), 20).times for run in (run_ours, run_theirs))
        sigmas = SCHEDULERS[name].sigmas(SD_SCHEDULE, 20, config=config_of(ramp))
        exact  = [SD_SCHEDULE.t(sigma) for sigma in sigmas[:-1]]
        assert ours == [round(t) for t in exact]
        assert theirs[0] == 998
        assert np.abs(np.subtract(theirs, exact)).max() > 0.75
    with pytest.raises(IndexError):
        run_theirs(SCHEDULERS[name], config_of("beta"), 50)
    assert run_ours(SCHEDULERS[name], config_of("beta"), 50).x.isfinite().all()


# ── From the middle ─────────────────────────────────────────────────────────────────────────────────────────

ODE_ROWS = [name for name, row in SCHEDULERS.items() if not row.stochastic or name == "ddim"]


@pytest.mark.parametrize("name", ODE_ROWS)
def test_a_start_in_the_middle_is_as_good_as_one_at_the_top(name):
    """Image to image at strength .5 and .25 with 20 steps, where the exact solution is known."""
    full, _ = errors(name, config_of(), 20)
    for skip in (10, 15):
        assert errors(name, config_of(), 20, skip=skip)[0] < 1.4 * full


@pytest.mark.parametrize(("name", "factor"), [("lms", 10), ("pndm", 5), ("pndm_prk", 100)])
def test_where_diffusers_fails_in_the_middle(name, factor):
    """It takes the order from the absolute step number, and weighs a history that it does not have."""
    assert errors(name, config_of(), 20)[1] == pytest.approx(errors(name, config_of(), 20)[0], rel=1e-2)
    ours, theirs = errors(name, config_of(), 20, skip=10)
    assert theirs > factor * ours


@pytest.mark.parametrize("name", ["ddim", "euler", "heun", "dpmpp_2m"])
def test_a_start_in_the_middle_equals_diffusers_where_that_is_right(name):
    ours, theirs = errors(name, config_of(), 20, skip=10)
    assert ours == pytest.approx(theirs, rel=1e-3)


# ── The contract ────────────────────────────────────────────────────────────────────────────────────────────

@pytest.mark.parametrize("steps", [1, 2, 3, 9, 27, 1000])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_any_number_of_steps(name, steps):
    config = config_of(original_inference_steps=1000)
    ours   = run_ours(SCHEDULERS[name], config, steps)
    assert ours.x.isfinite().all()
    per_step = {"heun": 2, "pndm_prk": 4}.get(name, 1)
    assert steps <= len(ours.times) <= per_step * steps + (name == "pndm")


@pytest.mark.parametrize("name", SCHEDULERS)
def test_one_state_a_step_on_demand_and_nothing_in_place(name):
    row    = SCHEDULERS[name]
    sigmas = row.sigmas(SD_SCHEDULE, 6, config=oracles.SD)
    calls  = []
    x      = GAUSSIAN.state(sigmas[0])
    before = x.clone()

    def denoise(x, sigma):
        assert isinstance(sigma, float)
        calls.append(sigma)
        return GAUSSIAN.denoise(x, sigma)
    noise  = {"noise": lambda i: torch.full_like(x, i + 1)} if row.stochastic else {}
    states = row.function(denoise, x, sigmas, **row.options(SD_SCHEDULE), **noise)
    assert inspect.isgenerator(states)
    assert calls == []
    kept, copies = [], []
    for state in states:
        kept.append(state)
        copies.append(state.clone())
        assert len(calls) <= 4 * len(kept)                                  # no call ahead of its step
    assert len(kept) == 6
    assert torch.equal(x, before)
    assert all(torch.equal(a, b) for a, b in zip(kept, copies, strict=True))
    assert all(state.dtype == torch.float64 for state in kept)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_float32_states_stay_float32(name):
    row    = SCHEDULERS[name]
    sigmas = row.sigmas(SD_SCHEDULE, 6, config=oracles.SD)
    gauss  = Gaussian(GAUSSIAN.mean.float(), GAUSSIAN.std.float())
    noise  = {"noise": lambda i: torch.ones(1, 4)} if row.stochastic else {}
    start  = GAUSSIAN.state(sigmas[0])
    named  = {**row.options(SD_SCHEDULE), **noise}
    *_, x  = row.function(gauss.denoise, start.float(), sigmas, **named)
    *_, y  = row.function(GAUSSIAN.denoise, start, sigmas, **named)
    assert x.dtype == torch.float32
    assert relative(x.double(), y) < 1e-5


@pytest.mark.parametrize("spacing", oracles.SPACINGS)
@pytest.mark.parametrize("name", SCHEDULERS)
def test_the_start_is_scaled_as_diffusers_does(name, spacing):
    row, config = SCHEDULERS[name], config_of(spacing)
    theirs = their_scheduler(row, config)
    theirs.set_timesteps(20)
    sigma  = row.sigmas(SD_SCHEDULE, 20, config=config)[0]
    vp     = (1 + sigma**2)**0.5 if row.start_vp else 1
    scale  = float(theirs.init_noise_sigma) * vp
    assert row.start_scale(sigma, config=config) == pytest.approx(scale, rel=1e-5)
    assert row.start_scale(sigma, spacing=spacing) == row.start_scale(sigma, config=config)
    assert row.start_scale(sigma, spacing="karras", config=config) == row.start_scale(sigma, config=config)


@pytest.mark.parametrize(("function", "options"), [
    ("lms", {"order": 0}), ("lms", {"order": 5}), ("dpm_solver", {"order": 4}), ("dpm_solver", {"order": 0}),
    ("dpm_solver_pp", {"order": 4}), ("dpm_solver_pp_sde", {"order": 3, "noise": None}),
])
def test_orders_that_do_not_exist(function, options):
    with pytest.raises(ValueError, match=f"{function} has orders 1 .*; got {options['order']}"):
        next(getattr(schedulers, function)(GAUSSIAN.denoise, GAUSSIAN.state(1), [1.0, 0.0], **options))


def test_churn_needs_noise():
    with pytest.raises(ValueError, match="heun with churn > 0 needs `noise`"):
        next(schedulers.heun(GAUSSIAN.denoise, GAUSSIAN.state(1), [1.0, 0.0], churn=10))


@pytest.mark.parametrize(("churn", "low", "high", "factor"), [
    (40, 0.05, 50, 1.003), (5, 0, float("inf"), 1), (1000, 0.3, 3, 1.007), (0, 0, float("inf"), 1),
])
def test_heun_with_churn_is_algorithm_2_of_edm(churn, low, high, factor):
    """Karras et al. 2022, Algorithm 2, transcribed line by line."""
    t     = [*np.geomspace(14.6, 0.03, 18), 0.0]
    N     = len(t) - 1
    mean, std, start = (a.numpy() for a in (GAUSSIAN.mean, GAUSSIAN.std, GAUSSIAN.state(t[0])))
    noise = [a.numpy() for a in draws(N, (1, 4))]

    def D(x, sigma):
        return np.tanh(x / (1 + sigma)) + mean * std**2 / (std**2 + sigma**2)
    x = start
    for i in range(N):
        epsilon = factor * noise[i]
        gamma   = min(churn / N, np.sqrt(2) - 1) if low <= t[i] <= high else 0
        t_hat   = t[i] + gamma * t[i]
        x_hat   = x + np.sqrt(t_hat**2 - t[i]**2) * epsilon
        d       = (x_hat - D(x_hat, t_hat)) / t_hat
        x_next  = x_hat + (t[i + 1] - t_hat) * d
        if t[i + 1] != 0:
            d2     = (x_next - D(x_next, t[i + 1])) / t[i + 1]
            x_next = x_hat + (t[i + 1] - t_hat) * (d / 2 + d2 / 2)
        x = x_next
    *_, ours = schedulers.heun(
        lambda x, sigma: torch.from_numpy(D(x.numpy(), sigma)), GAUSSIAN.state(t[0]), t,
        noise=lambda i: torch.from_numpy(noise[i]),
        churn=churn, churn_min=low, churn_max=high, churn_noise=factor)
    np.testing.assert_allclose(ours.numpy(), x, rtol=1e-12, atol=1e-12)


def test_churn_is_the_same_in_the_last_part_of_a_run():
    sigmas = NoiseSchedule.scaled_linear().sigmas(20, "karras")
    def called(part: list[float], **options) -> list[float]:
        seen = []
        def denoise(x, sigma):
            seen.append(sigma)
            return x * 0
        list(schedulers.heun(denoise, torch.zeros(1), part, lambda i: torch.zeros(1), churn=4, **options))
        return seen
    whole, last = called(sigmas), called(sigmas[10:], skipped=10)
    assert len(last) == 19
    assert last == whole[20:]
    assert last[0] == pytest.approx(1.2 * sigmas[10])               # γ = 4 / 20


@pytest.mark.parametrize("name", [name for name in schedulers.__all__ if name.islower()
                                  and name not in ("find", "default_name")])
def test_no_step_gives_no_state(name):
    options = {"noise": lambda i: 0} if name in ("dpm_solver_pp_sde", "euler_ancestral", "lcm") else {}
    assert list(getattr(schedulers, name)(GAUSSIAN.denoise, GAUSSIAN.state(1), [1.0], **options)) == []


# ── Names ───────────────────────────────────────────────────────────────────────────────────────────────────

@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_models_file_finds_its_row(name):
    config = dict(their_scheduler(SCHEDULERS[name], oracles.SD).config)
    config["_class_name"] = SCHEDULERS[name].diffusers.partition("(")[0]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert default_name(config) == name


@pytest.mark.parametrize("config", [
    {}, {"_class_name": "UniPCMultistepScheduler"},
    {"_class_name": "DPMSolverMultistepScheduler", "solver_order": 1},
    {"_class_name": "DPMSolverSinglestepScheduler", "algorithm_type": "dpmsolver++"},
])
def test_a_scheduler_that_we_do_not_have(config):
    with pytest.warns(UserWarning, match="which ldm does not have; taking 'dpmpp_2m'"):
        assert default_name(config) == "dpmpp_2m"


@pytest.mark.parametrize(("field", "value"), [("solver_type", "heun"), ("use_lu_lambdas", True),
                                              ("euler_at_final", True), ("interpolation_type", "log_linear"),
                                              ("lower_order_final", False), ("lambda_min_clipped", -5.1),
                                              ("sigma_max", 10.0), ("thresholding", True)])
def test_a_field_that_is_not_heeded_is_named(field, value):
    config = {"_class_name": "DPMSolverMultistepScheduler", "final_sigmas_type": "sigma_min", field: value}
    with pytest.warns(UserWarning, match=f"{field} = {value!r}, which ldm does not heed"):
        assert default_name(config) == "dpmpp_2m"


@pytest.mark.parametrize("steps", [8, 20])
@pytest.mark.parametrize(("field", "value"), [("euler_at_final", True), ("lower_order_final", False)])
def test_fields_about_the_last_step_are_named_only_if_it_does_not_end_at_zero(field, value, steps):
    """diffusers ends with a lower order below 15 steps unless told not to, and above if told to."""
    def end(**fields):
        theirs = diffusers.DPMSolverMultistepScheduler.from_config({**oracles.SD, **fields})
        theirs.set_timesteps(steps)
        x = torch.linspace(-1, 1, 8, dtype=torch.float64) * theirs.init_noise_sigma
        for t in theirs.timesteps:
            x = theirs.step(torch.sin(3 * x), t, x).prev_sample
        return x
    assert torch.equal(end(**{field: value}), end())
    with warnings.catch_warnings(action="error"):
        assert default_name({"_class_name": "DPMSolverMultistepScheduler", field: value}) == "dpmpp_2m"
    above = end(final_sigmas_type="sigma_min")
    differ = not torch.equal(end(final_sigmas_type="sigma_min", **{field: value}), above)
    assert differ == ((field, steps) in {("euler_at_final", 20), ("lower_order_final", 8)})


@pytest.mark.parametrize(("kind", "field", "heeded", "built_in"), [
    ("DDPMScheduler", "variance_type", "fixed_large", "fixed_small"),
    ("DDPMScheduler", "clip_sample", True, False), ("DDIMScheduler", "clip_sample", True, False),
    ("DPMSolverMultistepScheduler", "lower_order_final", False, True),
    ("DPMSolverSinglestepScheduler", "lower_order_final", True, False),
])
def test_a_field_is_named_only_for_classes_that_heed_it(kind, field, heeded, built_in, recwarn):
    multistep = kind == "DPMSolverMultistepScheduler"
    config = {"_class_name": kind, "algorithm_type": "dpmsolver++" if multistep else "dpmsolver",
              "solver_order": 3 if multistep else 2, "clip_sample": False}
    for other, value in ((kind, built_in), ("EulerDiscreteScheduler", heeded)):
        default_name({**config, "_class_name": other, field: value})
    assert not recwarn.list
    with pytest.warns(UserWarning, match=f"{field} = {heeded!r}, which ldm does not heed"):
        default_name({**config, field: heeded})


@pytest.mark.parametrize("name", SCHEDULERS)
def test_classes_that_clip_unless_told_otherwise_are_named(name, recwarn):
    kind   = SCHEDULERS[name].diffusers.partition("(")[0]
    config = {**their_scheduler(SCHEDULERS[name], oracles.SD).config, "_class_name": kind}
    config.pop("clip_sample", None)
    default_name(config)
    clips = getattr(diffusers, kind)().config.get("clip_sample", False)
    assert any("clip_sample = True" in str(warning.message) for warning in recwarn) == clips
    assert clips == (name in ("ddim", "ddpm"))


def test_the_missing_fields_of_old_files():
    assert default_name({"_class_name": "PNDMScheduler", "skip_prk_steps": True}) == "pndm"
    assert default_name({"_class_name": "PNDMScheduler"}) == "pndm_prk"
    assert default_name({"_class_name": "DPMSolverMultistepScheduler"}) == "dpmpp_2m"


def test_find():
    assert find("euler") is SCHEDULERS["euler"]
    with pytest.raises(ValueError, match=r"no scheduler 'eular'; there are ddim, .*or any function"):
        find("eular")
    with pytest.raises(ValueError, match=r"no scheduler 'dpmpp_2m_karras'.* spacing='karras'"):
        find("dpmpp_2m_karras")
    own, file = find(lambda denoise, x, sigmas: iter(())), {"timestep_spacing": "leading"}
    assert own.sigmas(SD_SCHEDULE, 4) == SD_SCHEDULE.sigmas(4, "trailing")
    assert own.sigmas(SD_SCHEDULE, 4, config=file) == SD_SCHEDULE.sigmas(4, "leading")

    def mine(denoise, x, sigmas, noise):
        yield x
    row = find(mine)
    assert row.function is mine
    assert row.stochastic
    assert row.sigmas(SD_SCHEDULE, 4) == SD_SCHEDULE.sigmas(4, "trailing")
    assert row.start_scale(3.0) == 10**0.5
    assert find(schedulers.euler).stochastic is False


def test_the_table_holds_for_every_length_of_training():
    schedule = NoiseSchedule.linear(steps=50)
    for name, row in SCHEDULERS.items():
        for steps in (1, 7, 50):
            sigmas = row.sigmas(schedule, steps)
            assert len(sigmas) == steps + 1, name
            assert all(b < a for a, b in zip(sigmas[:-1], sigmas[1:-1], strict=False)), name
