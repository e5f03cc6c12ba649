"""A tiny ImageNet, written as TFDS writes it but without TensorFlow (which tfds's own writer needs)."""

import io
import json

import numpy as np

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
    from array_record.python import array_record_module
    from tensorflow_datasets.proto import tf_example_pb2

    folder = data_dir / "imagenet2012" / "5.1.0"
    folder.mkdir(parents=True)
    tfds.features.FeaturesDict(
        {
            "image": tfds.features.Image(encoding_format="jpeg"),
            "label": tfds.features.ClassLabel(num_classes=1000),
            "file_name": tfds.features.Text(),
        }
    ).save_config(folder)
    described = []
    for name, records in splits.items():
        path = folder / f"imagenet2012-{name}.array_record-00000-of-00001"
        writer = array_record_module.ArrayRecordWriter(str(path), "group_size:1")
        size = 0
        for record in records:
            example = tf_example_pb2.Example()
            feature = example.features.feature
            feature["image"].bytes_list.value.append(record["image"])
            feature["file_name"].bytes_list.value.append(record["file_name"])
            feature["label"].int64_list.value.append(record["label"])
            written = example.SerializeToString()
            writer.write(written)
            size += len(written)
        writer.close()
        described.append(
            {
                "name": name,
                "filepathTemplate": "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
                "numBytes": str(size),
                "shardLengths": [str(len(records))],
            }
        )
    info = {"name": "imagenet2012", "version": "5.1.0", "fileFormat": "array_record", "splits": described}
    (folder / "dataset_info.json").write_text(json.dumps(info))
