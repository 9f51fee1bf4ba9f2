"""Puts checkpoints, notebooks and workflow into the wheel, as companion/share; all else is in pyproject.toml."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

SHARE = ("checkpoints", "notebooks", "workflow")


class BuildWithShare(build_py):
    """build_py, and what an installed package reads beside its code; an editable one reads the checkout."""

    def run(self):
        super().run()
        if not self.editable_mode:
            for name in SHARE:
                target = Path(self.build_lib) / "companion" / "share" / name
                shutil.copytree(name, target, dirs_exist_ok=True, ignore=shutil.ignore_patterns(".*", "__pycache__"))


setup(cmdclass={"build_py": BuildWithShare})
