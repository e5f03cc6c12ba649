"""Makes checkpoints that somebody made who means harm."""

import json
import os
from pathlib import Path

import tensorstore


def store_in_pieces(item: Path, name: str, piece: list[int]) -> None:
    """Lets an array of an orbax item declare that it is stored in pieces of that shape."""
    driver = "ocdbt" if (item / "manifest.ocdbt").exists() else "file"
    place = {"base": f"file://{item}/"} if driver == "ocdbt" else {"path": f"{item}/"}
    store = tensorstore.KvStore.open({"driver": driver, **place}).result()
    document = json.loads(store.read(f"{name}/.zarray").result().value)
    store.write(f"{name}/.zarray", json.dumps(document | {"chunks": piece}).encode()).result()


def make_huge(file: Path) -> None:
    """Makes a file longer than any memory; its blocks are not on the disk."""
    os.truncate(file, 2**40)
