"""python -m tests.parity FOLDER: prints the ledger."""

import sys

import torch

from . import Folder, run, table


def main(arguments: list[str]) -> int:
    """The exit status: 0 if every check passed, 1 if one failed, 2 without a folder of golden data."""
    if len(arguments) != 1:
        print("usage: python -m tests.parity FOLDER", file=sys.stderr)
        return 2
    try:
        folder = Folder(arguments[0])
    except (FileNotFoundError, ValueError) as problem:
        print(problem, file=sys.stderr)
        return 2
    with torch.inference_mode():
        checks = run(folder)
    print(table(checks))
    return 0 if all(check.passed for check in checks) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
