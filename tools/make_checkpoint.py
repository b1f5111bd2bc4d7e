"""Random weights in the shape of a published model, with a tokenizer that works: for tests, and runs at true shapes.

    python tools/make_checkpoint.py --like deepseek-v3 --scale tiny --out DIR
    python tools/make_checkpoint.py --like deepseek-v3 --scale full --layers 4 --fp8 --out DIR

tiny is below ten megabytes and takes every branch of the architecture, small has true heads and latents in 150 to 350
megabytes, full has the published shapes; --layers cuts the depth.
"""

import argparse
import time
from pathlib import Path

import torch
from checkpoints import PUBLISHED, SCALES, Recipe, write_checkpoint


def main() -> None:
    given = parse_arguments()
    torch.set_num_threads(1)  # pieces of tensors run beside one another
    recipe = Recipe(
        like=given.like,
        scale=given.scale,
        num_layers=given.layers,
        dtype=given.dtype,
        fp8="ue8m0" if given.ue8m0 else "float" if given.fp8 else None,
        shard_bytes=int(given.shard_gb * 1e9),
        seed=given.seed,
    )
    started = time.monotonic()
    folder = write_checkpoint(given.out, recipe)
    seconds = time.monotonic() - started
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    print(f"{folder}: {size / 1e6:,.0f} MB in {seconds:.1f} s ({size / 1e6 / seconds:,.0f} MB/s)")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--like", choices=sorted(PUBLISHED), required=True)
    parser.add_argument("--scale", choices=SCALES, default="tiny", help="[tiny]")
    parser.add_argument("--out", type=Path, metavar="DIR", required=True)
    parser.add_argument("--layers", type=int, metavar="N", help="[as the scale has it]")
    parser.add_argument("--dtype", choices=["bf16", "fp32"], default="bf16", help="of what is not FP8 [bf16]")
    parser.add_argument("--fp8", action="store_true", help="projections as E4M3 in blocks of 128 x 128 with scales")
    parser.add_argument("--ue8m0", action="store_true", help="the same, with powers of two for scales")
    parser.add_argument("--shard-gb", type=float, default=4.0, metavar="G", help="largest weight file [4]")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="[0]")
    return parser.parse_args()


if __name__ == "__main__":
    main()
