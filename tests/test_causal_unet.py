"""The sequence network: what may flow between frames, and that its fast ways give the same numbers."""

import itertools

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from companion.diffusion.denoisers import EDMDenoiser
from companion.networks import CausalUNet, UNet, default_channel_mult
from companion.networks.causal_blocks import FrameAttention, Memory, positional_embedding

WINDOW = 4
VARIANTS = {
    "concat": dict(),
    "connectors": dict(concat_cond=False, attention_resolutions=(1,), channel_mult=(1, 1)),
    "deep": dict(complicated_x0=True, num_complicated=1, pos_emb=True),
    "gated": dict(use_causal_gated=True, use_scale_shift_norm=False),
    "patch": dict(patch=2, resblock_updown=True),
}


def network(**options):
    """A small network in eval mode, every parameter drawn anew so that zero-initialised branches count."""
    defaults = dict(seq_len=WINDOW, in_channels=2, model_channels=32, out_channels=4, num_res_blocks=1)
    defaults |= dict(channel_mult=(1, 2), num_heads=4, use_scale_shift_norm=True)
    torch.manual_seed(0)
    net = CausalUNet(**(defaults | options)).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in net.parameters():
            scale = p[0].numel() ** -0.5 if p.ndim > 1 else 0.1
            p.copy_(scale * torch.randn(p.shape, generator=generator) + (p.ndim == 1) * p)
    return net


def frames(batch, n, seed, size=8):
    return torch.randn(batch, n, 2, size, size, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(params=VARIANTS, autouse=False)
def net(request):
    return network(**VARIANTS[request.param])


@torch.inference_mode()
def test_a_new_frame_equals_its_frame_of_the_training_forward(net):
    """For every slot, for windows shorter than the longest, for a batch with different times."""
    context, x, t = frames(2, WINDOW, 1), frames(2, WINDOW, 2), torch.tensor([3.0, 640.0])
    together = net(x, t, context)
    assert together.shape == (2, WINDOW, 4, 8, 8)
    for n in range(WINDOW):
        torch.testing.assert_close(net(x[:, n], t, context[:, : n + 1]), together[:, n], rtol=1e-5, atol=1e-5)
    shorter = net(x[:, :2], t, context[:, :2])
    torch.testing.assert_close(shorter, together[:, :2], rtol=1e-5, atol=1e-5)


@torch.inference_mode()
def test_the_future_has_no_effect_and_the_whole_past_has(net):
    context, x, t = frames(1, WINDOW, 1), frames(1, WINDOW, 2), torch.tensor([50.0])
    before = net(x, t, context)
    for n in range(WINDOW):
        other = context.clone()
        other[:, n] += 1
        change = (net(x, t, other) - before).abs().amax(dim=(0, 2, 3, 4))
        assert (change[:n] < 1e-5).all()
        assert (change[n:] > 1e-4).all()


@torch.inference_mode()
def test_the_published_sampling_sees_the_last_frame_only(net):
    net.context = "last"
    context, x, t = frames(1, WINDOW, 1), frames(1, 1, 2)[:, 0], torch.tensor([50.0])
    before = net(x, t, context)
    other = context.clone()
    other[:, :-1] += 1
    leak = (net(x, t, other) - before).abs().max()
    assert leak > 1e-4 if net.gated else leak < 1e-5  # only the causal gates know more
    other[:, -1] += 1
    assert (net(x, t, other) - before).abs().max() > 1e-4


@torch.inference_mode()
@pytest.mark.parametrize("context", ["full", "last"])
def test_samples_share_the_conditioning(net, context):
    net.context = context
    given, x, t = frames(1, 3, 1), frames(5, 1, 2)[:, 0], torch.full((5,), 20.0)
    shared = net(x, t, given)
    alone = torch.cat([net(x[i : i + 1], t[:1], given) for i in range(5)])
    torch.testing.assert_close(shared, alone, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(net(x, t, net.condition(given, t[:1])), shared)
    several = torch.arange(5.0)  # no sharing here: the features depend on t
    alone = torch.cat([net(x[i : i + 1], several[i : i + 1], given) for i in range(5)])
    torch.testing.assert_close(net(x, several, given), alone, rtol=1e-5, atol=1e-5)


def flops(call):
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def test_costs_are_those_of_the_needed_frames():
    with torch.device("meta"):
        net = network()
        given, x, t = torch.zeros(1, WINDOW, 2, 32, 32), torch.zeros(8, 2, 32, 32), torch.zeros(1)
        conditioning = flops(lambda: net.condition(given, t))
        one, eight = flops(lambda: net(x[:1], t, given)), flops(lambda: net(x, t, given))
        sampled = flops(lambda: net(x, t, given.expand(8, -1, -1, -1, -1)))
        net.context = "last"
        last = flops(lambda: net.condition(given, t))
    assert eight == pytest.approx(conditioning + 8 * (one - conditioning), rel=0.02)
    assert sampled == eight
    assert last < conditioning / 3  # of WINDOW = 4 frames; full context cuts its last block too


def grow(net, sequence, times):
    """Conditions on a growing, then sliding window, all times of a frame before the next frame; compares."""
    for n in range(1, sequence.shape[1] + 1):
        window = sequence[:, max(0, n - WINDOW) : n]
        for t in times:
            for mine, plain in zip(net.condition(window, t), net.condition_anew(window, t), strict=True):
                torch.testing.assert_close(mine, plain, rtol=1e-5, atol=1e-5)


@torch.inference_mode()
@pytest.mark.parametrize("batch", [1, 3])
def test_caching_changes_no_number(net, batch):
    times = [torch.full((batch,), 640.0), torch.arange(batch) + 3.0, torch.tensor(0.5).expand(batch)]
    with net.caching() as report:
        grow(net, frames(batch, WINDOW + 2, 1), times)
        assert report.extensions == (0 if net.gated else 3 * (WINDOW - 1))
        assert report.hits + report.extensions + report.misses == 3 * (WINDOW + 2)
        assert 0 < report.bytes_held < report.budget_bytes
    assert net.cache is None


@torch.inference_mode()
def test_the_cache_knows_what_it_was_made_for():
    """Any other context, label, mode, precision or weight: the numbers are as if nothing had been kept."""
    net, t = network(num_classes=3), torch.tensor([50.0])
    context, other = frames(1, 3, 1), frames(1, 3, 3)

    def check(context, t=t, y=0):
        y = torch.tensor([y] * len(context))
        mine, plain = net.condition(context, t, y), net.condition_anew(context, t.expand(len(context)), y)
        for pair in zip(mine, plain, strict=True):
            torch.testing.assert_close(*pair, rtol=1e-5, atol=1e-5)

    with net.caching() as report:
        check(context[:, :2])
        given = context.clone()
        check(given)
        check(given)
        assert (report.misses, report.extensions, report.hits) == (1, 1, 1)
        given[:, 1] += 1  # in place, and not the newest frame
        check(given)
        check(torch.cat([given[:, :2], other[:, :2]], dim=1))  # two new frames at once after two old ones
        assert (report.misses, report.extensions) == (1, 3)
        check(given[:, :1])
        check(context[:, 1:])  # slid
        check(context[:, 1:], y=2)
        check(context[:, 1:], t=t + 1)
        assert report.misses == 5
        check(torch.cat([context, other]))  # several sequences
        check(context[:, :1])
        assert report.misses == 7
        shared = torch.cat([context[:, :1].expand(2, -1, -1, -1, -1), frames(2, 1, 4)], dim=1)
        check(shared)  # two draws that go on from one beginning
        assert (report.misses, report.extensions) == (7, 4)

        for change in ("last", "bfloat16", "weights"):
            net.context = "last" if change == "last" else "full"
            if change == "weights":
                net.x0_blocks[0][0].weight.mul_(1.5)
            with torch.autocast("cpu", torch.bfloat16, enabled=change == "bfloat16"):
                check(shared)
        hits = report.hits
        net.train()
        check(shared)
        assert report.hits == hits


@torch.inference_mode()
def test_caching_in_half_precision():
    net, context, t = network(), frames(1, WINDOW, 1), torch.tensor([5.0])
    with torch.autocast("cpu", torch.bfloat16), net.caching() as report:
        for n in range(1, WINDOW + 1):
            pairs = zip(net.condition(context[:, :n], t), net.condition_anew(context[:, :n], t), strict=True)
            assert all((mine - plain).norm() < 1e-2 * plain.norm() for mine, plain in pairs)
        assert report.extensions == WINDOW - 1


@torch.inference_mode()
def test_a_small_budget_changes_no_number():
    net, sequence, times = network(), frames(1, WINDOW, 1), [torch.tensor([1.0]), torch.tensor([2.0])]
    with net.caching() as unlimited:
        grow(net, sequence[:, : WINDOW - 1], times)
    for share in (0, 0.4, 0.8):
        with net.caching(int(share * unlimited.bytes_held)) as report:
            grow(net, sequence[:, : WINDOW - 1], times)
            assert report.refusals > 0
            assert report.bytes_held <= report.budget_bytes
            assert (report.extensions > 0) == (share > 0)
    with pytest.raises(ValueError, match="bytes may be held"), net.caching(-1):
        pass


def test_gradients_pass_by_the_cache():
    net, context, t = network(), frames(1, 2, 1), torch.tensor([5.0])
    with net.caching() as report:
        assert net.condition(context, t)[0].requires_grad
        assert report.misses == 0
        net.requires_grad_(False)
        net.condition(context, t)
        x = frames(1, 1, 2)[:, 0].requires_grad_()  # guidance: gradients to the image only
        net(x, t, context).sum().backward()
        assert report.hits == 1 and x.grad.abs().max() > 0
        context.requires_grad_()
        assert net.condition(context, t)[0].requires_grad


@torch.inference_mode()
def test_a_new_frame_costs_one_frame():
    """With the cache, while the window grows; the same context again costs nothing."""
    net, context, t = network(), frames(1, WINDOW, 1, size=16), torch.tensor([5.0])
    one = flops(lambda: net.condition(context[:, :1], t))
    with net.caching():
        for n in range(1, WINDOW + 1):
            assert flops(lambda n=n: net.condition(context[:, :n], t)) <= 1.15 * one
            assert flops(lambda n=n: net.condition(context[:, :n], t)) == 0
    assert flops(lambda: net.condition(context, t)) > 2.5 * one


@torch.inference_mode()
def test_draws_share_the_conditioning_through_denoisers():
    """Which may hand the network copies of one context."""
    net, context, sigma = network(out_channels=2), frames(1, 3, 1, size=16), torch.ones(8)
    x = frames(8, 1, 2, size=16)[:, 0]
    conditioning = flops(lambda: net.condition(context, sigma[:1]))
    one = flops(lambda: net(x[:1], sigma[:1], context))
    eight = flops(lambda: EDMDenoiser(net)(x, sigma, context.expand(8, -1, -1, -1, -1)))
    assert eight == pytest.approx(conditioning + 8 * (one - conditioning), rel=0.02)


def test_operations_at_the_published_fastmri_configuration():
    """In units of 10^9 for one step: the sheet's 349 for the main branch and one or ten frames of context."""
    with torch.device("meta"):
        net = CausalUNet(
            seq_len=10,
            in_channels=2,
            model_channels=128,
            out_channels=4,
            num_res_blocks=2,
            channel_mult=default_channel_mult(320),
            attention_resolutions=(16, 32),
            num_heads=4,
            use_scale_shift_norm=True,
        ).eval()
        context, x, t = torch.zeros(1, 10, 2, 320, 320), torch.zeros(1, 2, 320, 320), torch.zeros(1)
        full = flops(lambda: net(x, t, context)) / 1e9
        memory = Memory()
        net.condition_anew(context[:, :9], t, memory=memory)
        cached = flops(lambda: net(x, t, net.condition_anew(context, t, memory=memory))) / 1e9
        net.context = "last"
        last = flops(lambda: net(x, t, context)) / 1e9
    print(f"last {last:.1f}, full {full:.1f}, full with cache {cached:.1f} GFLOP a step")
    assert last <= 400
    assert full <= 870
    assert cached <= 1.02 * 400


def test_frame_attention_is_the_published_formula():
    """Causal softmax over frames with logits divided by the square root of the full width."""
    torch.manual_seed(0)
    attention, x = FrameAttention(8, 2), torch.randn(2, 5, 3, 8)
    q, k, v = (layer(x).unflatten(-1, (2, 4)) for layer in (attention.queries, attention.keys, attention.values))
    logits = torch.einsum("bnphc,bmphc->bphnm", q, k) / 8**0.5
    logits = logits.masked_fill(torch.ones(5, 5).triu(1).bool(), -torch.inf)
    h = torch.einsum("bphnm,bmphc->bnphc", logits.softmax(-1), v).flatten(-2)
    torch.testing.assert_close(attention(x), attention.fc_out(h), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(attention(x, newest_only=True), attention.fc_out(h)[:, -1:], rtol=1e-5, atol=1e-5)


def test_positions_are_sines_and_cosines_in_turn():
    p = positional_embedding(3, 4)
    for n, k in itertools.product(range(3), range(2)):
        angle = torch.tensor(n * 1e4 ** (-2 * k / 4))
        torch.testing.assert_close(p[0, n, 2 * k : 2 * k + 2], torch.stack([angle.sin(), angle.cos()]))


def test_two_stages():
    """Stage 1 is the main branch alone; in stage 2 only the context branch and the connectors learn."""
    net = network(**VARIANTS["connectors"]).train()
    context, x, t = frames(2, 3, 1), frames(2, 3, 2), torch.tensor([1.0, 2.0])
    net(x, t).square().mean().backward()
    learnt = {name.split(".")[0] for name, p in net.named_parameters() if p.grad is not None}
    assert learnt == {"time_embed", "input_blocks", "middle_block", "output_blocks", "out"}
    torch.testing.assert_close(net(x, t)[:, 1], net(x[:, 1], t))
    net.zero_grad()
    net.freeze_main()
    net(x, t, context).square().mean().backward()
    learnt = {name.split(".")[0] for name, p in net.named_parameters() if p.grad is not None}
    assert learnt == {"x0_blocks", "connectors"}
    assert all(p.requires_grad for p in net.freeze_main(False).parameters())


def test_the_second_stage_starts_as_the_single_image_network():
    """Exactly, whatever the context; the first step opens the gates, the second reaches the context branch."""
    options = dict(in_channels=2, model_channels=32, out_channels=4, num_res_blocks=1, channel_mult=(1, 2))
    torch.manual_seed(1)
    single = UNet(**options, num_heads=4, use_scale_shift_norm=True).eval()
    for p in single.parameters():
        torch.nn.init.normal_(p, std=0.1)
    net = network(concat_cond=False, attention_resolutions=()).start_from_main(single.state_dict())
    context, x, t = frames(2, 3, 1), frames(2, 3, 2), torch.tensor([1.0, 2.0])
    assert torch.equal(net(x[:, 1], t, context), single(x[:, 1], t))
    assert torch.equal(net(x, t, context)[:, 2], net(x, t)[:, 2])

    learning = [p for p in net.freeze_main().parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(learning, lr=1e-3)
    for step in range(2):
        net.zero_grad()
        net(x, t, context).square().mean().backward()
        reached = any(p.grad is not None and p.grad.abs().max() > 0 for p in net.x0_blocks.parameters())
        assert reached == (step == 1)
        optimizer.step()
    assert not torch.equal(net(x[:, 1], t, context), single(x[:, 1], t))


def test_a_start_from_other_weights_says_what_is_wrong():
    options = dict(in_channels=2, model_channels=32, num_res_blocks=1, channel_mult=(1, 2))
    weights = UNet(**options, out_channels=2, num_heads=4, use_scale_shift_norm=True).state_dict()
    with pytest.raises(ValueError, match="out.2.bias, out.2.weight"):
        network(concat_cond=False).start_from_main(weights)
    with pytest.raises(ValueError, match="build it with concat_cond=False"):
        network().start_from_main(weights)


def test_checkpointing_and_autocast_change_nothing_else():
    net, saving = network(), network(use_checkpoint=True)
    context, x, t = frames(2, 3, 1), frames(2, 3, 2), torch.tensor([1.0, 2.0])
    outputs = [n(x, t, context) for n in (net, saving)]
    for out in outputs:
        out.square().mean().backward()
    torch.testing.assert_close(*outputs)
    for p, q in zip(net.parameters(), saving.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        half = net(x, t, context)
    assert (half - outputs[0]).norm() < 0.05 * outputs[0].norm()


def test_sequences_of_volumes():
    net = network(dims=3)
    context, x = torch.randn(1, 2, 2, 4, 4, 4), torch.randn(1, 2, 2, 4, 4, 4)
    together = net(x, torch.ones(1), context)
    torch.testing.assert_close(net(x[:, 1], torch.ones(1), context), together[:, 1], rtol=1e-5, atol=1e-5)


def test_errors_say_what_to_do():
    net, x, t = network(), frames(1, 2, 1), torch.zeros(1)
    with pytest.raises(ValueError, match="give it a blank one"):
        net(x, t)
    with pytest.raises(ValueError, match="1 to seq_len=4 frames"):
        net(x[:, 0], t, frames(1, 5, 1))
    with pytest.raises(ValueError, match="they must be equal"):
        net(x, t, frames(1, 3, 1))
    with pytest.raises(ValueError, match="one time per sequence"):
        net(x, torch.zeros(2), x)
    with pytest.raises(ValueError, match='"full" or "last"'):
        network(context="first")
