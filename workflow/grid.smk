# The cells of a grid as jobs: `companion grid FILE` writes grid.json, which says them, and starts this.
# A cell's done mark is an empty file; whether it is true is known by run.json, which Snakemake never touches, so that
# whatever became of a driver, a result that stands is not computed again.
import json
import sys
from pathlib import Path

PLAN = config["grid"]
OUT = str(Path(PLAN).parent)
GRID = json.loads(Path(PLAN).read_text())
RESOURCES = GRID["resources"]
MOST = int(config.get("mem_mb", 10**9))  # of this machine

shell.prefix("set -euo pipefail; ")


rule all:
    input:
        [f"{OUT}/{cell}/.done" for cell in GRID["todo"]],
        [f"{OUT}/.gathered"] if GRID["gather"] else [],
    localrule: True


rule cell:
    output:
        touch(f"{OUT}/{{cell}}/.done"),
    log:
        f"{OUT}/{{cell}}/log.txt",
    params:
        python=sys.executable,
        fingerprint=lambda wildcards: GRID["cells"][wildcards.cell]["fingerprint"],
    threads: RESOURCES["threads"]
    resources:
        # A cell that was killed, for want of memory as often as not, is given more the next time.
        mem_mb=lambda wildcards, attempt: min(RESOURCES["mem_mb"] * attempt, MOST),
        runtime=RESOURCES["minutes"],
        attempt=lambda wildcards, attempt: attempt,
        **{name: RESOURCES[name] for name in ("gpu", "gres") if RESOURCES.get(name)},
    shell:
        "{params.python:q} -m companion.cli cell {PLAN:q} {wildcards.cell:q} --attempt {resources.attempt} 2>&1"
        " | tee {log:q}"


if GRID["gather"]:

    rule gather:
        input:
            [f"{OUT}/{cell}/.done" for cell in GRID["cells"]],
        output:
            touch(f"{OUT}/.gathered"),
        params:
            python=sys.executable,
            fingerprint=GRID["gather"]["fingerprint"],
        resources:
            mem_mb=min(4000, MOST),
            runtime=60,
        shell:
            "{params.python:q} -m companion.cli cell {PLAN:q} gather"
