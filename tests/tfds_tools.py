"""Data sets written as TFDS writes them, but without TensorFlow (which tfds's own writer needs)."""

import json
import pathlib


def write_dataset(data_dir, name, version, features, splits, *, config=None):
    """Writes ``{split: rows}`` as array_record files that ``tfds.builder(name)`` opens.

    Args:
      data_dir: TFDS's.
      name: of the data set; ``config`` is that of its variant, if there are any.
      version: e.g. ``"2.0.0"``.
      features: ``{feature: tfds feature}``.
      splits: a row is ``{feature: str, bytes, float or int}``; images are encoded already.
      config: name of the variant.
    """
    import tensorflow_datasets as tfds
    from array_record.python import array_record_module

    folder = pathlib.Path(data_dir, name, config or "", version)
    folder.mkdir(parents=True)
    tfds.features.FeaturesDict(features).save_config(folder)
    described = []
    for split, rows in splits.items():
        records = [_record(row) for row in rows]
        path = folder / f"{name}-{split}.array_record-00000-of-00001"
        writer = array_record_module.ArrayRecordWriter(str(path), "group_size:1")
        for record in records:
            writer.write(record)
        writer.close()
        described.append(
            {
                "name": split,
                "filepathTemplate": "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
                "numBytes": str(sum(map(len, records))),
                "shardLengths": [str(len(records))],
            }
        )
    info = {"name": name, "version": version, "fileFormat": "array_record", "splits": described}
    if config:
        info["configName"] = config
    (folder / "dataset_info.json").write_text(json.dumps(info))


def _record(row):
    from tensorflow_datasets.proto import tf_example_pb2

    example = tf_example_pb2.Example()
    for name, value in row.items():
        feature = example.features.feature[name]
        if isinstance(value, str | bytes):
            feature.bytes_list.value.append(value.encode() if isinstance(value, str) else value)
        elif isinstance(value, float):
            feature.float_list.value.append(value)
        else:
            feature.int64_list.value.append(value)
    return example.SerializeToString()
