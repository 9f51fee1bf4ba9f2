"""Packages that only some of companion needs: when one is missing, the error is the command that installs it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def extra(name: str) -> Iterator[None]:
    """Imports inside the block belong to the extra `name` of pyproject.toml.

    Raises ModuleNotFoundError with the command that installs the extra when a module is missing.

        with extra("mri-extra"):
            from sigpy.mri import poisson
    """
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "a package").partition(".")[0]
        if package == "companion":
            raise
        advice = f'{package} is not installed; install it with: pip install "companion[{name}]"'
        raise ModuleNotFoundError(advice, name=error.name) from error
