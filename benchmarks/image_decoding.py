"""How many images a second one core decodes and augments, beside the bare decoding of their JPEGs.

    python benchmarks/image_decoding.py [--width 500] [--height 375] [--size 224] [--json FILE]

- ``decode``: Pillow decodes the whole JPEG into an array; what any pipeline that does not resize has to do;
- ``evaluation``: the shorter side to 256, the centre of 224;
- ``crop``: a random resized crop, the recipe of the ResNets;
- ``crop + jitter``: colour jitter of 0.4 after it;
- ``crop + RandAugment``: a bicubic crop and m9-mstd0.5-inc1, the recipe of DeiT and ResMLP.

All but the first are the ``read`` of an ImageNet source, from encoded records in memory to a batch. Images
are made up: smooth shades, edges and noise, about as many bytes as ImageNet's, which are 110 kB on average.
The ways take turns, and the medians of the rounds are reported. One thread works, and its own processor time
is what counts, so that other programs on the machine matter little.
"""

from __future__ import annotations

import argparse
import io
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from common import report
from PIL import Image

from cuttlefish_jax.training.data.images.augment import EvalTransform, RandAugment, TrainTransform
from cuttlefish_jax.training.data.images.imagenet import FILL, EncodedImageSource


def make_jpeg(rng: np.random.Generator, width: int, height: int) -> bytes:
    coarse = rng.integers(0, 256, (height // 40 + 2, width // 40 + 2, 3)).astype(np.uint8)
    shades = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC), np.float32)
    rows, columns = np.indices((height, width))
    stripes = 30 * np.sign(np.sin(rows / rng.uniform(5, 20)) + np.sin(columns / rng.uniform(5, 20)))
    noise = rng.normal(0, 20, (height, width, 3))
    pixels = np.clip(shades + stripes[:, :, None] + noise, 0, 255).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="JPEG", quality=90)
    return buffer.getvalue()


def ways(encoded: list[bytes], size: int) -> dict[str, Callable[[int], object]]:
    """What is measured: functions of the round."""
    indices = np.arange(len(encoded))
    records = [{"image": image, "label": 0} for image in encoded]

    def read(seeded: bool = True, **options: Any) -> Callable[[int], object]:
        source = EncodedImageSource(
            records=records,
            indices=indices,
            num_classes=1,
            training=TrainTransform(size=size, fill=FILL, **options),
            evaluation=EvalTransform(size=size),
        )
        return lambda round: source.read(indices, seeds=[(round, i) for i in indices] if seeded else None)

    return {
        "decode": lambda _: [np.asarray(Image.open(io.BytesIO(image))) for image in encoded],
        "evaluation": read(seeded=False),
        "crop": read(),
        "crop + jitter": read(color_jitter=0.4),
        "crop + RandAugment": read(interpolation="bicubic", randaugment=RandAugment()),
    }


def measure(functions: dict[str, Callable[[int], object]], images: int, rounds: int) -> list[dict[str, Any]]:
    """One row for each way."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for round in range(rounds + 1):
        for name, function in functions.items():
            start = time.process_time()
            function(round)
            if round:  # the first warms up
                times[name].append((time.process_time() - start) / images)
    bare = statistics.median(times["decode"])
    return [
        {
            "way": name,
            "images/s per core": 1 / statistics.median(seconds),
            "least-most": f"{1 / max(seconds):.0f} to {1 / min(seconds):.0f}",
            "share of decode": bare / statistics.median(seconds),
        }
        for name, seconds in times.items()
    ]


def decoding_rows(
    *, width: int = 500, height: int = 375, size: int = 224, images: int = 64, rounds: int = 9
) -> tuple[list[dict[str, Any]], str]:
    """One row for each way, and what the images were."""
    rng = np.random.default_rng(0)
    encoded = [make_jpeg(rng, width, height) for _ in range(images)]
    kilobytes = statistics.mean(map(len, encoded)) / 1e3
    about = f"{images} JPEGs of {width}x{height}, {kilobytes:.0f} kB on average; crops of {size}x{size}"
    return measure(ways(encoded, size), images, rounds), about


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--width", type=int, default=500)
    parser.add_argument("--height", type=int, default=375)
    parser.add_argument("--size", type=int, default=224, help="of the crops")
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", help="write the table to this file too")
    args = vars(parser.parse_args())
    json_file = args.pop("json")
    rows, about = decoding_rows(**args)
    report(rows, json_file, notes=[about])


if __name__ == "__main__":
    main()
