"""Memory of published training runs, predicted from their descriptions and compared with what was measured.

python benchmarks/published.py --csv FILE [--json] [--page FILE] [--only REGEX]
"""

from __future__ import annotations

import argparse
import re
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from published.predict import predict
from published.rows import GIB, read, setup_of

from memfit.types.errors import UserError


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--csv", type=Path, required=True)
    parser.add_argument("--only", default="")
    args = parser.parse_args()
    for row in read(args.csv):
        if not re.search(args.only, row["id"]):
            continue
        setup = setup_of(row)
        if setup.measured is None:
            continue
        began = time.perf_counter()
        try:
            found = predict(setup)
        except UserError as error:
            print(f"{setup.id:32} {row['quality']} {setup.measured.kind:10} refused: {error}", flush=True)
            continue
        except Exception as error:
            import traceback
            traceback.print_exc(limit=-4)
            print(f"{setup.id:32} BUG {type(error)} {str(error)[:200]}", flush=True)
            continue
        measured = setup.measured.size_bytes
        error = found.allocated_bytes / measured - 1
        print(
            f"{setup.id:32} {row['quality']} {setup.measured.kind:10} {measured / GIB:8.2f} {found.allocated_bytes / GIB:8.2f} {error:+7.1%} {found.phase} {time.perf_counter() - began:.1f}s",
            flush=True,
        )


if __name__ == "__main__":
    main()
