"""Our operators against every peer that is installed, cell after cell: `python bench/kernels.py --out OUT`.

What pytest bench/ measures, with a row after every cell and a limit: small shapes on a CPU, the design's matrix on CUDA.
`absent` in a row says which peer did not run and why.
"""

from __future__ import annotations

import sys
from functools import partial

from cells import cpu_matrix, gpu_matrix
from measure import measure
from report import Report, arguments


def main() -> int:
    """Writes kernels.jsonl."""
    parser = arguments(__doc__, minutes=4)
    parser.add_argument("--cells", type=int, help="only the first so many")
    options = parser.parse_args()
    report = Report("kernels", options)
    for cell in (gpu_matrix() if report.gpu else cpu_matrix())[: options.cells]:
        report.cell(cell.as_json(), partial(measure, cell, report.device))
    return report.close()


if __name__ == "__main__":
    sys.exit(main())
