"""python -m tests.parity FOLDER: prints the ledger; exit status 1 if anything failed, 2 without a manifest."""

import sys

import torch

from . import Folder, run, table

if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m tests.parity FOLDER")
    try:
        folder = Folder(sys.argv[1])
    except (FileNotFoundError, ValueError) as problem:
        print(problem, file=sys.stderr)
        sys.exit(2)
    with torch.inference_mode():
        checks = run(folder)
    print(table(checks))
    sys.exit(not all(check.passed for check in checks))
