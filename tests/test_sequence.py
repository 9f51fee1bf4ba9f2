"""Frame by frame: which frames a frame sees, the joint law of sequences, and that seeds and resuming are exact."""

import pytest
import torch

from companion.diffusion.covariance import Isotropic
from companion.diffusion.denoisers import ComplexDenoiser, EDMDenoiser
from companion.diffusion.guidance import dds, landweber, posterior_mean
from companion.diffusion.noise import karras
from companion.diffusion.sampling import Bill, Samples, sample
from companion.diffusion.sequence import (
    draw_sequence,
    frame_generators,
    reconstruct_sequence,
    sample_retrospective,
    sample_sequence,
)
from companion.diffusion.solvers import ddpm
from companion.networks import CausalUNet
from companion.operators.linear import Identity
from companion.randomness import generators, randn

STEPS = 4
LEVELS = karras(STEPS, 0.02, 10.0)
SHAPE = (1, 2, 2)


class Counter:
    """x0_hat is one more than the highest frame seen, everywhere; keeps what it was given."""

    def __init__(self):
        self.conds, self.inputs = [], []

    def __call__(self, x, sigma, cond=None):
        self.conds.append(cond)
        self.inputs.append(x)
        highest = torch.zeros(1) if cond is None else cond.flatten(1).amax(1)
        return (highest + 1).reshape(-1, 1, 1, 1).expand_as(x)

    def seen(self, steps=STEPS):
        """The labels that each frame saw in the first draw."""
        return [None if cond is None else cond[0, :, 0, 0, 0].tolist() for cond in self.conds[::steps]]


def labels(*numbers):
    return torch.tensor(numbers, dtype=torch.float32).reshape(1, -1, 1, 1, 1).expand(1, len(numbers), *SHAPE).clone()


def count(D=None, **options):
    defaults = dict(shape=SHAPE, seeds="0-1", solver="ddim", frames=5)
    return sample_sequence(D or Counter(), LEVELS, **(defaults | options))


# --- bookkeeping

WINDOWS = {
    "cold": (dict(window=3), [[0], [1], [1, 2], [1, 2, 3], [2, 3, 4]]),
    "cold without blank": (dict(window=3, start=None), [None, [1], [1, 2], [1, 2, 3], [2, 3, 4]]),
    "cold, blank kept": (dict(window=3, context=labels(0)), [[0], [0, 1], [0, 1, 2], [1, 2, 3], [2, 3, 4]]),
    "warm": (dict(window=3, context=labels(7, 8, 9)), [[7, 8, 9], [8, 9, 10], [9, 10, 11], [10, 11, 12], [11, 12, 13]]),
    "long context": (dict(window=2, context=labels(6, 7, 8, 9), frames=2), [[8, 9], [9, 10]]),
    "first frame given": (dict(window=3, context=labels(5), frames=4), [[5], [5, 6], [5, 6, 7], [6, 7, 8]]),
    "window of one": (dict(window=1), [[0], [1], [2], [3], [4]]),
    "shorter than the window": (dict(window=8, frames=3), [[0], [1], [1, 2]]),
    "no window": (dict(), [[0], [1], [1, 2], [1, 2, 3], [1, 2, 3, 4]]),
    "first stage": (dict(window=3, first_stage=True), [None] * 5),
    "one frame": (dict(frames=1, context=labels(3, 4)), [[3, 4]]),
}


@pytest.mark.parametrize("options, expected", WINDOWS.values(), ids=WINDOWS)
def test_every_frame_sees_the_newest_frames_and_no_other(options, expected):
    D = Counter()
    before = options["context"].clone() if "context" in options else None
    sequence = count(D, **options)
    assert D.seen() == expected
    frames = [1.0 if cond is None else max(cond) + 1 for cond in expected]
    assert sequence.x.shape == (2, len(expected), *SHAPE)
    assert sequence.x[:, :, 0, 1, 1].tolist() == [frames, frames]
    if before is not None:
        assert torch.equal(options["context"], before)


def test_a_resumed_run_sees_the_same_frames():
    for options, expected in WINDOWS.values():
        whole = count(**options).x
        for done in range(1, len(expected) + 1):
            D = Counter()
            assert torch.equal(count(D, **options, resume=whole[:, :done]).x, whole)
            assert D.seen() == expected[done:]


def test_each_draw_has_its_own_past():
    D = Counter()
    context = torch.cat([labels(1, 2), labels(10, 20)])
    x = count(D, window=2, context=context, frames=3).x
    assert x[:, :, 0, 0, 0].tolist() == [[3, 4, 5], [21, 22, 23]]
    assert D.conds[-1][:, :, 0, 0, 0].tolist() == [[3, 4], [21, 22]]


def test_a_shared_context_is_the_mean_of_the_draws_and_stays_one():
    D, contexts = Counter(), []
    x = count(
        D,
        window=2,
        frames=3,
        context=torch.cat([labels(1, 2), labels(10, 20)]),
        shared_context="mean",
        callback=lambda info: contexts.append(info["cond"]),
    ).x
    assert D.seen() == [[5.5, 11], [11, 12], [12, 13]]
    assert x[:, :, 0, 0, 0].tolist() == [[12, 13, 14]] * 2
    assert all(cond.shape[0] == 1 for cond in contexts)
    assert all(cond.shape[0] == 2 and cond.stride(0) == 0 for cond in D.conds)


def test_a_given_context_is_shared_until_the_draws_differ():
    D = Counter()
    count(D, window=2, frames=2, context=labels(1, 2))
    first, second = D.conds[0], D.conds[-1]
    assert first.stride(0) == 0 and second.stride(0) != 0


def test_callback_gets_every_frame_and_the_bill_so_far():
    infos = []
    sequence = count(frames=3, callback=infos.append)
    assert [info["frame"] for info in infos] == [0, 1, 2]
    assert torch.equal(torch.stack([info["x"] for info in infos], 1), sequence.x)
    assert [info["bill"].denoiser_calls for info in infos] == [4, 8, 12]
    assert infos[-1]["bill"] == sequence.bill and sequence.bill.seconds > 0


def test_any_rule_may_draw_the_frames():
    def rule(n, cond, draws):
        return Samples(randn(SHAPE, torch.float32, draws) + n, Bill(1, 2, 0.5))

    sequence = draw_sequence(rule, 3, shape=SHAPE, seeds="0-3")
    assert sequence.x.shape == (4, 3, *SHAPE) and sequence.bill == Bill(3, 6, 1.5)


def test_progress_shows_a_bar(capsys):
    count(frames=3, progress=True)
    assert "3/3" in capsys.readouterr().err


# --- noise


def test_a_frame_has_the_same_noise_in_any_batch_and_any_length():
    together, alone = Counter(), Counter()
    count(together, seeds="0-3", frames=4)
    count(alone, seeds=2, frames=3)
    steps = len(LEVELS) - 1
    for n in range(3):
        assert torch.equal(together.inputs[n * steps][2], alone.inputs[n * steps][0])
    assert torch.equal(alone.inputs[0][0], LEVELS[0] * randn(SHAPE, torch.float32, generators(2))[0])


@pytest.mark.parametrize("solver", ["heun", "dpmpp_2m_sde"])
def test_a_seed_gives_the_same_sequence_alone_and_in_any_batch(solver):
    D, options = causal(), dict(frames=3, window=2, shape=(2, 8, 8), solver=solver)
    together = sample_sequence(D, LEVELS, seeds="0-2", **options).x
    split = sample_sequence(D, LEVELS, seeds="0-2", batch_size=2, **options).x
    alone = sample_sequence(D, LEVELS, seeds=1, **options).x
    torch.testing.assert_close(split, together, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(alone, together[1:2], rtol=1e-4, atol=1e-5)


def test_frames_and_seeds_have_different_generators():
    states = {g.initial_seed() for n in range(100) for g in frame_generators(range(100), n)}
    assert len(states) == 100 * 100


def test_frames_start_from_the_noised_frame_before():
    D, steps = Counter(), 3
    count(D, frames=3, seeds=5, sigma_start=2.0, context=labels(7))
    firsts = D.inputs[:: len(D.inputs) // 3]
    for n, x in enumerate(firsts):
        assert torch.equal(x, (7.0 + n) + 2.0 * randn(SHAPE, torch.float32, frame_generators([5], n)))
    below = sum(0 < sigma < 2.0 for sigma in LEVELS.tolist())
    assert len(D.inputs) == 3 * (below + 1)
    cold = Counter()
    count(cold, frames=steps, seeds=5, sigma_start=2.0)
    assert torch.equal(cold.inputs[0], LEVELS[0] * randn(SHAPE, torch.float32, generators(5)))
    assert len(cold.inputs) == len(LEVELS) - 1 + (steps - 1) * (below + 1)


# --- the joint law


class Autoregression:
    """The exact denoiser of x_n = a x_{n-1} + sqrt(1 - a^2) n, x_0 ~ N(0, 1), in every pixel by itself."""

    a = 0.8

    def __call__(self, x, sigma, cond=None):
        return self.moments(x, sigma, cond)[0]

    def moments(self, x, sigma, cond=None):
        mean, variance = (0, 1) if cond is None else (self.a * cond[:, -1], 1 - self.a**2)
        gain = (variance / (variance + sigma.double() ** 2)).to(x.dtype).reshape(-1, 1, 1, 1)
        return mean + gain * (x - mean), gain * sigma.reshape(-1, 1, 1, 1) ** 2


def by_pixel(x):
    """Independent sequences (number, frame) in float64."""
    return x.movedim(1, -1).flatten(0, -2).double()


def test_sequences_have_the_joint_law_of_an_autoregression():
    """8192 sequences: means, variances and all correlations a^|n - m| within 4 standard errors and a solver's 1 %."""
    x = sample_sequence(
        Autoregression(), karras(25, 0.005, 30.0), frames=4, window=2, start=None, shape=(1, 16, 16), seeds=range(32)
    ).x
    x = by_pixel(x)
    n = torch.arange(4)
    law = Autoregression.a ** (n[:, None] - n).abs().double()
    assert (x.mean(0).abs() < 4 / len(x) ** 0.5).all()
    assert ((x.T @ x / len(x) - law).abs() < 4 * ((1 + law**2) / len(x)).sqrt() + 0.01).all()


@pytest.mark.parametrize("solver, steps", [("annealed_gibbs", 4), ("dpmpp_2m_sde", 40)])
def test_reconstructions_have_the_law_of_the_frames_given_past_and_data(solver, steps):
    """p(x_n | x_<n, y_n) of a Gaussian: mean and covariance by recursion, within 4 standard errors and 2 %."""
    a, noise_std, y = Autoregression.a, 0.5, torch.tensor([1.0, -0.5, 2.0])
    guidances = [
        posterior_mean(Identity((1, 16, 16), torch.float32), value.expand(1, 1, 16, 16), noise_std) for value in y
    ]
    sequence = reconstruct_sequence(
        Autoregression(), guidances, karras(steps, 0.01, 20.0), seeds=range(32), solver=solver, start=None
    )
    assert sequence.bill.denoiser_calls == steps * 3 and sequence.bill.operator_calls > 0
    x = by_pixel(sequence.x)
    mean, covariance = torch.zeros(0, dtype=torch.float64), torch.zeros(0, 0, dtype=torch.float64)
    for n, value in enumerate(y.double()):
        prior = 1.0 if n == 0 else 1 - a**2
        gain = prior / (prior + noise_std**2)
        pull = torch.zeros(n, dtype=torch.float64)  # what x_n takes over from the frames before
        pull[-1:] = (1 - gain) * a
        cross = covariance @ pull
        own = pull @ cross + gain * noise_std**2
        mean = torch.cat([mean, (pull @ mean + gain * value)[None]])
        covariance = torch.cat([torch.cat([covariance, cross[:, None]], 1), torch.cat([cross, own[None]])[None]])
    variance = covariance.diagonal()
    errors = ((variance[:, None] * variance + covariance**2) / len(x)).sqrt()
    assert ((x.mean(0) - mean).abs() < 4 * (variance / len(x)).sqrt() + 0.02 * mean.abs()).all()
    assert ((x.T.cov() - covariance).abs() < 4 * errors + 0.02 * variance).all()


# --- a network


WINDOW = 4


def causal(**options):
    """A small network with random weights in every layer, as a complex or real denoiser of sequences and frames."""
    torch.manual_seed(0)
    defaults = dict(seq_len=WINDOW, in_channels=2, model_channels=32, out_channels=2, num_res_blocks=1, num_heads=2)
    network = CausalUNet(**(defaults | dict(channel_mult=(1, 2)) | options)).eval()
    with torch.no_grad():
        for p in network.parameters():
            p.add_(0.02 * torch.randn(p.shape))
    return EDMDenoiser(network, channel_axis=-3)


def test_cold_sampling_is_stepwise_denoising_by_the_training_forward():
    """Euler steps by hand through the training forward on whole sequences, of which one frame is used."""
    D, levels, shape = causal(), [2.0, 0.5, 0.1, 0.0], (2, 8, 8)
    x = sample_sequence(D, levels, frames=WINDOW, window=WINDOW, shape=shape, seeds="0-1", solver="euler").x
    frames = []
    for n in range(WINDOW):
        context = torch.stack(frames, 1) if frames else torch.zeros(2, 1, *shape)
        whole = torch.zeros_like(context)
        state = levels[0] * randn(shape, torch.float32, frame_generators([0, 1], n))
        for sigma, lower in zip(levels, levels[1:], strict=False):
            whole[:, -1] = state
            with torch.no_grad():
                x0_hat = D(whole, torch.full((2,), sigma), context)[:, -1]
            state = state + (lower - sigma) / sigma * (state - x0_hat)
        frames.append(state)
    torch.testing.assert_close(x, torch.stack(frames, 1), rtol=1e-3, atol=1e-3)  # rounding, grown by every step


@pytest.mark.parametrize("solver", ["heun", "ddpm"])
def test_frames_drawn_at_once_from_the_true_past_equal_frames_drawn_one_by_one(solver):
    D, first = causal(), torch.randn(2, 1, 2, 8, 8, generator=torch.Generator().manual_seed(1))
    options = dict(seeds="3-4", solver=solver)
    x = sample_sequence(D, LEVELS, frames=WINDOW, window=WINDOW, context=first, shape=(2, 8, 8), **options).x
    together = sample_retrospective(D, LEVELS, context=torch.cat([first, x[:, :-1]], 1), **options)
    torch.testing.assert_close(together.x, x, rtol=1e-4, atol=1e-4)
    assert together.bill.denoiser_calls == (7 if solver == "heun" else 4)


def test_frames_drawn_at_once_can_use_a_learned_variance():
    class Uncertain(Autoregression):  # the same on whole sequences, each frame given the one before it
        def moments(self, x, sigma, cond=None):
            each = sigma.repeat_interleave(x.shape[1])
            x0_hat, variance = super().moments(x.flatten(0, 1), each, cond.flatten(0, 1)[:, None])
            return x0_hat.unflatten(0, x.shape[:2]), variance.unflatten(0, x.shape[:2])

    context = torch.randn(1, 3, *SHAPE, generator=torch.Generator().manual_seed(0))
    options = dict(context=context, seeds="0-1")
    x = sample_retrospective(Uncertain(), LEVELS, solver=ddpm(variance="learned"), **options).x
    frames = [
        sample(
            Autoregression(),
            LEVELS,
            shape=SHAPE,
            seeds=frame_generators([0, 1], n),
            cond=context[:, : n + 1],
            solver=ddpm(variance="learned"),
        ).x
        for n in range(3)
    ]
    torch.testing.assert_close(x, torch.stack(frames, 1))


def test_the_whole_past_matters_and_the_future_does_not():
    D, shape = causal(), (2, 8, 8)
    context = torch.randn(1, WINDOW, *shape, generator=torch.Generator().manual_seed(1))
    options = dict(window=WINDOW, shape=shape, seeds=0, frames=1)
    before = sample_sequence(D, LEVELS, context=context, **options).x
    retrospective = sample_retrospective(D, LEVELS, context=context, seeds=0).x
    for n in range(WINDOW):
        other = context.clone()
        other[:, n] += 1
        assert (sample_sequence(D, LEVELS, context=other, **options).x - before).abs().max() > 1e-3
        change = sample_retrospective(D, LEVELS, context=other, seeds=0).x - retrospective
        change = change.abs().amax((0, 2, 3, 4))
        assert (change[:n] < 1e-5).all() and (change[n:] > 1e-3).all()


@pytest.mark.parametrize("solver", ["ddpm", "aid_stochastic", "heun", "dpmpp_2m_sde"])
@pytest.mark.parametrize("options", [dict(), dict(shared_context="mean"), dict(sigma_start=1.0)], ids=str)
def test_an_interrupted_run_resumes_bit_for_bit(solver, options):
    D, done, shape = ComplexDenoiser(causal(), -3), [], (1, 8, 8)

    def interrupt(info):
        done.append(info["x"])
        if len(done) == 2:
            raise KeyboardInterrupt

    options = options | dict(frames=4, window=2, shape=shape, seeds="5-6", solver=solver, dtype=torch.complex64)
    whole = sample_sequence(D, LEVELS, **options).x
    with pytest.raises(KeyboardInterrupt):
        sample_sequence(D, LEVELS, callback=interrupt, **options)
    resumed = torch.stack(done, 1)
    kept = resumed.clone()
    assert torch.equal(sample_sequence(D, LEVELS, resume=resumed, **options).x, whole)
    assert torch.equal(resumed, kept) and torch.equal(kept, whole[:, :2])
    assert whole.shape == (2, 4, *shape) and torch.isfinite(whole.abs()).all()


def test_draws_with_one_context_share_its_conditioning(monkeypatch):
    D, batches = ComplexDenoiser(causal(), -3), []
    inner = CausalUNet.condition
    monkeypatch.setattr(
        CausalUNet, "condition", lambda self, cond, *rest: batches.append(len(cond)) or inner(self, cond, *rest)
    )
    A = Identity((1, 8, 8))
    y = torch.ones(1, 1, 8, 8, dtype=torch.complex64)
    context = torch.randn(1, 2, 1, 8, 8, dtype=torch.complex64, generator=torch.Generator().manual_seed(0))
    guidances = [dds(A, y)] * 2
    reconstruct_sequence(D, guidances, LEVELS, seeds="0-2", context=context, solver="ddim", window=2)
    assert batches == [1] * 4 + [3] * 4
    batches.clear()
    reconstruct_sequence(
        D, guidances, LEVELS, seeds="0-2", context=context, solver="ddim", window=2, shared_context="mean"
    )
    assert batches == [1] * 8


def test_reconstruction_resumes_with_the_guidance_of_its_frame():
    A, shape = Identity(SHAPE, torch.float32), SHAPE
    guidances = [landweber(A, torch.full((1, *shape), float(n))) for n in range(4)]
    options = dict(seeds="0-1", solver="aid_stochastic", window=2)
    whole = reconstruct_sequence(Autoregression(), guidances, LEVELS, start=None, **options)
    assert torch.equal(whole.x[:, :, 0, 0, 0], torch.arange(4.0).expand(2, 4))  # unit steps: the data themselves
    assert whole.bill.operator_calls == 4 * 4 * 9
    again = reconstruct_sequence(Autoregression(), guidances, LEVELS, start=None, resume=whole.x[:, :3], **options)
    assert torch.equal(again.x, whole.x) and again.bill.denoiser_calls == 4


# --- mistakes


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(frames=0), "at least 1"),
        (dict(window=0), "first_stage=True"),
        (dict(window=-1), "first_stage=True"),
        (dict(start="zeros"), "'blank' or None"),
        (dict(shared_context="median"), "'mean' or None"),
        (dict(seeds=[]), "no seeds"),
        (dict(context=torch.zeros(1, 3, 1, 2, 3)), r"expected \(1, frames, 1, 2, 2\) or \(2, frames, 1, 2, 2\)"),
        (dict(context=torch.zeros(3, 3, *SHAPE)), r"context has shape \(3, 3, 1, 2, 2\)"),
        (dict(context=torch.zeros(1, *SHAPE)), "context has shape"),
        (dict(context=torch.zeros(2, 0, *SHAPE)), "no frames"),
        (dict(context=torch.full((1, 1, *SHAPE), float("nan"))), "context contains NaN"),
        (dict(resume=torch.full((2, 1, *SHAPE), float("nan"))), "resume contains NaN"),
        (dict(resume=torch.zeros(1, 1, *SHAPE)), "resume has shape"),
        (dict(resume=torch.zeros(2, 6, *SHAPE)), "more than the 5 wanted"),
        (dict(sigma_start=20.0), "range of sigmas"),
        (dict(sigma_start=0.0), "range of sigmas"),
        (dict(sigma_start=1.0, first_stage=True), "none before them"),
        (dict(solver="huen"), "did you mean 'heun'"),
    ],
    ids=lambda value: str(list(value)) if isinstance(value, dict) else "",
)
def test_mistakes_are_explained(change, message):
    with pytest.raises(ValueError, match=message):
        count(**change)


def test_types_are_checked():
    with pytest.raises(TypeError, match="complex64"):
        count(context=torch.zeros(1, 1, *SHAPE, dtype=torch.complex64))
    with pytest.raises(TypeError, match="seeds instead of generators"):
        count(seeds=generators("0-1"))


def test_a_frame_of_another_shape_or_with_nan_is_refused():
    options = dict(shape=SHAPE, seeds=0)
    with pytest.raises(ValueError, match="frame 0 was drawn with shape"):
        draw_sequence(lambda n, cond, draws: Samples(torch.zeros(1, 4), Bill(1, 0, 0.0)), 2, **options)
    nan = Samples(torch.full((1, *SHAPE), float("nan")), Bill(1, 0, 0.0))
    with pytest.raises(FloatingPointError, match="frame 0"):
        draw_sequence(lambda n, cond, draws: nan, 2, **options)


def test_guidances_must_fit_together_and_fit_the_solver():
    A, B = Identity(SHAPE, torch.float32), Identity((1, 3, 3), torch.float32)
    y = torch.zeros(1, *SHAPE)
    D = Autoregression()
    with pytest.raises(ValueError, match="one shape and dtype"):
        reconstruct_sequence(D, [dds(A, y), dds(B, torch.zeros(1, 1, 3, 3))], LEVELS, seeds=0)
    with pytest.raises(ValueError, match="got none"):
        reconstruct_sequence(D, [], LEVELS, seeds=0)
    with pytest.raises(TypeError, match="frame 0 is dds"):
        reconstruct_sequence(D, [dds(A, y)], LEVELS, seeds=0, solver="annealed_gibbs")
    with pytest.raises(ValueError, match="sigma_start"):
        G = posterior_mean(A, y, 0.1, Isotropic())
        reconstruct_sequence(D, [G], LEVELS, seeds=0, solver="annealed_gibbs", sigma_start=1.0)


def test_the_first_frame_without_context_is_a_sample_of_the_seed():
    x = count(frames=2, start=None, seeds="4-5").x[:, 0]
    assert torch.equal(x, sample(Counter(), LEVELS, shape=SHAPE, seeds="4-5", solver="ddim").x)
