"""A grid through a real Slurm: controller, node daemon and munge on this machine alone, started and stopped here."""

import csv
import math
import os
import random
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

import chaos
import psutil
import pytest
import yaml

from companion.files import shipped

CONF = Path("/etc/slurm/slurm.conf")  # only here: jobs drop SLURM_CONF
PROGRAMS = ("slurmctld", "slurmd", "sbatch", "munged", "runuser")
# More with COMPANION_SLURM_AXES=2,3,4: a kill of the driver for every six cells
AXES = tuple(map(int, os.environ.get("COMPANION_SLURM_AXES", "2,1,1").split(",")))
CELLS = math.prod(AXES)
KILLS = max(1, CELLS // 6)
SETTINGS = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
SlurmctldPort=26817
SlurmdPort=26818
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/filetxt
JobCompLoc={folder}/jobs.txt
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
ReturnToService=2
MinJobAge=300
DefMemPerCPU=500
NodeName={host} NodeAddr=127.0.0.1 CPUs={cores} RealMemory={memory}
PartitionName=main Nodes={host} Default=YES MaxTime=INFINITE State=UP
"""

pytestmark = pytest.mark.slow


@pytest.fixture
def slurm(tmp_path):
    """A Slurm of one node with a partition `main`; the folder of its logs."""
    if missing := [name for name in PROGRAMS if not shutil.which(name)]:
        pytest.skip(f"no Slurm here ({', '.join(missing)} missing): apt-get install slurm-wlm munge")
    if os.getuid() != 0:
        pytest.skip("a Slurm of one's own is started as root only")
    if CONF.exists():
        pytest.skip(f"{CONF} exists: this machine belongs to a cluster, which is left alone")
    folder, started = tmp_path / "slurm", []
    for name in ("state", "spool"):
        (folder / name).mkdir(parents=True)
    host = socket.gethostname().split(".")[0]
    memory = psutil.virtual_memory().total * 8 // 10 // 2**20
    CONF.parent.mkdir(exist_ok=True)
    CONF.write_text(SETTINGS.format(host=host, folder=folder, cores=len(os.sched_getaffinity(0)), memory=memory))
    try:
        if subprocess.run("munge -n | unmunge", shell=True, capture_output=True).returncode:
            Path("/run/munge").mkdir(exist_ok=True)
            shutil.chown("/run/munge", "munge", "munge")
            started.append(subprocess.Popen(["runuser", "-u", "munge", "--", "munged", "--foreground"]))
        started.append(
            subprocess.Popen(["slurmctld", "-c", "-D"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        )
        started.append(subprocess.Popen(["slurmd", "-D"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL))
        for _ in range(240):
            said = subprocess.run(["sinfo", "-h", "-o", "%t"], capture_output=True, text=True).stdout
            if "idle" in said:
                break
            time.sleep(0.25)
        else:
            pytest.fail(f"Slurm did not come up: {said}" + (folder / "slurmd.log").read_text()[-500:])
        yield folder
    finally:
        for process in reversed(started):
            process.send_signal(signal.SIGTERM)
        for process in started:
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
        CONF.unlink()


@pytest.mark.timeout(600 + 120 * CELLS)
def test_a_grid_through_slurm_survives_its_driver(slurm, tmp_path):
    project, peace, profile = tmp_path / "project", tmp_path / "peace", tmp_path / "profile"
    chaos.lay_out(project, AXES, 0.0)
    profile.mkdir()
    settings = yaml.safe_load((shipped("workflow") / "profiles/slurm/config.yaml").read_text())
    settings |= {"slurm-init-seconds-before-status-checks": 3, "seconds-between-status-checks": 3, "latency-wait": 10}
    settings |= {"default-resources": ["slurm_partition=main"]}
    (profile / "config.yaml").write_text(yaml.safe_dump(settings))

    for kill in range(KILLS):
        driver = chaos.start(project, profile=profile)
        while len(chaos.done(project)) < kill * CELLS // KILLS or not chaos.begun(project):
            assert driver.poll() is None, (project / "said.txt").read_text()[-3000:]
            time.sleep(0.2)
        for process in chaos.processes(project)["driver"] + chaos.processes(project)["snakemake"]:
            if not process.environ().get("SLURM_JOB_ID"):
                process.kill()
        driver.wait()
    assert chaos.start(project, profile=profile).wait(500 + 30 * CELLS) == 0, (project / "said.txt").read_text()[-3000:]

    cells = chaos.done(project)
    assert len(cells) == CELLS and all(chaos.finished(cell) == 1 for cell in cells)
    assert all('"job": "' in (cell / ".attempts.jsonl").read_text() for cell in cells)
    with open(project / "runs/grid/table.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        noise = random.Random(int(row["seed"])).random()
        assert float(row["value"]) == float(row["scale"]) * 2 + int(row["shift"]) + noise
    assert len(rows) == len(cells)

    chaos.lay_out(peace, AXES, 0.0)  # the same on this machine, undisturbed
    assert chaos.start(peace).wait(500 + 30 * CELLS) == 0, (peace / "said.txt").read_text()[-3000:]
    assert (peace / "runs/grid/table.csv").read_bytes() == (project / "runs/grid/table.csv").read_bytes()
