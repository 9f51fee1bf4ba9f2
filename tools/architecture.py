"""Draw docs/architecture.png from the code's own imports: rooms as boxes on their floors, imports as lines.

The floors are those that tests/test_architecture.py holds; a line's width is the number of imports.
"""

import runpy
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

ROOT = Path(__file__).resolve().parents[1]


def draw(out: Path) -> None:
    """Write the picture."""
    house = runpy.run_path(str(ROOT / "tests" / "test_architecture.py"))
    places, floors = {}, house["FLOORS"]
    for height, names in enumerate(floors):
        for i, name in enumerate(sorted(names)):
            places[name] = ((i - (len(names) - 1) / 2) * 2.2 + (-1) ** height * 0.55 * (len(names) == 1), height)
    figure, axis = plt.subplots(figsize=(8, 9), layout="constrained")
    for (above, below), imports in sorted(house["arrows"]().items()):
        (x0, y0), (x1, y1) = places[above], places[below]
        axis.annotate(
            "",
            (x1, y1 + 0.28),
            (x0, y0 - 0.28),
            arrowprops={"arrowstyle": "-|>", "color": "#4477aa", "alpha": 0.45, "lw": 0.6 + len(imports) ** 0.5 / 2},
        )
    box = {"boxstyle": "round,pad=0.35", "facecolor": "white", "edgecolor": "#333333"}
    for name, (x, y) in places.items():
        axis.text(x, y, name, ha="center", va="center", fontsize=11, bbox=box, zorder=3)
    axis.set(xlim=(-4.6, 4.6), ylim=(-0.6, len(floors) - 0.4))
    axis.axis("off")
    figure.savefig(out, dpi=110)


if __name__ == "__main__":
    draw(ROOT / "docs" / "architecture.png")
