"""Spoil small files of every format for some minutes and tell what the readers did: findings, and how many cases.

    python benchmarks/fuzz_readers.py --minutes 10            # flips, then any damage, equally long for each format
    python benchmarks/fuzz_readers.py --flips 1000            # so many single-byte flips of each format

Exit code 1 if anything is found. The same seed gives the same cases.
"""

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
import fuzzing  # noqa: E402


def main() -> int:
    """The number of findings, at most 1."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--flips", type=int, default=0, help="instead of minutes: flips of each format")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--format", default="", help="only formats whose name holds this")
    p = parser.parse_args()
    chosen = [sample for sample in fuzzing.SAMPLES if p.format in sample.name]
    seconds = None if p.flips else p.minutes * 60 / (2 * len(chosen))
    found = 0
    for change in (fuzzing.flip,) if p.flips else (fuzzing.flip, fuzzing.spoil):
        for sample in chosen:
            began = time.monotonic()
            outcomes, findings = fuzzing.try_all(sample, range(p.flips or 10**9), change, p.seed, seconds)
            told = ", ".join(f"{n} {what}" for what, n in sorted(outcomes.items()))
            checked = "" if sample.checked else " (no checksum)"
            print(f"{change.__name__:5} {sample.name}{checked}: {told}; {time.monotonic() - began:.0f} s", flush=True)
            for finding in findings:
                print(f"      case {finding.case}: {finding.what}", flush=True)
            found += len(findings)
    print(f"{found} findings")
    return min(found, 1)


if __name__ == "__main__":
    sys.exit(main())
