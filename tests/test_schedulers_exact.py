"""The schedulers against mathematics: closed solutions, orders of convergence, exactness.

In float64, away from every table: the σ's are smooth, so that what is measured is the method.
"""
import math

import numpy as np
import oracles
import pytest
import torch
from oracles import SD_SCHEDULE, Gaussian, relative

from ldm import schedulers
from ldm.noise_schedule import exponential, karras
from ldm.schedulers import SCHEDULERS

GAUSSIAN = Gaussian()

# method → (its arguments, order of convergence)
METHODS = {
    "euler":                     (schedulers.euler, {}, 1),
    "ddim":                      (schedulers.euler_ancestral, {"eta": 0.0, "noise": None}, 1),
    "heun":                      (schedulers.heun, {}, 2),
    "lms 1":                     (schedulers.lms, {"order": 1}, 1),
    "lms 2":                     (schedulers.lms, {"order": 2}, 2),
    "lms 3":                     (schedulers.lms, {"order": 3}, 3),
    "lms 4":                     (schedulers.lms, {"order": 4}, 4),
    "plms":                      (schedulers.plms, {}, 2),         # its weights are those of equal steps
    "pndm":                      (schedulers.pndm, {}, 2),
    "dpm_solver 1":              (schedulers.dpm_solver, {"order": 1}, 1),
    "dpm_solver 2":              (schedulers.dpm_solver, {"order": 2}, 2),
    "dpm_solver 3":              (schedulers.dpm_solver, {"order": 3}, 3),
    "dpm_solver_pp 1":           (schedulers.dpm_solver_pp, {"order": 1}, 1),
    "dpm_solver_pp 2":           (schedulers.dpm_solver_pp, {"order": 2}, 2),
    "dpm_solver_pp 3":           (schedulers.dpm_solver_pp, {"order": 3}, 2),   # test_half_of_the_third_term
}


def end(function, options, denoise, x, sigmas):
    *_, x = function(denoise, x, [float(sigma) for sigma in sigmas], **options)
    return x


def error(method, ramp, steps, top):
    function, options, _ = METHODS[method]
    sigmas = ramp(steps + 1, 0.03, top)
    x      = GAUSSIAN.state(top)
    found  = end(function, options, GAUSSIAN.denoise, x, sigmas)
    return (found - GAUSSIAN.exact(x, top, 0.03)).abs().max().item()


def slope(steps, errors):
    """The exponent p of error ∝ steps^(−p): a line through the logarithms."""
    return -np.polyfit(np.log(steps), np.log(errors), 1)[0]


def test_the_exact_solution_is_one():
    """The judge itself: dx/dσ by finite differences equals (x − D)/σ."""
    x = GAUSSIAN.state(2.0)
    difference = (GAUSSIAN.exact(x, 2.0, 2.0 + 1e-6) - GAUSSIAN.exact(x, 2.0, 2.0 - 1e-6)) / 2e-6
    torch.testing.assert_close(difference, (x - GAUSSIAN.denoise(x, 2.0)) / 2.0, rtol=0, atol=1e-8)
    torch.testing.assert_close(GAUSSIAN.exact(GAUSSIAN.state(9.0), 9.0, 0.5), GAUSSIAN.state(0.5))


@pytest.mark.parametrize(("last", "order"), [(2 / 3, 3), (1 / 2, 2)])
def test_the_third_order_of_dpm_solver_needs_its_last_point_at_two_thirds(last, order):
    """Whole steps equal in λ, whose inner points are at last/2 and `last` of each."""
    def ramp(count, low, high):
        whole = np.linspace(-math.log(high), -math.log(low), (count - 1) // 3 + 1)
        inner = whole[:-1, None] + np.diff(whole)[:, None] * [0, last / 2, last]
        return np.exp(-np.append(inner.ravel(), whole[-1]))
    steps    = [96, 192, 384]
    measured = slope(steps, [error("dpm_solver 3", ramp, n, top=80.0) for n in steps])
    assert measured == pytest.approx(order, abs=0.3)


@pytest.mark.parametrize("ramp", [karras, exponential])
@pytest.mark.parametrize("method", METHODS)
def test_order_of_convergence(method, ramp):
    """From σ = 80 (EDM's), where ε is nearly straight, so that the first steps of the multistep methods, of
    lower order because they have no history, do not hide the order of the rest. Multiples of six: whole steps
    for DPM-Solver 2 and 3."""
    steps    = [96, 192, 384]
    measured = slope(steps, [error(method, ramp, n, top=80.0) for n in steps])
    assert measured == pytest.approx(METHODS[method][2], abs=0.3)


@pytest.mark.parametrize("method", METHODS)
def test_order_of_convergence_on_stable_diffusions_range(method):
    """The same from σ_max, where the Euler step at the start of K-LMS (an error of h²) comes to the fore."""
    steps    = [24, 48, 96]
    measured = slope(steps, [error(method, karras, n, top=SD_SCHEDULE.sigma_max) for n in steps])
    expected = {"lms 4": 3.3, "dpm_solver_pp 3": 1.6}.get(method, METHODS[method][2])
    assert measured == pytest.approx(expected, abs=0.3)


def test_a_higher_order_is_worth_it():
    """25 calls of the network on Stable Diffusion's own times ("trailing"), σ_min at the end."""
    sigmas = SD_SCHEDULE.sigmas(24, "trailing", last="sigma_min")
    x      = GAUSSIAN.state(sigmas[0])
    exact  = GAUSSIAN.exact(x, sigmas[0], sigmas[-1])
    errors = {method: relative(end(function, options, GAUSSIAN.denoise, x, sigmas), exact)
              for method, (function, options, _) in METHODS.items()}
    assert errors["lms 4"] < errors["lms 3"] < errors["lms 2"] < errors["lms 1"] / 3
    assert max(errors["plms"], errors["dpm_solver_pp 2"], errors["dpm_solver_pp 3"]) < errors["euler"] / 1.5
    assert errors["ddim"] == pytest.approx(errors["euler"], rel=1e-12)


def test_ddim_is_eulers_method():
    """Song et al. 2020, Eq. 12 with η = 0, in x_vp and ᾱ."""
    sigmas = SD_SCHEDULE.sigmas(7, "trailing")
    alphas = [1 / (1 + sigma**2) for sigma in sigmas]
    x_vp   = GAUSSIAN.state(sigmas[0]) * alphas[0]**0.5
    for sigma, a, b in zip(sigmas[:-1], alphas[:-1], alphas[1:], strict=True):
        x0   = GAUSSIAN.denoise(x_vp / a**0.5, sigma)
        eps  = (x_vp - a**0.5 * x0) / (1 - a)**0.5
        x_vp = b**0.5 * x0 + (1 - b)**0.5 * eps
    euler = end(schedulers.euler, {}, GAUSSIAN.denoise, GAUSSIAN.state(sigmas[0]), sigmas)
    torch.testing.assert_close(euler, x_vp)                                     # at σ = 0 both are x₀


def test_pndms_transfer_is_an_euler_step():
    """Liu et al. 2022, Eq. 9, with its ᾱ algebra, is x + (σ′ − σ)·ε in these units."""
    x, eps   = GAUSSIAN.state(5.0), torch.tensor([[0.3, -1.0, 2.0, 0.1]], dtype=torch.float64)
    for sigma, following in ((5.0, 3.0), (0.7, 0.1)):
        a, b = 1 / (1 + sigma**2), 1 / (1 + following**2)
        x_vp = x * a**0.5
        phi  = (b**0.5 / a**0.5 * x_vp
                - (b - a) / (a**0.5 * (((1 - b) * a)**0.5 + ((1 - a) * b)**0.5)) * eps)
        torch.testing.assert_close(phi / b**0.5, x + (following - sigma) * eps)


# ── Exactness ───────────────────────────────────────────────────────────────────────────────────────────────

@pytest.mark.parametrize("steps", [1, 2, 3, 4, 7, 20])
@pytest.mark.parametrize("method", METHODS)
def test_straight_lines(method, steps):
    """Data that is one point: D is constant, the solution is a straight line, and every method is exact."""
    function, options, _ = METHODS[method]
    point = torch.tensor([[3.0, -2.0]], dtype=torch.float64)
    x     = torch.tensor([[40.0, 7.0]], dtype=torch.float64)
    for last in ("zero", "sigma_min"):
        sigmas = SD_SCHEDULE.sigmas(steps, "karras", last=last)
        exact  = point + (x - point) * sigmas[-1] / sigmas[0]
        found  = end(function, options, lambda *_: point, x, sigmas)
        torch.testing.assert_close(found, exact, rtol=0, atol=1e-11)


def denoiser_of(epsilon):
    """A denoiser whose ε is a given function of σ alone: the equation is an integral, dx/dσ = ε(σ)."""
    return lambda x, sigma: x - sigma * epsilon(sigma)


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_lms_integrates_polynomials_exactly(order):
    """Order k is exact for ε of degree k − 1 in σ, at any spacing, once the history is there; not for k."""
    sigmas = [9.0, 8.5, 6.0, 5.5, 3.0, 2.9, 1.0, 0.2, 0.0]
    for degree in (order - 1, order):
        polynomial = np.polynomial.Polynomial([0.3, -1.0, 0.5, 0.25, -0.125][:degree + 1])
        integral   = polynomial.integ()
        start      = torch.zeros(1, dtype=torch.float64)
        states     = [start, *schedulers.lms(denoiser_of(polynomial), start, sigmas, order=order)]
        found      = (states[-1] - states[order - 1]).item()           # once the history is whole
        wrong      = abs(found - (integral(sigmas[-1]) - integral(sigmas[order - 1])))
        assert wrong < 1e-9 if degree < order else wrong > 1e-2


def test_the_runge_kutta_start_integrates_cubics_exactly():
    """Simpson's rule, when the middle of the step is the middle in σ."""
    cubic, sigmas = np.polynomial.Polynomial([0.3, -1.0, 0.5, 0.25]), [9.0, 8.0, 5.0, 4.5]
    x = end(schedulers.pndm, {}, denoiser_of(cubic), torch.zeros(1, dtype=torch.float64), sigmas)
    assert x.item() == pytest.approx(cubic.integ()(4.5) - cubic.integ()(9.0), rel=1e-12)


def test_the_weights_of_equal_steps():
    """PNDM's weights and their shorter forms are the integrals that K-LMS takes, on equal steps."""
    for order, row in enumerate(schedulers.multistep.ADAMS_BASHFORTH, start=1):
        nodes = [10.0 + i for i in range(order)]                       # the newest first, σ falls by 1
        assert [-w for w in schedulers.multistep.lagrange_integrals(nodes, 10.0, 9.0)] == pytest.approx(row)


def test_plms_is_that_of_its_algorithm():
    """Liu et al. 2022, Algorithm 2 without its Runge–Kutta start, written down for seven given ε's."""
    sigmas = [9.0, 7.0, 6.0, 4.0, 3.0, 1.0, 0.5]
    e      = [math.sin(3 * sigma) for sigma in sigmas]
    steps  = [b - a for a, b in zip(sigmas, sigmas[1:], strict=False)]
    slopes = [(e[0] + e[1]) / 2,
              (3 * e[1] - e[0]) / 2,
              (23 * e[2] - 16 * e[1] + 5 * e[0]) / 12,
              (55 * e[3] - 59 * e[2] + 37 * e[1] - 9 * e[0]) / 24,
              (55 * e[4] - 59 * e[3] + 37 * e[2] - 9 * e[1]) / 24,
              (55 * e[5] - 59 * e[4] + 37 * e[3] - 9 * e[2]) / 24]
    start  = torch.zeros(1, dtype=torch.float64)
    found  = list(schedulers.plms(denoiser_of(lambda sigma: math.sin(3 * sigma)), start, sigmas))
    expected = np.cumsum([step * slope for step, slope in zip(steps, slopes, strict=True)])
    np.testing.assert_allclose([state.item() for state in found], expected, rtol=1e-12)


def test_dpm_solver_3_integrates_what_is_linear_in_lambda():
    """One step on ε = λ = −log σ: φ₂ is the exact weight, wherever the intermediate points are."""
    def integral(sigma):
        return sigma - sigma * math.log(sigma)
    denoise = denoiser_of(lambda sigma: -math.log(sigma))
    start   = torch.zeros(1, dtype=torch.float64)
    x = end(schedulers.dpm_solver, {"order": 3}, denoise, start, [9.0, 5.0, 3.0, 1.0])
    assert x.item() == pytest.approx(integral(1.0) - integral(9.0), rel=1e-12)


def exact_integral_of_d(d, sigma, following):
    """x' = e^(−h)x + ∫ e^(λ−λ')D dλ from x = 0, by Gauss–Legendre quadrature."""
    h = math.log(sigma / following)
    node, weight = np.polynomial.legendre.leggauss(40)
    lam = -math.log(sigma) + h * (node + 1) / 2
    return (weight @ (np.exp(lam + math.log(following)) * d(lam))) * h / 2


@pytest.mark.parametrize(("d", "second"), [(lambda lam: 0.5 - lam, 0.0), (lambda lam: 1 + lam + lam**2, 2.0)],
                         ids=["linear", "quadratic"])
def test_half_of_the_third_term(d, second):
    """DPM-Solver++ 3M. The Taylor expansion of D has h³·φ₃·D″; the authors' code takes half of that, and
    diffusers, and so do we for the same picture. So the method is exact for D linear in λ, and short by just
    that half for D quadratic, which makes its order of convergence two instead of three."""
    sigmas = [9.0, 6.0, 5.0, 3.0, *exponential(15, 0.1, 2.0)]       # long, so that the end has its full order
    h      = math.log(5.0 / 3.0)
    start  = torch.zeros(1, dtype=torch.float64)
    states = list(schedulers.dpm_solver_pp(lambda x, sigma: torch.full_like(x, d(-math.log(sigma))),
                                           start, sigmas, order=3))
    found  = (states[2] - 3.0 / 5.0 * states[1]).item()             # the third step, the first of third order
    short  = exact_integral_of_d(d, 5.0, 3.0) - found
    assert short == pytest.approx(h**3 * schedulers.dpm.phi(-h)[2] / 2 * second, abs=1e-12)


def test_the_phi_functions():
    """Against their integrals φ_k(h) = ∫₀¹ e^((1−s)h) s^(k−1)/(k−1)! ds, across the change to the series."""
    node, weight = np.polynomial.legendre.leggauss(30)
    s, weight    = (node + 1) / 2, weight / 2
    for h in (-6.0, -0.5, -0.1, -0.0999, -1e-9, 0.0, 1e-4, 0.0999, 0.1, 2.0, 6.0):
        expected = [weight @ (np.exp((1 - s) * h) * s**(k - 1) / math.factorial(k - 1)) for k in (1, 2, 3)]
        assert schedulers.dpm.phi(h) == pytest.approx(expected, rel=1e-11)


# ── Noise ───────────────────────────────────────────────────────────────────────────────────────────────────

STOCHASTIC = {
    "ddim, η = ½":             (schedulers.euler_ancestral, {"eta": 0.5}),
    "ddpm":                    (schedulers.euler_ancestral, {"eta": 1.0}),
    "dpm++ sde, first order":  (schedulers.dpm_solver_pp_sde, {"order": 1}),
    "dpm++ 2m sde":            (schedulers.dpm_solver_pp_sde, {"order": 2}),
    "heun with churn":         (schedulers.heun, {"churn": 20.0}),
    "heun with some churn":    (schedulers.heun, {"churn": 20.0, "churn_min": 0.1, "churn_max": 3.0}),
}


def variance(function, options, steps):
    """Var(x) at the end over its true value, for Gaussian data.

    D is linear there, so x is a sum of the start and the draws, each times a number; a batch that holds one
    of them in each row, and zeros, finds these numbers. No sampling, no statistical error.
    """
    data   = Gaussian(mean=torch.zeros(1, 4, dtype=torch.float64))
    sigmas = exponential(steps + 1, 0.03, 14.6).tolist()
    source = torch.eye(steps + 1, dtype=torch.float64)[:, :, None].expand(-1, -1, 4)    # (which, row, :)
    x      = source[0] * (data.std**2 + sigmas[0]**2).sqrt()
    x      = end(function, {**options, "noise": lambda i: source[i + 1]}, data.denoise, x, sigmas)
    return x.square().sum(dim=0) / (data.std[0]**2 + sigmas[-1]**2)


@pytest.mark.parametrize("method", STOCHASTIC)
def test_the_variance_is_right(method):
    """It converges to the truth: with 200 and 400 steps, and extrapolated from both."""
    coarse, fine = (variance(*STOCHASTIC[method], steps) for steps in (200, 400))
    assert (fine - 1).abs().max() < 0.06
    assert ((fine - 1).abs() < 0.62 * (coarse - 1).abs() + 1e-3).all()
    assert (2 * fine - coarse - 1).abs().max() < 2e-3


def test_the_variance_would_show_a_wrong_amount_of_noise():
    function, options = STOCHASTIC["ddpm"]
    def weaker(denoise, x, sigmas, noise):
        return function(denoise, x, sigmas, lambda i: 0.97 * noise(i), **options)
    assert (variance(weaker, {}, 400) - 1).abs().min() > 0.04


# ── Consistency ─────────────────────────────────────────────────────────────────────────────────────────────

@pytest.mark.parametrize("steps", [1, 2, 5])
def test_lcm_draws_from_the_data_if_the_network_knows_the_ends(steps):
    """Given the true end of each solution, all states have the true distribution at their σ. 200,000 samples;
    five standard errors."""
    count, generator = 200_000, torch.Generator().manual_seed(0)
    sigmas = SCHEDULERS["lcm"].sigmas(SD_SCHEDULE, steps)
    mean, std = GAUSSIAN.mean, GAUSSIAN.std

    def noise(i=0):
        return torch.randn(count, 4, generator=generator, dtype=torch.float64)
    start  = mean + (std**2 + sigmas[0]**2).sqrt() * noise()
    states = schedulers.lcm(lambda x, sigma: GAUSSIAN.exact(x, sigma, 0), start, sigmas, noise)
    for sigma, x in zip(sigmas[1:], states, strict=True):
        spread = (std**2 + sigma**2).sqrt()
        assert ((x.mean(0) - mean).abs() < 5 * spread / count**0.5).all()
        assert ((x.std(0) / spread - 1).abs() < 5 / (2 * count)**0.5).all()


# ── Gradients ───────────────────────────────────────────────────────────────────────────────────────────────

@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_gradient_passes_a_whole_run(name):
    """The end is linear in the start and in the mean of Gaussian data, so finite differences are exact."""
    row    = SCHEDULERS[name]
    sigmas = row.sigmas(SD_SCHEDULE, 8, config=oracles.SD)
    noise  = {"noise": lambda i: oracles.draws(i + 1, (1, 4))[i]} if row.stochastic else {}

    named  = {**row.options(SD_SCHEDULE), **noise}

    def run(x, mean):
        return end(row.function, named, Gaussian(mean=mean).denoise, x, sigmas).sum()
    inputs = [GAUSSIAN.state(sigmas[0]).requires_grad_(), GAUSSIAN.mean.clone().requires_grad_()]
    gradients = torch.autograd.grad(run(*inputs), inputs)
    with torch.no_grad():
        for which in (0, 1):
            for i in range(4):
                moved = [tensor.clone() for tensor in inputs]
                moved[which][0, i] += 1
                expected = (run(*moved) - run(*inputs)).item()
                assert gradients[which][0, i].item() == pytest.approx(expected, abs=1e-9)
    assert gradients[1].abs().min() > 0.1
