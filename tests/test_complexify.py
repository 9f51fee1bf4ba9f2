import pytest
import torch

from companion.diffusion.complexify import to_channels, to_complex


@pytest.mark.parametrize("shape, axis", [((2, 1, 5, 4), 1), ((2, 3, 4, 5, 3), 1), ((2, 4, 3, 5, 6), 2)])
def test_round_trip_keeps_every_value_in_the_stated_order(shape, axis):
    x = torch.randn(shape, dtype=torch.complex64, generator=torch.Generator().manual_seed(0))
    channels = to_channels(x, axis)
    assert channels.shape[axis] == 2 * shape[axis]
    assert torch.equal(channels.narrow(axis, 0, 1), x.real.narrow(axis, 0, 1))
    assert torch.equal(channels.narrow(axis, 1, 1), x.imag.narrow(axis, 0, 1))
    assert torch.equal(to_complex(channels, axis), x)


def test_errors_and_real_input():
    real = torch.ones(1, 3, 4)
    assert to_channels(real) is real
    with pytest.raises(ValueError, match="even number"):
        to_complex(real)
    with pytest.raises(TypeError, match="real"):
        to_complex(real.to(torch.complex64))
