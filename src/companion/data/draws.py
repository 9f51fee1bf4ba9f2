"""Drawn images on disk in the formats of those who measure them, each with all that a metric asks for.

draws = Draws(x, seeds, ["subject 7"], {"truth": truth}, {"truth": "kBq/mL"}, about)    # x (case, draw, 1, y, x)
draws.write(folder, ("npz", "nifti"))
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from companion.data.nifti import save_nifti
from companion.data.store import write_dataset
from companion.files import atomic_write

FORMATS = ("npz", "hdf5", "nifti", "png")
SEED_STEP = 1_000_000  # draw s of case i has the seed s + i * SEED_STEP, so that no two cases share their noise
GREY = 65535  # levels of a 16-bit PNG


@dataclass(frozen=True, eq=False)
class Draws:
    """Drawn slices x (case, draw, 1, y, x), and what each case was given.

    names (case): whose. given: name -> (case, ...), with its unit; "counts" (case,) go into tables too. about: weights,
    units, pixel_mm and whatever else is to be known.
    """

    x: Tensor
    seeds: Sequence[int]
    names: Sequence[str]
    about: Mapping[str, object]
    given: Mapping[str, Tensor] = field(default_factory=dict)
    units: Mapping[str, str] = field(default_factory=dict)

    def write(self, folder: str | os.PathLike, formats: Sequence[str] = FORMATS) -> list[Path]:
        """The files written to a folder, each with the scale, and with what the cases were given.

        npz and hdf5 (`data.store`) hold everything; drawn.nii.gz is draws one behind the other, case by case, with a
        table beside it; PNGs are 16-bit, level = value / `kbq_per_level` as their text says, negative values 0.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        writers = {"npz": self._npz, "hdf5": self._hdf5, "nifti": self._nifti, "png": self._png}
        return [path for name, writer in writers.items() if name in formats for path in writer(folder)]

    def rows(self) -> list[dict]:
        """One row per image, case by case: whose it is, its counts, its seed."""
        rows = []
        for i, name in enumerate(self.names):
            case = {"case": name} | ({"counts": self.given["counts"][i].item()} if "counts" in self.given else {})
            rows += [case | {"seed": seed + i * SEED_STEP} for seed in self.seeds]
        return rows

    def _arrays(self) -> dict[str, np.ndarray]:
        return {name: value.float().numpy() for name, value in ({"drawn": self.x} | dict(self.given)).items()}

    def _npz(self, folder: Path) -> list[Path]:
        about = {"seeds": np.array(self.seeds), "name": np.array(self.names), "about": np.array(json.dumps(self.about))}
        with atomic_write(folder / "drawn.npz") as aside:
            whole: dict[str, Any] = self._arrays() | about
            np.savez_compressed(aside, **whole)
        return [folder / "drawn.npz"]

    def _hdf5(self, folder: Path) -> list[Path]:
        arrays = self._arrays()
        return [
            write_dataset(
                folder / "drawn.h5",
                arrays,
                units={"drawn": str(self.about["units"])} | dict(self.units),
                scale=dict.fromkeys(arrays, 1.0),
                source=str(self.about["weights"]),
                seed=None,
                subjects=self.names,
                split={},
                attrs=dict(self.about) | {"seeds": self.seeds},
            )
        ]

    def _nifti(self, folder: Path) -> list[Path]:
        stack, mm = self.x.flatten(0, 2).numpy(), self.about["pixel_mm"]
        units = f"{self.about['units']}; draws as slices, see drawn.json"
        volume = save_nifti(folder / "drawn.nii.gz", stack[:, ::-1], voxel_mm=(mm, mm, mm), units=units)
        rows = [{"slice": i, **row} for i, row in enumerate(self.rows())]
        with atomic_write(folder / "drawn.json") as aside:
            aside.write_text(json.dumps(dict(self.about) | {"slices": rows}, indent=1) + "\n")
        return [volume, folder / "drawn.json"]

    def _png(self, folder: Path) -> list[Path]:
        top, paths = max(self.x.amax().item(), 1e-6), []
        (folder / "png").mkdir(exist_ok=True)
        for i, (x, row) in enumerate(zip(self.x.flatten(0, 2), self.rows(), strict=True)):
            text = PngInfo()
            for name, value in (row | dict(self.about) | {"kbq_per_level": top / GREY}).items():
                text.add_text(name, str(value))
            levels = (x / top).clamp(0, 1).mul(GREY).round().numpy().astype(np.uint16)
            paths.append(folder / "png" / f"{i:06d}.png")
            with atomic_write(paths[-1]) as aside:
                Image.fromarray(levels).save(aside, format="PNG", pnginfo=text)
        return paths
