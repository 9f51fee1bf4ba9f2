"""Seeds and noise: one generator per draw, so that a seed gives the same draw in any batch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import cast

import torch
from torch import Generator, Tensor

# --- the draws


def parse_seeds(seeds: str | int | Iterable[int]) -> list[int]:
    """List of seeds from an int, a list, or text such as "0-63,80"; "3-1" is an error."""
    if isinstance(seeds, int):
        return [seeds]
    if not isinstance(seeds, str):
        return [int(seed) for seed in seeds]
    numbers = []
    for part in seeds.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.strip().isdigit() or (dash and not last.strip().isdigit()):
            raise ValueError(f"seeds {seeds!r}: {part!r} is neither a number nor a range such as '0-63'")
        low, high = int(first), int(last) if dash else int(first)
        if high < low:
            raise ValueError(f"seeds {seeds!r}: the range {part!r} runs backwards; write '{high}-{low}'")
        numbers += range(low, high + 1)
    return numbers


def generators(seeds: str | int | Generator | Iterable[int] | Iterable[Generator]) -> list[Generator]:
    """One CPU generator per seed. Generators pass through, so that a chain may go on with its own."""
    if isinstance(seeds, Generator):
        return [seeds]
    if not isinstance(seeds, str | int):
        given = list(seeds)
        if given and all(isinstance(seed, Generator) for seed in given):
            return cast(list[Generator], given)
        seeds = cast(list[int], given)
    return [Generator().manual_seed(seed) for seed in parse_seeds(seeds)]


class Signed(Generator):
    """A generator that draws normal noise (`randn`) from one of its own, times a sign, and all else as ever.

    So two of them have opposite noise however much else each of them draws.
    """

    noise: Generator
    sign: int

    @classmethod
    def of(cls, noise: int, sign: int, seed: int) -> Signed:
        """That of the seed `noise` for normal noise, and of another for all else."""
        found = cls()
        found.manual_seed(seed ^ 2**31)  # not that of the noise
        found.noise, found.sign = Generator().manual_seed(noise), sign
        return found


def antithetic(seeds: str | int | Iterable[int] | Iterable[Generator]) -> list[Generator]:
    """Generators of draws in pairs: every second one has the opposite noise of the one before. Of an odd number all are
    independent; generators pass through.

    Where a sampler takes noise to a draw nearly linearly, as one does that has seen much data, the noise cancels in the
    mean of a pair, which is then as good as that of many independent draws; each draw alone is as random as ever. How
    far such draws scatter is another question than for independent ones, see `metrics.spread`. [hammersley1956]
    """
    given = parse_seeds(seeds) if isinstance(seeds, str | int) else list(seeds)
    if len(given) % 2 or any(isinstance(seed, Generator) for seed in given):
        return generators(cast(list[int], given))
    numbers = [int(seed) for seed in cast(list[int], given)]
    return [Signed.of(numbers[i - i % 2], (-1) ** i, seed) for i, seed in enumerate(numbers)]


def are_antithetic(draws: Sequence[Generator]) -> bool:
    """Whether the generators are those of `antithetic` draws in pairs."""
    return len(draws) > 1 and all(isinstance(draw, Signed) and draw.sign == (-1) ** i for i, draw in enumerate(draws))


def randn(
    shape: Sequence[int],
    dtype: torch.dtype,
    generator: Generator | Sequence[Generator] | None,
    device: torch.device | str | None = None,
) -> Tensor:
    """Standard normal noise; for complex dtypes the real and the imaginary part have standard deviation 1
    each.

    generator: one, which fills the whole shape; or a list, one per batch item, whose draws (*shape) are
    stacked to (batch, *shape): then an item's noise does not depend on its batch. Drawn where the generator
    lives, then moved.
    """
    if generator is None:
        raise TypeError("randn got no generator; randomness is an argument here: torch.Generator().manual_seed(seed)")
    if not isinstance(generator, Generator):
        return torch.stack([randn(shape, dtype, one, device) for one in generator])
    if isinstance(generator, Signed):
        return generator.sign * randn(shape, dtype, generator.noise, device)
    real = dtype.to_real()
    parts = (*shape, 2) if dtype.is_complex else tuple(shape)
    noise = torch.randn(parts, dtype=real, generator=generator, device=generator.device)
    return (torch.view_as_complex(noise) if dtype.is_complex else noise).to(device or generator.device)
