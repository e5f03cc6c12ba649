"""A tiny Fashion-MNIST, written as TFDS writes it but without TensorFlow (which tfds's own writer needs)."""

import io
import json

import numpy as np
import pytest

NUM_TRAIN, NUM_TEST = 40, 10


@pytest.fixture(scope="session")
def made_up_image():
    """Image ``uint8[28, 28, 1]`` of the data set below, by its number."""
    return _made_up_image


def _made_up_image(index):
    """A gradient with its start and its slope given by ``index``."""
    rows, columns = np.indices((28, 28))
    return (((rows + columns) * (1 + index % 3) + 4 * index) % 256).astype(np.uint8)[:, :, None]


def _record(index):
    from PIL import Image
    from tensorflow_datasets.proto import tf_example_pb2

    png = io.BytesIO()
    Image.fromarray(_made_up_image(index)[:, :, 0]).save(png, format="PNG")
    example = tf_example_pb2.Example()
    example.features.feature["image"].bytes_list.value.append(png.getvalue())
    example.features.feature["label"].int64_list.value.append(index % 10)
    return example.SerializeToString()


@pytest.fixture(scope="session")
def prepared(tmp_path_factory):
    """A ``data_dir``; image i of "train", then of "test", is ``made_up_image(i)``, its label i % 10."""
    import tensorflow_datasets as tfds
    from array_record.python import array_record_module

    data_dir = tmp_path_factory.mktemp("tfds")
    folder = data_dir / "fashion_mnist" / "3.0.1"
    folder.mkdir(parents=True)
    features = tfds.features.FeaturesDict(
        {
            "image": tfds.features.Image(shape=(28, 28, 1)),
            "label": tfds.features.ClassLabel(num_classes=10),
        }
    )
    features.save_config(folder)
    splits = []
    for name, indices in [("train", range(NUM_TRAIN)), ("test", range(NUM_TRAIN, NUM_TRAIN + NUM_TEST))]:
        records = [_record(i) for i in indices]
        path = folder / f"fashion_mnist-{name}.array_record-00000-of-00001"
        writer = array_record_module.ArrayRecordWriter(str(path), "group_size:1")
        for record in records:
            writer.write(record)
        writer.close()
        splits.append(
            {
                "name": name,
                "filepathTemplate": "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
                "numBytes": str(sum(map(len, records))),
                "shardLengths": [str(len(records))],
            }
        )
    info = {"name": "fashion_mnist", "version": "3.0.1", "fileFormat": "array_record", "splits": splits}
    (folder / "dataset_info.json").write_text(json.dumps(info))
    return str(data_dir)
