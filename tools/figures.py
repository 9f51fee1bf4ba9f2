"""The pictures of the README, taken from runs, most of them of `make demo`, and made small: run by `make figures`.

A picture whose run is missing stays as it is, and the command that makes the run is said.
"""

import io
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from companion.files import atomic_write
from companion.show.gallery import RunGrid
from companion.show.stack import colour_table
from companion.workbench.catalogue import find_entries

WIDTH = 1000
# picture: run, figure in it (a pattern), how to make the run
PICTURES = {
    "start_here.png": ("brain/start_here/demo", "methods.png", "companion batch start_here"),
    "aid.png": ("aid/4_reconstruct/demo", "volume.png", "companion batch aid_reconstruct"),
    "lmi.png": ("lmi/4_translate/demo", "T1w*T2w.png", "companion batch lmi_translate"),
    "latent3d.png": ("latent3d/3_sample/demo", "real_reconstructed_synthetic.png", "companion batch latent3d_sample"),
    "pet-images.png": (
        "pet/4_enhance/table",
        "images.png",
        "companion run notebooks/pet/4_enhance.ipynb -f notebooks/params/pet/4_enhance/table.yaml",
    ),
}


def main() -> int:
    root, missing = Path(__file__).parents[1], 0
    done = {entry.name: entry for entry in find_entries(root / "runs") if entry.done}
    for name, (run, pattern, make) in PICTURES.items():
        found = sorted(done[run].folder.glob(pattern)) if run in done else []
        if found:
            with Image.open(found[0]) as image:
                write(root / "docs" / name, image.convert("RGB"))
        else:
            missing += 1
            print(f"docs/{name} stays as it is: no finished runs/{run} with {pattern}; {make}")
    write(root / "docs" / "gallery.png", gallery(root))
    return missing


def gallery(root: Path) -> Image.Image:
    """Three planes of an example volume as the gallery's viewer saves them."""
    from companion.show.examples import write_examples

    folder = root / "build" / "examples"
    write_examples(folder, accelerations=(3,), doses=(), people=(0,))
    viewer = RunGrid(find_entries(folder)).viewer
    viewer.plane.value = dict(viewer.plane.options)["three planes"]
    return Image.open(io.BytesIO(viewer.still())).convert("RGB")


def write(path: Path, image: Image.Image) -> None:
    """Write a picture at most WIDTH wide in the colours that the figures use: greys, and the map of errors."""
    image.thumbnail((WIDTH, 0.7 * WIDTH), Image.LANCZOS)
    grey, errors = (colour_table(name)[np.linspace(0, 255, n).astype(int)] for name, n in (("gray", 64), ("magma", 96)))
    palette = Image.new("P", (1, 1))
    palette.putpalette(np.concatenate([grey, errors]).ravel().tolist())
    with atomic_write(path) as aside:
        image.quantize(palette=palette, dither=Image.Dither.NONE).save(aside, optimize=True)
    print(f"docs/{path.name}: {image.width} x {image.height}, {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    sys.exit(1 if main() else 0)
