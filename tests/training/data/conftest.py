"""A tiny Fashion-MNIST."""

import io

import numpy as np
import pytest
from tfds_tools import write_dataset

NUM_TRAIN, NUM_TEST = 40, 10


@pytest.fixture(scope="session")
def made_up_image():
    """Image ``uint8[28, 28, 1]`` of the data set below, by its number."""
    return _made_up_image


def _made_up_image(index):
    """A gradient with its start and its slope given by ``index``."""
    rows, columns = np.indices((28, 28))
    return (((rows + columns) * (1 + index % 3) + 4 * index) % 256).astype(np.uint8)[:, :, None]


def _row(index):
    from PIL import Image

    png = io.BytesIO()
    Image.fromarray(_made_up_image(index)[:, :, 0]).save(png, format="PNG")
    return {"image": png.getvalue(), "label": index % 10}


@pytest.fixture(scope="session")
def prepared(tmp_path_factory):
    """A ``data_dir``; image i of "train", then of "test", is ``made_up_image(i)``, its label i % 10."""
    import tensorflow_datasets as tfds

    data_dir = tmp_path_factory.mktemp("tfds")
    features = {
        "image": tfds.features.Image(shape=(28, 28, 1)),
        "label": tfds.features.ClassLabel(num_classes=10),
    }
    rows = [_row(i) for i in range(NUM_TRAIN + NUM_TEST)]
    splits = {"train": rows[:NUM_TRAIN], "test": rows[NUM_TRAIN:]}
    write_dataset(data_dir, "fashion_mnist", "3.0.1", features, splits)
    return str(data_dir)
