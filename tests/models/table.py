"""The table in docs/models.md: `python -m tests.models.table [CASE …]`"""

import sys
import tempfile
from pathlib import Path

from tests.models.comparison import compare, our_side
from tests.models.reference import CASES, architecture

HEAD = """\
| architecture | config | prefill | 40 tokens | chunks | prefix | mixed | 2x1 | 4x1 | same tokens | tensors |
|---|---|---|---|---|---|---|---|---|---|---|"""


def main() -> None:
    print(HEAD)
    with our_side() as ask, tempfile.TemporaryDirectory() as folder:
        for case in sys.argv[1:] or CASES:
            found = compare(case, ask, Path(folder) / case)
            one = found.errors["1x1"]
            errors = [one[name] for name in ("alone", "greedy", "chunks", "shared", "mixed")]
            errors += [max(found.errors[mesh].values()) for mesh in ("2x1", "4x1")]
            same = min(found.agreed.values()), max(found.agreed.values())
            cells = [
                f"`{architecture(case)}`",
                f"`{case}`",
                *(f"{error:.0e}" for error in errors),
                str(same[0]) if same[0] == same[1] else f"{same[0]} to {same[1]}",
                f"{found.tensors}" + (f", idle: {found.idle}" if found.idle else ""),
            ]
            print("|", " | ".join(cells), "|", flush=True)


if __name__ == "__main__":
    main()
