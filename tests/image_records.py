"""A tiny ImageNet, some of whose images are damaged."""

import io

import numpy as np
from tfds_tools import write_dataset

TRUNCATED, GREY, CMYK, SCRAMBLED = 3, 5, 7, 12  # what some of the training records are


def tone(index):
    """The grey of image ``index``."""
    return 20 + 9 * index


def encode(index, mode="RGB", **options):
    """An image of one grey with some noise, JPEG unless the options say otherwise."""
    from PIL import Image

    noise = np.random.default_rng(index).integers(-3, 4, (48 + index, 80 - index, 3))
    image = Image.fromarray((tone(index) + noise).astype(np.uint8)).convert(mode)
    buffer = io.BytesIO()
    image.save(buffer, **{"format": "JPEG", "quality": 95, **options})
    return buffer.getvalue()


def make_records(count):
    """``count`` records, of which some are damaged or not RGB."""
    records = []
    for index in range(count):
        image = encode(index, {GREY: "L", CMYK: "CMYK"}.get(index, "RGB"))
        if index == TRUNCATED:
            image = image[: len(image) // 2]
        if index == SCRAMBLED:
            image = bytes(len(image))
        records.append({"image": image, "label": 3 * index, "file_name": f"n{index:04}.JPEG".encode()})
    return records


def write_imagenet(data_dir, splits):
    """Writes ``{split: records}`` as ``imagenet2012`` in array_record files."""
    import tensorflow_datasets as tfds

    features = {
        "image": tfds.features.Image(encoding_format="jpeg"),
        "label": tfds.features.ClassLabel(num_classes=1000),
        "file_name": tfds.features.Text(),
    }
    write_dataset(data_dir, "imagenet2012", "5.1.0", features, splits)
