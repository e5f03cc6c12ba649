import pathlib
import pickle

import numpy as np
import pytest
from glue_tools import SPECIAL, WORDS, write_tokenizer

from cuttlefish_jax.training.data.pipeline import EvalInput, TrainInput
from cuttlefish_jax.training.data.texts.tokens import (
    open_tokenizer,
    padded_lengths,
    tokenize,
    vocabulary_size,
)

PAD, UNK, CLS, SEP = range(4)
LENGTHS = (4, 8, 16)


def word(text):
    return len(SPECIAL) + WORDS.index(text)


@pytest.fixture
def folder(tmp_path):
    return write_tokenizer(tmp_path / "weights")


def make_source(folder, texts, labels=None, *, max_length=16, lengths=LENGTHS):
    tokenizer = open_tokenizer(folder, max_length=max_length, pairs=isinstance(texts[0], tuple))
    labels = np.zeros(len(texts), np.int32) if labels is None else labels
    return tokenize(texts, labels, tokenizer, lengths=lengths)


def texts_of(*sizes):
    """Texts of so many tokens each, special ones included."""
    return [" ".join(["film"] * (size - 2)) for size in sizes]


def test_a_text_gets_its_special_tokens_and_padding_that_the_mask_hides(folder):
    source = make_source(folder, ["good film", "unheard"], np.array([1, 0], np.int32))
    batch = source.read(np.array([1, 0, 1]))
    np.testing.assert_array_equal(
        batch["input_ids"],
        [[CLS, UNK, SEP, PAD], [CLS, word("good"), word("film"), SEP], [CLS, UNK, SEP, PAD]],
    )
    np.testing.assert_array_equal(batch["attention_mask"], [[1, 1, 1, 0], [1, 1, 1, 1], [1, 1, 1, 0]])
    np.testing.assert_array_equal(batch["token_type_ids"], np.zeros((3, 4)))
    np.testing.assert_array_equal(batch["label"], [0, 1, 0])
    assert {array.dtype for array in batch.values()} == {np.dtype(np.int32)}
    assert source.num_types == 1


def test_the_second_text_of_a_pair_has_a_type_of_its_own(folder):
    source = make_source(folder, [("the film", "bad"), ("a", "very bad plot")])
    batch = source.read(np.array([0, 1]))
    np.testing.assert_array_equal(
        batch["input_ids"][0], [CLS, word("the"), word("film"), SEP, word("bad"), SEP, PAD, PAD]
    )
    np.testing.assert_array_equal(
        batch["token_type_ids"], [[0, 0, 0, 0, 1, 1, 0, 0], [0, 0, 0, 1, 1, 1, 1, 0]]
    )
    assert source.num_types == 2


def test_the_longer_text_is_cut_first(folder):
    source = make_source(folder, [("good " * 20, "bad film")], max_length=8, lengths=(8,))
    ids = source.read(np.array([0]))["input_ids"][0]
    good, bad, film = map(word, ("good", "bad", "film"))
    np.testing.assert_array_equal(ids, [CLS, good, good, good, SEP, bad, film, SEP])


def test_empty_texts_are_special_tokens_alone(folder):
    batch = make_source(folder, ["", " ", "film"]).read(np.arange(3))
    np.testing.assert_array_equal(batch["attention_mask"].sum(axis=1), [2, 2, 3])
    pairs = make_source(folder, [("", ""), ("", "film")]).read(np.arange(2))
    np.testing.assert_array_equal(pairs["input_ids"], [[CLS, SEP, SEP, PAD], [CLS, SEP, word("film"), SEP]])
    np.testing.assert_array_equal(pairs["token_type_ids"], [[0, 0, 1, 0], [0, 0, 1, 1]])


def test_batches_have_the_shortest_length_that_fits(folder):
    source = make_source(folder, texts_of(2, 4, 5, 8, 9, 16, 40))
    lengths = [source.read(np.array([i]))["input_ids"].shape for i in range(len(source))]
    assert lengths == [(1, 4), (1, 4), (1, 8), (1, 8), (1, 16), (1, 16), (1, 16)]
    assert source.read(np.array([0, 4, 1]))["input_ids"].shape == (3, 16)
    # What a host reads is as long as the whole batch is, wherever the longest text falls.
    batch = np.array([0, 1, 2, 3])
    parts = [source.read(part, batch=batch)["input_ids"] for part in (batch[:2], batch[2:])]
    np.testing.assert_array_equal(np.concatenate(parts), source.read(batch)["input_ids"])


def test_all_hosts_have_batches_of_one_length_and_there_are_few(folder):
    sizes = np.random.default_rng(0).choice([2, 3, 4, 4, 7, 8, 16], size=40)
    source = make_source(folder, texts_of(*sizes), np.arange(40, dtype=np.int32))
    common = dict(batch_size=4, on_device=False)
    inputs = {
        "one": TrainInput(source, seed=3, process_index=0, process_count=1, devices=_devices(4), **common),
        "first": TrainInput(source, seed=3, process_index=0, process_count=2, devices=_devices(2), **common),
        "second": TrainInput(source, seed=3, process_index=1, process_count=2, devices=_devices(2), **common),
    }
    steps = {name: list(data.epoch(0)) for name, data in inputs.items()}
    for batch, first, second in zip(*steps.values(), strict=True):
        for name in batch:
            both = np.concatenate([first[name], second[name]])
            np.testing.assert_array_equal(both, batch[name])
    widths = {batch["input_ids"].shape[-1] for batch in steps["one"]}
    assert widths <= set(LENGTHS)
    assert len(widths) == 3
    for data in inputs.values():
        data.close()


def test_evaluation_meets_every_text_once(folder):
    sizes = [3, 9, 4, 16, 5, 2]
    source = make_source(folder, texts_of(*sizes), np.arange(6, dtype=np.int32))
    data = EvalInput(source, batch_size=4, on_device=False, devices=_devices(4))
    seen = {}
    for batch in data.batches():
        for label, mask, weight in zip(
            *(np.asarray(batch[name]) for name in ("label", "attention_mask", "weight")), strict=True
        ):
            if weight[0]:
                assert label[0] not in seen
                seen[int(label[0])] = int(mask.sum())
    data.close()
    assert seen == dict(enumerate(sizes))


def _devices(number):
    import jax

    return jax.local_devices()[:number]


def test_a_source_can_be_pickled_for_reader_processes(folder):
    source = make_source(folder, texts_of(3, 7, 5))
    copied = pickle.loads(pickle.dumps(source))
    for name, array in source.read(np.arange(3)).items():
        np.testing.assert_array_equal(copied.read(np.arange(3))[name], array)


def test_many_texts_in_parts_are_the_texts_one_by_one(folder, monkeypatch):
    texts = [" ".join(np.random.default_rng(i).choice(WORDS, size=i % 7)) for i in range(50)]
    whole = make_source(folder, texts)
    monkeypatch.setattr("cuttlefish_jax.training.data.texts.tokens.TOKENIZED_AT_ONCE", 7)
    parts = make_source(folder, texts)
    np.testing.assert_array_equal(parts.ids, whole.ids)
    np.testing.assert_array_equal(parts.offsets, whole.offsets)
    for i, text in enumerate(texts):
        ids = whole.read(np.array([i]))["input_ids"][0][: len(text.split()) + 2]
        np.testing.assert_array_equal(ids, [CLS, *map(word, text.split()), SEP])


@pytest.mark.parametrize(
    ("lengths", "max_length", "expected"),
    [
        ((32, 64, 128), 128, (32, 64, 128)),
        ((128, 32), 64, (32, 64)),
        ((32, 64), 100, (32, 64, 100)),
        ((), 128, (128,)),
    ],
)
def test_the_last_length_is_the_longest_text(lengths, max_length, expected):
    assert padded_lengths(lengths, max_length) == expected


def test_a_length_of_nothing_is_an_error():
    with pytest.raises(ValueError, match=r"data\.lengths has 0: each must be 1 or more"):
        padded_lengths((0, 32), 128)


def test_a_tokenizer_is_a_file_its_folder_or_beside_the_weights(folder):
    weights = pathlib.Path(folder) / "model.safetensors"
    weights.touch()
    for place in (folder, f"{folder}/tokenizer.json", weights):
        tokenizer = open_tokenizer(place, max_length=8, pairs=False)
        assert vocabulary_size(tokenizer) == len(SPECIAL) + len(WORDS)


def test_the_vocabulary_ends_with_the_largest_id(folder):
    tokenizer = open_tokenizer(folder, max_length=8, pairs=False)
    tokenizer.add_tokens(["added"])
    assert vocabulary_size(tokenizer) == len(SPECIAL) + len(WORDS) + 1


def test_what_is_no_tokenizer_is_a_one_line_error_with_the_way_out(folder, tmp_path):
    empty, other = tmp_path / "empty", tmp_path / "config.json"
    empty.mkdir()
    other.write_text('{"hidden_size": 3}')
    bare = write_tokenizer(tmp_path / "bare", special=False)
    cases = {
        empty: rf"folder {empty} has no tokenizer\.json: give one with --config\.data\.tokenizer=",
        other: rf"{other} is not a tokenizer\.json: .*AutoTokenizer",
        tmp_path
        / "none"
        / "tokenizer.json": r"there is no tokenizer .*none/tokenizer\.json: give a tokenizer",
        "some/relative/folder": "there is no tokenizer some/relative/folder: give a tokenizer",
        bare: rf"{bare}/tokenizer\.json does not put special tokens such as \[CLS\]",
    }
    for place, message in cases.items():
        with pytest.raises(ValueError, match=message) as error:
            open_tokenizer(place, max_length=8, pairs=False)
        assert "\n" not in str(error.value)


def test_a_hub_that_cannot_be_reached_is_a_one_line_error(monkeypatch):
    import huggingface_hub

    def no_network(repository, name):
        raise OSError(f"no route to\nhost for {repository}/{name}")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", no_network)
    message = r"there is no tokenizer bert-base-cased here, .*no route to host"
    with pytest.raises(ValueError, match=message) as error:
        open_tokenizer("bert-base-cased", max_length=8, pairs=False)
    assert "\n" not in str(error.value)


def test_a_tokenizer_of_the_hub_is_used(monkeypatch, folder):
    import huggingface_hub

    asked = []

    def download(repository, name):
        asked.append((repository, name))
        return f"{folder}/{name}"

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    open_tokenizer("owner/weights", max_length=8, pairs=False)
    assert asked == [("owner/weights", "tokenizer.json")]


@pytest.mark.parametrize(("pairs", "max_length", "least"), [(False, 2, 3), (True, 4, 5), (True, 0, 5)])
def test_a_length_without_room_for_text_is_an_error(folder, pairs, max_length, least):
    special = 3 if pairs else 2
    message = rf"data\.max_length = {max_length}: with {special} special tokens it must be {least} or more"
    with pytest.raises(ValueError, match=message):
        open_tokenizer(folder, max_length=max_length, pairs=pairs)
    open_tokenizer(folder, max_length=least, pairs=pairs)
