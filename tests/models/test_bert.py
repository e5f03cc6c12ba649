import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from scipy.special import erf

import cuttlefish_jax as cf
from cuttlefish_jax.models.bert import bert_base

SMALL = dict(vocab_size=50, width=12, depth=2, heads=3, ffn_width=20, max_length=16)
SHALLOW = SMALL | dict(depth=1)
CONFIG = dict(
    model_type="bert",
    vocab_size=50,
    hidden_size=12,
    num_hidden_layers=2,
    num_attention_heads=3,
    intermediate_size=20,
    max_position_embeddings=16,
    type_vocab_size=2,
)
TOKENS = jax.ShapeDtypeStruct((1, 128), jnp.int32)


def count(tree):
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def inputs(seed=0):
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, 50, (2, 7)).astype(np.int32)
    mask = np.array([[1] * 7, [1] * 4 + [0] * 3], np.int32)
    types = np.array([[0] * 3 + [1] * 4] * 2, np.int32)
    return ids, mask, types


def random_variables(model, seed=0):
    # Larger than the initialisation, norms and biases too: a mistake in any of them shows.
    shapes = jax.eval_shape(model.init, jax.random.key(0), *inputs())
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: rng.normal(0.1, 0.4, leaf.shape).astype(np.float32), shapes)


def reference(params, ids, mask, types, *, heads, activation, epsilon):
    """BERT in float64 NumPy."""
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)

    def dense(x, layer):
        return x @ layer["kernel"] + layer["bias"]

    def norm(x, layer):
        x = x - x.mean(-1, keepdims=True)
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + epsilon) * layer["scale"] + layer["bias"]

    tables = {name: params["embeddings"][name]["embedding"] for name in ("word", "position", "token_type")}
    x = tables["word"][ids] + tables["position"][: ids.shape[1]] + tables["token_type"][types]
    x = norm(x, params["embeddings"]["norm"])
    for i in range(1, 1 + sum(name.startswith("layer") for name in params)):
        attention, ffn = params[f"layer{i}"]["attention"], params[f"layer{i}"]["ffn"]
        q, k, v = (np.split(dense(x, attention[name]), heads, -1) for name in ("query", "key", "value"))
        y = []
        for h in range(heads):
            scores = q[h] @ k[h].swapaxes(1, 2) / np.sqrt(q[h].shape[-1])
            weights = np.exp(scores) * mask[:, None, :]
            y.append(weights / weights.sum(-1, keepdims=True) @ v[h])
        x = norm(x + dense(np.concatenate(y, -1), attention["output"]), attention["norm"])
        y = dense(activation(dense(x, ffn["intermediate"])), ffn["output"])
        x = norm(x + y, ffn["norm"])
    return dense(np.tanh(dense(x[:, 0], params["pooler"])), params["classifier"])


ACTIVATIONS = {
    "gelu": lambda x: x * (1 + erf(x / np.sqrt(2))) / 2,
    "gelu_new": lambda x: x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))) / 2,
    "relu": lambda x: np.maximum(x, 0),
}


def test_parameter_count_of_bert_base_cased():
    params = jax.eval_shape(bert_base(num_classes=2).init, jax.random.key(0), TOKENS)
    assert count(params) == 108_311_810


def test_parameter_count_factorized_as_in_the_paper():
    model = bert_base(num_classes=2)
    kernels = cf.find_kernels(model, TOKENS, TOKENS, TOKENS)
    attention = [path for path in kernels if "/attention/" in path]
    assert len(attention) == 48
    plan = cf.FactorizationPlan.from_ranks(kernels, dict.fromkeys(attention, 345))
    low = jax.eval_shape(cf.factorize(model, plan).init, jax.random.key(0), TOKENS)
    assert count(low) == plan.num_params == 105_436_418
    ffn = [kernels[path].num_params() for path in kernels if "/ffn/" in path]
    assert count(low) - sum(ffn) == 48_813_314


def test_paths_and_shapes():
    model = bert_base(num_classes=3, **SHALLOW)
    params = jax.eval_shape(model.init, jax.random.key(0), TOKENS.update(shape=(1, 5)))["params"]
    square, norm = {"kernel": (12, 12), "bias": (12,)}, {"scale": (12,), "bias": (12,)}
    assert jax.tree.map(lambda leaf: leaf.shape, params) == {
        "embeddings": {
            "word": {"embedding": (50, 12)},
            "position": {"embedding": (16, 12)},
            "token_type": {"embedding": (2, 12)},
            "norm": norm,
        },
        "layer1": {
            "attention": {
                "query": square,
                "key": square,
                "value": square,
                "output": square,
                "norm": norm,
            },
            "ffn": {
                "intermediate": {"kernel": (12, 20), "bias": (20,)},
                "output": {"kernel": (20, 12), "bias": (12,)},
                "norm": norm,
            },
        },
        "pooler": square,
        "classifier": {"kernel": (12, 3), "bias": (3,)},
    }


@pytest.mark.parametrize("activation", list(ACTIVATIONS))
def test_logits_are_those_of_float64_numpy(activation, tmp_path):
    file = tmp_path / "config.json"
    file.write_text(json.dumps(CONFIG | dict(hidden_act=activation, layer_norm_eps=1e-3)))
    model = bert_base(num_classes=3, config_file=file)
    variables = random_variables(model)
    expected = reference(
        variables["params"], *inputs(), heads=3, activation=ACTIVATIONS[activation], epsilon=1e-3
    )
    logits = jax.jit(model.apply)(variables, *inputs())
    np.testing.assert_allclose(logits, expected, atol=1e-5 * np.abs(expected).max())


def test_mask_and_types_are_ones_and_zeros_by_default():
    model = bert_base(num_classes=2, **SMALL)
    variables, (ids, _, _) = random_variables(model), inputs()
    expected = model.apply(variables, ids, np.ones_like(ids), np.zeros_like(ids))
    np.testing.assert_allclose(model.apply(variables, ids), expected, rtol=1e-6)


def test_padding_has_no_influence():
    model = bert_base(num_classes=2, **SMALL)
    variables, (ids, mask, types) = random_variables(model), inputs()
    expected = model.apply(variables, ids[1:, :4], None, types[1:, :4])
    logits = model.apply(variables, ids, mask, types)
    np.testing.assert_allclose(logits[1:], expected, rtol=1e-5)
    other = np.where(mask == 0, 49 - ids, ids)
    np.testing.assert_array_equal(model.apply(variables, other, mask, types), logits)
    assert np.abs(model.apply(variables, other, None, types)[1] - logits[1]).max() > 1e-3


def test_dropout_in_training_alone():
    model = bert_base(num_classes=2, **SHALLOW)
    variables = random_variables(model)

    def train_mode(model):
        return jax.jit(
            lambda seed: model.apply(variables, *inputs(), train=True, rngs={"dropout": jax.random.key(seed)})
        )

    logits = train_mode(model)
    assert jnp.abs(logits(1) - logits(2)).max() > 1e-3
    without = train_mode(bert_base(num_classes=2, **SHALLOW, dropout=0.0))
    np.testing.assert_allclose(without(1), model.apply(variables, *inputs()), rtol=1e-5)


def test_every_dropout_has_its_own_rate(tmp_path):
    rates = dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, classifier_dropout=0.0)
    for key in rates:
        (tmp_path / "config.json").write_text(json.dumps(CONFIG | rates | {key: 0.5, "num_hidden_layers": 1}))
        model = bert_base(num_classes=2, config_file=tmp_path)
        variables = random_variables(model)
        noisy = model.apply(variables, *inputs(), train=True, rngs={"dropout": jax.random.key(1)})
        assert np.abs(noisy - model.apply(variables, *inputs())).max() > 1e-3, key


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_logits_and_parameters_are_float32_whatever_the_computation(dtype):
    model = bert_base(num_classes=2, **SHALLOW, dtype=dtype)
    variables = jax.jit(model.init)(jax.random.key(0), *inputs())
    logits, captured = model.apply(variables, *inputs(), capture_intermediates=True)
    assert logits.dtype == jnp.float32
    assert captured["intermediates"]["layer1"]["__call__"][0].dtype == jnp.dtype(dtype)
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}


def test_initialization():
    model = bert_base(num_classes=2, width=64, depth=1, heads=4, ffn_width=256, vocab_size=1000)
    params = jax.jit(model.init)(jax.random.key(0), *inputs())["params"]
    params = traverse_util.flatten_dict(params, sep="/")
    for path, leaf in params.items():
        if path.endswith(("kernel", "embedding")) and leaf.size > 1000:
            np.testing.assert_allclose(leaf.std(), 0.02, rtol=0.05, err_msg=path)
        elif path.endswith("bias"):
            assert not leaf.any()


def test_factorizing_at_full_rank_leaves_the_logits_and_training_works():
    model = bert_base(num_classes=2, **SHALLOW)
    variables = random_variables(model)
    kernels = cf.find_kernels(model, *inputs())
    plan = cf.FactorizationPlan.from_ranks(kernels, {p: k.max_rank for p, k in kernels.items()})
    low, params = cf.factorize(model, plan), cf.factorize_params(variables["params"], plan)
    expected = model.apply(variables, *inputs())
    np.testing.assert_allclose(low.apply({"params": params}, *inputs()), expected, atol=1e-4)

    def loss(params):
        rngs = {"dropout": jax.random.key(0)}
        return low.apply({"params": params}, *inputs(), train=True, rngs=rngs).sum()

    gradient = jax.jit(jax.grad(loss))(params)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))


def test_config_file_replaces_the_options(tmp_path):
    more = dict(
        hidden_act="relu",
        hidden_dropout_prob=0.2,
        attention_probs_dropout_prob=0.3,
        classifier_dropout=None,
        layer_norm_eps=1e-6,
        initializer_range=0.01,
        transformers_version="4",
    )
    (tmp_path / "config.json").write_text(json.dumps(CONFIG | more))
    model = bert_base(num_classes=5, width=4, heads=1, config_file=str(tmp_path), dtype="bfloat16")
    expected = bert_base(num_classes=5, **SMALL, dropout=0.2, layer_norm_epsilon=1e-6, dtype="bfloat16")
    assert model == expected.clone(activation="relu", attention_dropout=0.3, init_std=0.01)
    assert hash(model) == hash(model.clone())


def test_old_config_without_model_type(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({k: v for k, v in CONFIG.items() if k != "model_type"}))
    assert bert_base(num_classes=2, config_file=tmp_path) == bert_base(num_classes=2, **SMALL)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(model_type="roberta"), "config.json has model_type 'roberta'; only 'bert' is known"),
        (dict(hidden_size=None, vocab_size=None), "is not a BERT's: it has no vocab_size, hidden_size"),
        (dict(hidden_size="12"), "hidden_size is '12', not an integer"),
        (dict(layer_norm_eps="small"), "layer_norm_eps is 'small', not a number"),
        (dict(hidden_act="silu"), "hidden_act 'silu'; known are gelu, gelu_new, relu"),
        (dict(position_embedding_type="relative_key"), "position_embedding_type 'relative_key'"),
        (dict(is_decoder=True), "is a decoder's"),
        (dict(num_attention_heads=5), "heads=5 does not divide width=12"),
        (dict(hidden_dropout_prob=1.5), "dropout is 1.5"),
        (dict(num_hidden_layers=0), "sizes must be positive: .*depth=0"),
    ],
)
def test_config_files_that_make_no_network(changes, message, tmp_path):
    config = {key: value for key, value in (CONFIG | changes).items() if value is not None}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message) as error:
        bert_base(num_classes=2, config_file=tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot read"),
        ("{", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ("[]", "is not an object"),
    ],
)
def test_config_files_that_cannot_be_read(content, message, tmp_path):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(ValueError, match=f"{message}.*") as error:
        bert_base(num_classes=2, config_file=tmp_path)
    assert str(tmp_path / "config.json") in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(heads=5), "heads=5 does not divide width=12"),
        (dict(depth=0), "sizes must be positive: .*depth=0"),
        (dict(dropout=1.0), "dropout is 1.0"),
        (dict(dtype="int8"), "dtype is 'int8'"),
    ],
)
def test_wrong_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        bert_base(num_classes=2, **(SMALL | options))


def test_more_tokens_than_positions():
    model = bert_base(num_classes=2, **SMALL)
    with pytest.raises(ValueError, match="inputs of 17 tokens: this BERT has positions for 16"):
        jax.eval_shape(model.init, jax.random.key(0), TOKENS.update(shape=(1, 17)))
