"""Tiny tasks of GLUE, and a BERT and a tokenizer for them."""

import json
import pathlib

import numpy as np
from tfds_tools import write_dataset

# Of every task: the columns with texts as TFDS has them, and the number of classes (0: a float).
COLUMNS = {
    "cola": (("sentence",), 2),
    "sst2": (("sentence",), 2),
    "mrpc": (("sentence1", "sentence2"), 2),
    "stsb": (("sentence1", "sentence2"), 0),
    "qqp": (("question1", "question2"), 2),
    "mnli": (("premise", "hypothesis"), 3),
    "qnli": (("question", "sentence"), 2),
    "rte": (("sentence1", "sentence2"), 2),
    "wnli": (("sentence1", "sentence2"), 2),
}
WORDS = ("good", "bad", "film", "plot", "very", "not", "the", "is", "a", "fine")
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")
BERT = dict(
    model_type="bert",
    vocab_size=len(SPECIAL) + len(WORDS),
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=32,
    max_position_embeddings=32,
    type_vocab_size=2,
)


def splits_of(task):
    """The labelled splits of a task, as TFDS calls them."""
    validation = ["validation_matched", "validation_mismatched"] if task == "mnli" else ["validation"]
    return ["train", *validation]


def make_rows(task, number, seed):
    """Rows of random words, which say what the label is: ``good`` appears ``label`` times."""
    columns, num_classes = COLUMNS[task]
    rng, rows = np.random.default_rng(seed), []
    for i in range(number):
        label = i % num_classes if num_classes else 5 * i / max(1, number - 1)
        words = [*rng.choice(WORDS[1:], size=rng.integers(1, 6)), *["good"] * round(label)]
        texts = [" ".join(rng.permutation(words)) for _ in columns]
        rows.append({**dict(zip(columns, texts, strict=True)), "label": label, "idx": i})
    return rows


def write_task(data_dir, task, rows_of_splits=None, *, number=24):
    """Writes ``{split: rows}`` of ``task``; without rows, ``number`` made-up ones for every split."""
    import tensorflow_datasets as tfds

    columns, num_classes = COLUMNS[task]
    if rows_of_splits is None:
        rows_of_splits = {split: make_rows(task, number, i) for i, split in enumerate(splits_of(task))}
    label = tfds.features.ClassLabel(num_classes=num_classes) if num_classes else np.float32
    features = {column: tfds.features.Text() for column in columns} | {"label": label, "idx": np.int32}
    write_dataset(data_dir, "glue", "2.0.0", features, rows_of_splits, config=task)
    return str(data_dir)


def write_tokenizer(folder, words=WORDS, *, special=True):
    """Writes a word-piece tokenizer.json with BERT's special tokens into ``folder``."""
    import tokenizers

    pieces = {word: i for i, word in enumerate((*SPECIAL, *words))}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordPiece(pieces, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    if special:
        tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
            single="[CLS] $A [SEP]",
            pair="[CLS] $A [SEP] $B:1 [SEP]:1",
            special_tokens=[("[CLS]", pieces["[CLS]"]), ("[SEP]", pieces["[SEP]"])],
        )
    # As the files of sentence-transformers are: the settings of the run have to win.
    tokenizer.enable_padding(length=12)
    tokenizer.enable_truncation(12)
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    return str(folder)


def write_bert(folder, **changes):
    """Writes a tokenizer.json and the config.json of a BERT that it belongs to into ``folder``."""
    write_tokenizer(folder)
    (pathlib.Path(folder) / "config.json").write_text(json.dumps({**BERT, **changes}))
    return str(folder)
