"""The gallery: every run under a folder in one table, sorted by a click, filtered, opened beside its numbers.

    Gallery("runs")                      all runs
    RunGrid(find_entries("runs"), ...)   sliders over the parameters in which runs differ: dose, acceleration, seed

The table shows one page of rows and reuses them, so that 2000 runs open as fast as 20.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from functools import lru_cache, partial
from html import escape
from pathlib import Path
from typing import Any

from companion.extras import extra
from companion.files import project_root
from companion.show import figures
from companion.show.picture import Shown, close
from companion.show.stack import Stack, open_stack
from companion.show.viewer import Viewer
from companion.workbench.catalogue import Entry, conditions, find_entries, fulfils
from companion.workbench.index import duration, numbers
from companion.workbench.run import NOTEBOOK

with extra("notebooks"):
    import ipywidgets as widgets
    import matplotlib.pyplot as plt

ROWS = 12
SLIDERS = 4  # parameters in which the runs of a grid may differ; with more they are not a grid but different runs
WORDS = {
    "done": "done",
    "running": "… running",
    "incomplete": "– incomplete",
    "corrupt": "✗ corrupt",
    "older": "↺ older",
}
RUNNING_ONLY = ("out", "device", "data", "cache_mib")  # parameters that say where and how, not what
CSS = """<style>
.companion-row { font-size: 13px; line-height: 28px; display: grid; column-gap: 12px;
  grid-template-columns: 9rem 9.5rem 6rem 1fr; font-variant-numeric: tabular-nums; white-space: nowrap; }
.companion-row.stale { color: #6b6b6b; font-style: italic; }
.companion-name { text-align: left; }
.companion-record table { border-collapse: collapse; font-size: 13px; }
.companion-record th, .companion-record td { padding: 2px 16px 2px 0; text-align: left; }
</style>"""


class Gallery(Shown):
    """A table of the runs below a folder, with filters, and the run that was chosen beneath it."""

    metric: Any  # the traits of ipywidgets have no types

    def __init__(self, runs: str | os.PathLike | None = None, *, paper: str = "all", where: str = ""):
        self.runs = Path(runs) if runs is not None else project_root() / "runs"
        self.entries = find_entries(self.runs)
        self.shown: list[Entry] = []
        self.opened: Entry | None = None
        self.viewer: Viewer | None = None
        self._order, self._falling, self._page, self._rows, self._busy = "finished", True, 0, [], True
        self._make_widgets(paper, where)
        self._busy = False
        self._filter()

    def names(self) -> list[str]:
        """Names of the runs that pass the filters, in the order of the table."""
        return [entry.name for entry in self.shown]

    def sort(self, column: str, _=None) -> None:
        """Sort by a column; a second time the other way round."""
        self._falling = not self._falling if column == self._order else column in ("finished", "metric")
        self._order = column
        self._filter()

    def open(self, entry: Entry | str) -> Viewer | None:
        """Show a run beneath the table, by name or entry; its viewer, if it has images. ValueError if not known."""
        if isinstance(entry, str):
            found = next((e for e in self.entries if e.name == entry), None)
            if found is None:
                raise ValueError(f"there is no run {entry} below {self.runs}; there are {len(self.entries)} others")
            entry = found
        former = self._detail.children
        self.opened = entry
        self._forget_viewer()
        self._detail.children = self._about(entry)
        for widget in former:
            close(widget)
        return self.viewer

    def open_first(self) -> Viewer | None:
        """Show the first run of the table that wrote images for it, else the first that can be viewed; None if none."""
        entries = [entry for entry in self.shown if entry.done and entry.files()]
        entries.sort(key=lambda entry: not entry.files()[0].endswith(".h5"))
        return self.open(entries[0]) if entries else None

    def _forget_viewer(self) -> None:
        if self.viewer is not None:
            self.viewer.close()
        self.viewer = None

    def alt(self) -> str:
        return f"{len(self.shown)} of {len(self.entries)} runs: a picture of each of the first, with its name and state"

    def figure(self):
        """A contact sheet: the first picture of each of the first twelve runs of the table."""
        entries = self.shown[:12]
        columns = max(1, min(4, len(entries)))
        rows = max(1, -(-len(entries) // columns))
        with plt.rc_context(figures.STYLE):
            fig, axes = plt.subplots(rows, columns, squeeze=False, figsize=(2.6 * columns, 1.9 * rows))
            for ax in axes.flat:
                ax.set_axis_off()
            for ax, entry in zip(axes.flat, entries, strict=False):
                ax.set_title("\n".join(_lines(entry.name)), fontsize=6.5, color="black" if entry.done else "0.4")
                first = next(
                    (
                        n
                        for n, about in entry.record.get("results", {}).items()
                        if n.endswith(".png") and (entry.folder / n).is_file()
                    ),
                    None,
                )
                if entry.done and first:
                    ax.imshow(figures.thumbnail(entry.folder / first))
                else:
                    ax.text(
                        0.5,
                        0.5,
                        f"{WORDS[entry.state.state]}\n{entry.state.reason}"[:90],
                        wrap=True,
                        ha="center",
                        va="center",
                        fontsize=6.5,
                        color="0.4",
                        transform=ax.transAxes,
                    )
            fig.tight_layout()
        plt.close(fig)
        return fig

    # ------------------------------------------------------------------ widgets

    def _make_widgets(self, paper: str, where: str) -> None:
        wide = {"style": {"description_width": "initial"}, "layout": {"width": "auto"}}
        papers, stages = (sorted({e.get(k) for e in self.entries if e.get(k)}) for k in ("paper", "stage"))
        states = sorted({e.state.state for e in self.entries})
        self.paper = widgets.Dropdown(options=["all", *papers], description="paper", **wide)
        self.paper.value = paper if paper in self.paper.options else "all"
        self.stage = widgets.Dropdown(options=["all", *stages], description="stage", **wide)
        self.states = widgets.Dropdown(options=["all", *states], description="state", **wide)
        self.where = widgets.Text(
            value=where,
            description="where",
            continuous_update=False,
            placeholder="acceleration >= 8, mask = random, PSNR > 25",
            **wide,
        )
        self.where.layout.width = "430px"
        self.metric = widgets.Dropdown(options=["-"], description="number", **wide)
        self.metric.layout.max_width = "430px"
        self.count = widgets.HTML()
        for control in (self.paper, self.stage, self.states, self.where):
            control.observe(self._filter, "value")
        self.metric.observe(self._filter, "value")
        layout = {"width": "auto", "margin": "0 4px 0 0"}
        self.headers = {c: widgets.Button(description=c, layout=layout) for c in ("run", "state", "finished", "metric")}
        for column, button in self.headers.items():
            button.on_click(partial(self.sort, column))
        for _ in range(min(ROWS, max(1, len(self.entries)))):
            button = widgets.Button(layout={"width": "26rem"})
            button.add_class("companion-name")
            button.on_click(self._clicked)
            self._rows.append((button, widgets.HTML(layout={"margin": "0 0 0 12px"})))
        back, on = (widgets.Button(description=f"{which} page", layout={"width": "auto"}) for which in ("back", "next"))
        back.on_click(lambda _: self._turn(-1))
        on.on_click(lambda _: self._turn(1))
        self.pages = widgets.HTML()
        flow = {"flex_flow": "row wrap"}
        self._detail = widgets.VBox()
        self.box = widgets.VBox(
            [
                widgets.HTML(CSS),
                widgets.HBox([self.paper, self.stage, self.states, self.metric, self.where], layout=flow),
                self.count,
                widgets.HBox([widgets.HTML("sort by"), *self.headers.values()], layout=flow),
                *(widgets.HBox(row) for row in self._rows),
                widgets.HBox([back, on, self.pages]),
                self._detail,
            ]
        )

    def _filter(self, _=None) -> None:
        if self._busy:
            return
        note = ""
        try:
            wanted = conditions(self.where.value)
        except ValueError as error:
            wanted, note = [], f"; {error}"
        exact = ((self.paper, "paper"), (self.stage, "stage"))
        self.shown = [
            e
            for e in self.entries
            if all(c.value in ("all", e.get(key)) for c, key in exact)
            and self.states.value in ("all", e.state.state)
            and all(fulfils(e, *condition) for condition in wanted)
        ]
        self._offer()
        self.shown.sort(key=self._key, reverse=self._falling)
        self._page = 0
        done = sum(e.done for e in self.shown)
        self.count.value = (
            f'<span role="status">{len(self.shown)} of {len(self.entries)} runs, {done} done{escape(note)}</span>'
        )
        for column, button in self.headers.items():
            arrow = ("", " ▲", " ▼")[(column == self._order) * (1 + self._falling)]
            button.description = (self.metric.value if column == "metric" else column) + arrow
            button.tooltip = f"sort by {column}"
        self._fill()

    def _offer(self) -> None:
        """Let *number* choose among the numbers of the runs shown, those of most runs and PSNR first."""
        names: dict[str, int] = {}
        for entry in self.shown:
            for name in entry.values:
                names[name] = names.get(name, 0) + 1
        ordered = sorted(names, key=lambda name: ("psnr" not in name.lower(), -names[name], name)) or ["-"]
        if tuple(ordered) != tuple(self.metric.options):
            self._busy, kept = True, self.metric.value
            self.metric.options = ordered
            self.metric.value = kept if kept in names else ordered[0]
            self._busy = False

    def _key(self, entry: Entry):
        number = entry.values.get(self.metric.value)
        missing = float("-inf") if self._falling else float("inf")
        return {
            "run": entry.name,
            "state": entry.state.state,
            "finished": entry.get("end"),
            "metric": missing if number is None else number,
        }[self._order]

    def _turn(self, step: int) -> None:
        last = max(0, (len(self.shown) - 1) // ROWS)
        self._page = min(max(self._page + step, 0), last)
        self._fill()

    def _fill(self) -> None:
        """Put the present page into the rows; those left over are hidden."""
        page = self.shown[self._page * ROWS : (self._page + 1) * ROWS]
        for i, (button, cells) in enumerate(self._rows):
            entry = page[i] if i < len(page) else None
            button.layout.display = cells.layout.display = None if entry else "none"
            if entry is None:
                continue
            button.description, button.tooltip = entry.name, f"open {entry.name}"
            number = entry.values.get(self.metric.value)
            said = [
                WORDS[entry.state.state],
                entry.get("end")[:16].replace("T", " "),
                duration(entry.record.get("seconds")),
                entry.state.reason if not entry.done else "" if number is None else f"{number:.4g}",
            ]
            spans, stale = "".join(f"<span>{escape(text)}</span>" for text in said), "" if entry.done else " stale"
            cells.value = f'<div class="companion-row{stale}">{spans}</div>'
        self.pages.value = f"page {self._page + 1} of {max(1, -(-len(self.shown) // ROWS))}"

    def _clicked(self, button: widgets.Button) -> None:
        self.open(button.description)

    # ------------------------------------------------------------------ one run

    def _about(self, entry: Entry) -> list[widgets.Widget]:
        head = [f"<h3>{escape(entry.name)}</h3>"]
        if not entry.done:
            head.append(f"<p><b>{WORDS[entry.state.state]}</b>: {escape(entry.state.reason)}.</p>")
            if (entry.folder / NOTEBOOK).is_file():
                head.append(f"<p>Its notebook, as far as it came: {escape(str(entry.folder / NOTEBOOK))}</p>")
            return [widgets.HTML("".join(head))]
        tabs, titles = [], []
        if entry.files():
            tabs.append(_FileViewer(self, entry))
            titles.append("images")
        shown = [(n, about) for n, about in entry.record["results"].items() if n.endswith((".png", ".gif"))]
        if shown:
            tabs.append(widgets.HTML("".join(_figure(entry.folder / name, about) for name, about in shown)))
            titles.append("figures")
        for title, values in (
            ("numbers", entry.metrics),
            ("parameters", entry.parameters),
            ("cost", entry.record.get("bill", {})),
            ("versions", entry.record.get("packages", {})),
        ):
            if values:
                tabs.append(widgets.HTML(f'<div class="companion-record">{numbers(values)}</div>'))
                titles.append(title)
        return [widgets.HTML("".join(head)), widgets.Tab(tabs, titles=titles)]


class _FileViewer(widgets.VBox):
    """The images of a run: a choice of files above a viewer."""

    def __init__(self, gallery: Gallery, entry: Entry):
        super().__init__()
        self._gallery, self._entry = gallery, entry
        self._file: Any = widgets.Dropdown(options=entry.files(), description="file")
        self._file.observe(self._open, "value")
        self._open()

    def _open(self, _=None) -> None:
        self._gallery._forget_viewer()
        try:
            if problem := self._entry.changed(self._file.value):
                raise ValueError(problem)
            self._gallery.viewer = Viewer(stack_of(self._entry, self._file.value))
            shown = self._gallery.viewer.box
        except (ValueError, OSError) as error:
            shown = widgets.HTML(f"<p><b>✗ cannot be shown</b>: {escape(str(error))}</p>")
        former: Any = self.children  # of a traitlet, which has no type
        former, self.children = former[1:], [self._file, shown]
        for widget in former:
            close(widget)


def stack_of(entry: Entry, file: str) -> Stack:
    """The images in a file of a run; the last few stay in memory."""
    path = entry.folder / file
    return _stack(path, path.stat().st_mtime_ns)


@lru_cache(maxsize=12)
def _stack(path: Path, _changed: int) -> Stack:
    return open_stack(path)


class RunGrid(Shown):
    """Sliders over the parameters in which runs differ, above the images of the run that they choose.

    entries: of one kind, such as those of one stage. file: the result to show, by default the first that all have.
    metric: a part of the name of the number shown. Raises ValueError when there are no two finished runs with images.
    """

    def __init__(self, entries: Sequence[Entry], *, file: str | None = None, metric: str = ""):
        entries = [e for e in entries if e.done and e.files() and (file is None or file in e.files())]
        if not entries:
            raise ValueError("a grid needs finished runs with images; finish some first (companion batch, make demo)")
        common = set.intersection(*(set(e.files()) for e in entries))
        if not common:
            raise ValueError("these runs have no file of images in common; choose runs of one stage")
        self.file = file or next(name for name in entries[0].files() if name in common)
        self.entries, self.metric = entries, metric
        self.axes = varying(entries)
        self.sliders = {}
        for name, values in self.axes.items():
            slider = widgets.SelectionSlider(
                options=[(str(v), v) for v in values],
                description=name,
                value=_hashable(entries[0].parameters.get(name)),
                layout={"width": "420px"},
                style={"description_width": "90px"},
            )
            slider.observe(self._choose, "value")
            self.sliders[name] = slider
        self.said = widgets.HTML()
        self.entry = entries[0]
        self.viewer = Viewer(stack_of(self.entry, self.file))
        self.box = widgets.VBox([widgets.HTML(CSS), *self.sliders.values(), self.said, self.viewer.box])
        self._choose()

    def _choose(self, _=None) -> None:
        wanted = {name: slider.value for name, slider in self.sliders.items()}
        found = next(
            (e for e in self.entries if all(_hashable(e.parameters.get(k)) == v for k, v in wanted.items())), None
        )
        if found is None:
            said = ", ".join(f"{k} {v}" for k, v in wanted.items())
            self.said.value = (
                f'<b role="status">– no run with {escape(said)}; the pictures are those of '
                f"{escape(self.entry.name)}</b>"
            )
            return
        if found is not self.entry:
            self.entry = found
            self.viewer.show(stack_of(found, self.file))
        given = {n: v for n, v in found.values.items() if self.metric.lower() in n.lower()} if self.metric else {}
        listed = "; ".join(f"{escape(n)} {v:.4g}" for n, v in list(given.items())[:4])
        self.said.value = f'<span role="status">{escape(found.name)}{": " if listed else ""}{listed}</span>'

    def alt(self) -> str:
        where = ", ".join(f"{name} {slider.label}" for name, slider in self.sliders.items())
        return f"{self.viewer.alt()}; {where}"

    def figure(self):
        """What the viewer shows now."""
        return self.viewer.figure()


def alike(entries: Sequence[Entry]) -> list[list[Entry]]:
    """Finished runs with images that lie side by side in a folder and differ in one to four parameters; most first."""
    groups: dict[Path, list[Entry]] = {}
    for entry in entries:
        if entry.done and entry.files():
            groups.setdefault(entry.folder.parent, []).append(entry)
    grids = [group for group in groups.values() if 1 <= len(varying(group)) <= SLIDERS]
    return sorted(grids, key=len, reverse=True)


def varying(entries: Sequence[Entry]) -> dict[str, list]:
    """Parameters in which runs differ, with their values in order; those that say where results go do not count."""
    names = list(dict.fromkeys(name for e in entries for name in e.parameters if name not in RUNNING_ONLY))
    found = {}
    for name in names:
        values = {_hashable(e.parameters.get(name)) for e in entries}
        if len(values) > 1:
            found[name] = sorted(
                values, key=lambda v: (not isinstance(v, (int, float)), v if isinstance(v, (int, float)) else 0, str(v))
            )
    return found


def _hashable(value):
    """A parameter as a slider may have it: lists as tuples, a word for one that is not set, which widgets refuse."""
    return tuple(value) if isinstance(value, list) else "not set" if value is None else value


def _figure(path: Path, about: Mapping[str, str]) -> str:
    import base64

    data = base64.b64encode(path.read_bytes()).decode()
    caption = f"<figcaption>{escape(about['caption'])}</figcaption>" if about.get("caption") else ""
    return (
        f'<figure style="margin:0 0 16px"><img style="max-width:100%" alt="{escape(about.get("alt", ""))}" '
        f'src="data:image/{path.suffix[1:]};base64,{data}">{caption}</figure>'
    )


def _lines(name: str, width: int = 40) -> list[str]:
    return [name[i : i + width] for i in range(0, len(name), width)]
