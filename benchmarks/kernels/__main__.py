"""Every kernel on this GPU, against the ceilings measured in the same run, its peers and its own inexact variant.

    python -m benchmarks.kernels [--only mla prefill products experts small sampler] [--quick] [--out FILE]

Peers are used where they can be imported: FlashMLA (flash_mla), FlashInfer (flashinfer), torch's SDPA, cuBLAS by torch.
TRITON_INTERPRET=1 with --dry-run goes through everything but the timing, in tiny shapes, without a GPU.
"""

from collections.abc import Callable

import torch

from benchmarks.gpu_timing import Report, measure_ceilings, open_timer, parser
from benchmarks.kernels import mla, prefill_attention, products, sampling, small

SECTIONS = ("mla", "prefill", "products", "experts", "small", "sampler")


@torch.inference_mode()
def main() -> int:
    made = parser(__doc__)
    made.add_argument("--only", nargs="+", choices=SECTIONS, default=SECTIONS)
    made.add_argument("--quick", action="store_true", help="the corners of the attention grid")
    args = made.parse_args()
    timer = open_timer(args)
    report = Report("Kernels", args.out)
    ceilings = measure_ceilings(timer)
    report.say("", ceilings.line)
    sections: dict[str, Callable[[], None]] = {
        "mla": lambda: mla.table(ceilings, report, timer, quick=args.quick),
        "prefill": lambda: prefill_attention.table(ceilings, report, timer),
        "products": lambda: products.tables(ceilings, report, timer),
        "experts": lambda: products.experts_table(ceilings, report, timer),
        "small": lambda: small.table(ceilings, report, timer),
        "sampler": lambda: sampling.table(ceilings, report, timer),
    }
    for name in args.only:
        timer.attempt(name, sections[name])
    return report.finish(timer)


if __name__ == "__main__":
    raise SystemExit(main())
