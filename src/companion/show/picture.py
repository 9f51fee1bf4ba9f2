"""What a viewer shows: pictures, their levels and windows."""

from __future__ import annotations

import base64
import io

import numpy as np
from traitlets import Unicode

from companion.extras import extra

with extra("notebooks"):
    import ipywidgets as widgets

NAMES = {("y", "x"): "axial", ("z", "x"): "coronal", ("z", "y"): "sagittal"}
THREE = (("y", "x"), ("z", "x"), ("z", "y"))
COLOURS = ("gray", "viridis", "cividis", "magma")
WIDTHS = {"small": 130, "medium": 190, "large": 380}  # pixels on the screen
MOST = 7  # pictures beside one another, to begin with
MIDDLE = ("z", "y", "x", "slice", "phase 2")  # axes whose middle is looked at first


def close(widget: widgets.DOMWidget) -> None:
    """Forget a widget and all that it holds, here and in the browser; else a long session fills the memory."""
    for part in (*getattr(widget, "children", ()), widget.layout, getattr(widget, "style", None)):
        if isinstance(part, widgets.DOMWidget):
            close(part)
        elif isinstance(part, widgets.Widget):
            part.close()
    widget.close()


class Picture(widgets.Image):
    """An image with a text for those who do not see it."""

    description = Unicode("").tag(sync=True)  # the front end sets no tooltip on a widget without one


class Shown:
    """Something with a widget `box` and a still `figure()`: a notebook shows the one and keeps the other."""

    box: widgets.DOMWidget

    def alt(self) -> str:
        """What the picture shows, in words."""
        raise NotImplementedError

    def figure(self):
        """The still picture, a matplotlib figure."""
        raise NotImplementedError

    def still(self) -> bytes:
        """The still picture as a PNG file."""
        file = io.BytesIO()
        self.figure().savefig(file, format="png", dpi=110, bbox_inches="tight", metadata={"Software": None})
        return file.getvalue()

    def _repr_mimebundle_(self, **_):
        """Jupyter takes the widget where it can, else (executed copies, HTML pages, a code host) the picture."""
        bundle = self.box._repr_mimebundle_() or {}
        return bundle | {"image/png": base64.b64encode(self.still()).decode()}, {"image/png": {"alt": self.alt()}}


def _square(x: np.ndarray, aspect: float) -> np.ndarray:
    """A picture whose pixels are square: rows repeated (or left out) to the nearest."""
    rows = max(1, round(len(x) * aspect))
    return x if rows == len(x) else x[np.minimum((np.arange(rows) + 0.5) / aspect, len(x) - 1).astype(int)]
