"""Texts as tokens: a tokenizer's file, what it makes of many texts, and batches padded to few lengths."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from cuttlefish_jax.training.data.sources import Arrays, Seed

if TYPE_CHECKING:
    from tokenizers import Tokenizer

TOKENIZER_FILE = "tokenizer.json"
TOKENIZED_AT_ONCE = 4096

Text = str | tuple[str, str]  # a pair is one text for the network, with two types of tokens


def open_tokenizer(place: str | Path, *, max_length: int, pairs: bool) -> Tokenizer:
    """Opens a tokenizer that cuts texts and does not pad them.

    Args:
      place: a tokenizer.json, a folder with one, a file beside one (the pre-trained weights), or the id of a
        repository on the Hugging Face hub.
      max_length: longest result, in tokens; of a pair the longer text is cut first.
      pairs: whether it is for pairs of texts.

    Raises:
      ValueError: if there is no tokenizer at ``place``, it does not mark where texts begin and end, or
        ``max_length`` leaves no room for a text.
    """
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise ValueError("reading texts needs tokenizers: pip install tokenizers") from error
    path = _find_tokenizer(place)
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the class that the library raises, whatever is wrong
        raise ValueError(
            f"{path} is not a tokenizer.json: {error}; save one with transformers' AutoTokenizer"
        ) from error
    special = tokenizer.num_special_tokens_to_add(pairs)
    if not special:
        raise ValueError(
            f"{path} does not put special tokens such as [CLS] and [SEP] around a text: give the one that "
            "belongs to the network (its post_processor is empty)"
        )
    least = special + (2 if pairs else 1)
    if max_length < least:  # the library would not cut at all
        raise ValueError(
            f"data.max_length = {max_length}: with {special} special tokens it must be {least} or more"
        )
    tokenizer.no_padding()
    tokenizer.enable_truncation(max_length, strategy="longest_first")
    return tokenizer


def vocabulary_size(tokenizer: Tokenizer) -> int:
    """One more than the largest id that ``tokenizer`` gives."""
    return max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1


def padded_lengths(lengths: Sequence[int], max_length: int) -> tuple[int, ...]:
    """The lengths that batches are padded to, shortest first; the last is ``max_length``.

    Raises:
      ValueError: if one is not positive.

    Example:
      >>> padded_lengths((32, 64, 256), max_length=128)
      (32, 64, 128)
    """
    if wrong := [length for length in lengths if length < 1]:
        raise ValueError(f"data.lengths has {wrong[0]}: each must be 1 or more")
    return tuple(sorted({min(length, max_length) for length in (*lengths, max_length)}))


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class TokenSource:
    """Tokenized texts in host memory, one after the other without padding.

    Attributes:
      ids: ``int32[tokens]``, of all texts.
      types: ``uint8[tokens]``: 1 for tokens of the second of a pair of texts.
      offsets: ``int64[n + 1]``: text ``i`` has the tokens from ``offsets[i]`` to ``offsets[i + 1]``.
      labels: ``int32[n]`` classes, or ``float32[n]``.
      lengths: a batch is padded to the shortest of these that its longest text fits in.
      pad_id: of the padding.
    """

    ids: np.ndarray
    types: np.ndarray
    offsets: np.ndarray
    labels: np.ndarray
    lengths: tuple[int, ...]
    pad_id: int = 0

    def __len__(self) -> int:
        """Number of texts."""
        return len(self.labels)

    @property
    def num_types(self) -> int:
        """One more than the largest type."""
        return int(self.types.max(initial=0)) + 1

    def read(
        self,
        indices: np.ndarray,
        *,
        seeds: Sequence[Seed] | None = None,
        batch: np.ndarray | None = None,
    ) -> Arrays:
        """The texts at ``indices``; see :meth:`~cuttlefish_jax.training.data.sources.Source.read`.

        Returns:
          ``"input_ids"``, ``"attention_mask"`` (1 at tokens, 0 at padding) and ``"token_type_ids"``,
          ``int32[b, length]``, and ``"label"``.
        """
        whole = indices if batch is None else batch
        longest = (self.offsets[whole + 1] - self.offsets[whole]).max()
        length = next(length for length in self.lengths if length >= longest)
        starts, sizes = self.offsets[indices], self.offsets[indices + 1] - self.offsets[indices]
        positions = np.arange(length)
        mask = positions < sizes[:, None]
        where = starts[:, None] + np.where(mask, positions, 0)
        return {
            "input_ids": np.where(mask, self.ids[where], np.int32(self.pad_id)),
            "attention_mask": mask.astype(np.int32),
            "token_type_ids": np.where(mask, self.types[where], 0).astype(np.int32),
            "label": self.labels[indices],
        }


def tokenize(
    texts: Sequence[Text], labels: np.ndarray, tokenizer: Tokenizer, *, lengths: tuple[int, ...]
) -> TokenSource:
    """Tokenizes texts once, on all cores.

    Args:
      texts: all of one kind.
      labels: of the texts, ``[n]``.
      tokenizer: from :func:`open_tokenizer`.
      lengths: see :class:`TokenSource`.
    """
    ids, types = [], []
    # In parts, because what the library returns takes much more memory than the ids.
    for start in range(0, len(texts), TOKENIZED_AT_ONCE):
        for encoding in tokenizer.encode_batch_fast(list(texts[start : start + TOKENIZED_AT_ONCE])):
            ids.append(np.asarray(encoding.ids, np.int32))
            types.append(np.asarray(encoding.type_ids, np.uint8))
    return TokenSource(
        ids=np.concatenate(ids),
        types=np.concatenate(types),
        offsets=np.cumsum([0, *map(len, ids)], dtype=np.int64),
        labels=labels,
        lengths=lengths,
        pad_id=tokenizer.token_to_id("[PAD]") or 0,
    )


def _find_tokenizer(place: str | Path) -> Path:
    path = Path(place)
    if path.is_file():
        if path.suffix == ".json":
            return path
        path = path.parent
    if path.is_dir():
        if (path / TOKENIZER_FILE).is_file():
            return path / TOKENIZER_FILE
        raise ValueError(
            f"folder {path} has no {TOKENIZER_FILE}: give one with --config.data.tokenizer=FILE or FOLDER"
        )
    # An id on the hub is "name" or "owner/name"; anything else was meant as a path.
    if path.is_absolute() or len(path.parts) > 2 or path.suffix in (".json", ".safetensors"):
        raise ValueError(
            f"there is no tokenizer {path}: give a {TOKENIZER_FILE}, or its folder, with "
            "--config.data.tokenizer=..."
        )
    return _download(str(place))


def _download(repository: str) -> Path:
    import huggingface_hub

    try:
        return Path(huggingface_hub.hf_hub_download(repository, TOKENIZER_FILE))
    except Exception as error:  # whatever the client and its transport raise
        reason = " ".join(str(error).split())
        raise ValueError(
            f"there is no tokenizer {repository} here, and none could be fetched from the Hugging Face hub "
            f"(give a {TOKENIZER_FILE} or its folder, --config.data.tokenizer=...): {reason}"
        ) from error
