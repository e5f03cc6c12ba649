import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from glue_tools import BERT, COLUMNS, write_bert, write_task

from configs.bert_glue import get_config
from cuttlefish_jax.models import create_model
from cuttlefish_jax.training.config import default_config
from cuttlefish_jax.training.experiment import Experiment
from cuttlefish_jax.training.method import plan_from_config
from cuttlefish_jax.training.metrics import METRICS, compute_metrics
from cuttlefish_jax.training.tasks import load_task

INPUTS = ("input_ids", "attention_mask", "token_type_ids")
SCORES = dict(
    cola="matthews",
    sst2="accuracy",
    mrpc="f1",
    stsb="pearson",
    qqp="f1",
    mnli="accuracy",
    qnli="accuracy",
    rte="accuracy",
    wnli="accuracy",
)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A ``data_dir`` with all tasks."""
    data_dir = tmp_path_factory.mktemp("tfds")
    for task in COLUMNS:
        write_task(data_dir, task)
    return str(data_dir)


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    """A folder with a config.json and a tokenizer.json."""
    return write_bert(tmp_path_factory.mktemp("bert"))


@pytest.fixture
def make_config(prepared, bert):
    def make(task="sst2"):
        config = get_config(task)
        config.model.pretrained = ""
        config.model.config_file = bert
        config.data.update(dict(data_dir=prepared, tokenizer=bert, max_length=32, lengths=(8, 16)))
        return config

    return make


def small_bert(task, bert):
    return create_model("bert_base", num_classes=task.num_outputs, config_file=bert)


@pytest.mark.parametrize("name", COLUMNS)
def test_every_task_is_learnt_and_judged_as_it_should(name, make_config, bert):
    task = load_task(make_config(name))
    num_classes = COLUMNS[name][1]
    assert task.num_outputs == (num_classes or 1)
    assert task.score == SCORES[name]
    assert set(task.metrics) <= set(METRICS)
    assert task.num_lengths == 3
    assert [(array.shape, array.dtype) for array in task.inputs] == [((1, 32), jnp.int32)] * 3
    expected = {"validation", "test"} | ({"test_mismatched"} if name == "mnli" else set())
    assert set(task.evaluation) == expected

    examples = {key: jnp.asarray(array) for key, array in task.train.read(np.arange(8)).items()}
    inputs, targets = task.train_inputs(jax.random.key(0), examples)
    for name_of_input, seen, evaluated in zip(INPUTS, inputs, task.eval_inputs(examples), strict=True):
        np.testing.assert_array_equal(seen, examples[name_of_input])
        np.testing.assert_array_equal(evaluated, examples[name_of_input])
    model = small_bert(task, bert)
    task.check_model(model)
    shape = jax.eval_shape(model.init_with_output, jax.random.key(0), *inputs)[0].shape
    outputs = jax.random.normal(jax.random.key(1), shape)
    predictions = np.asarray(task.predict(outputs))
    labels = np.asarray(examples["label"])
    np.testing.assert_array_equal(targets, labels)
    logits = np.asarray(outputs, np.float64)
    if num_classes:
        np.testing.assert_array_equal(predictions, logits.argmax(axis=1))
        largest = logits.max(axis=1)
        total = largest + np.log(np.exp(logits - largest[:, None]).sum(axis=1))
        loss = total - logits[np.arange(8), labels]
        assert task.train_metrics(outputs, targets)["accuracy"].shape == (8,)
    else:
        np.testing.assert_array_equal(predictions, outputs[:, 0])
        loss = (logits[:, 0] - labels) ** 2
        assert task.train_metrics(outputs, targets) == {}
    np.testing.assert_allclose(task.train_loss(outputs, targets), loss, rtol=1e-5)
    np.testing.assert_allclose(task.eval_loss(outputs, targets), loss, rtol=1e-5)
    # Whoever knows the labels has the best score.
    assert set(compute_metrics(task.metrics, labels, labels).values()) == {1.0}


def test_label_smoothing_is_of_the_training_loss_alone(make_config):
    config = make_config()
    config.loss.label_smoothing = 0.5
    task = load_task(config)
    logits, labels = jnp.array([[3.0, 1.0]]), jnp.array([0])
    smooth = optax.softmax_cross_entropy(logits, jnp.array([[0.75, 0.25]]))
    np.testing.assert_allclose(task.train_loss(logits, labels), smooth, rtol=1e-6)
    assert task.eval_loss(logits, labels) < task.train_loss(logits, labels)


def test_what_padding_holds_does_not_matter_to_the_network(make_config, bert):
    task = load_task(make_config("mrpc"))
    examples = task.train.read(np.arange(8))
    inputs = task.eval_inputs({key: jnp.asarray(array) for key, array in examples.items()})
    model = small_bert(task, bert)
    variables = jax.jit(model.init)(jax.random.key(0), *inputs)
    apply = jax.jit(model.apply)
    longer = [
        jnp.pad(array, ((0, 0), (0, 7)), constant_values=value)
        for array, value in zip(inputs, (5, 0, 1), strict=True)
    ]
    np.testing.assert_allclose(apply(variables, *inputs), apply(variables, *longer), atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            dict(vocab_size=13),
            "the texts need vocab_size 14 or more, but the network has 13: does the tokenizer",
        ),
        (dict(type_vocab_size=1), "the texts need token_types 2 or more, but the network has 1"),
        (dict(max_position_embeddings=31), "the texts need max_length 32 or more, but the network has 31"),
    ],
)
def test_a_network_that_is_too_small_for_the_texts_is_an_error(changes, message, make_config, tmp_path):
    task = load_task(make_config("rte"))
    small = write_bert(tmp_path, **changes)
    with pytest.raises(ValueError, match=message) as error:
        task.check_model(small_bert(task, small))
    assert "\n" not in str(error.value)
    task.check_model(
        small_bert(task, write_bert(tmp_path / "just", **{key: changes[key] + 1 for key in changes}))
    )


def test_a_network_of_images_is_an_error(make_config):
    task = load_task(make_config())
    with pytest.raises(ValueError, match="the inputs are texts, and ResNet has no vocab_size: use bert_base"):
        task.check_model(create_model("resnet18", num_classes=2, width=8))


def test_a_network_of_texts_is_an_error_for_images(bert):
    config = default_config()
    config.data.update(name="digits", image_size=8)
    with pytest.raises(ValueError, match=r"the inputs are images, and Bert is for texts: use another"):
        load_task(config).check_model(create_model("bert_base", num_classes=10, config_file=bert))


def test_the_recipe_has_the_parameters_of_the_reference(make_config):
    config = make_config()
    config.model.config_file = ""
    config.batch_size = 8
    experiment = Experiment.from_config(config)
    plan = plan_from_config(config, experiment.kernels, dict.fromkeys(experiment.kernels, 1.0), {})
    assert set(plan.ranks) == {
        f"layer{i}/attention/{name}" for i in range(1, 13) for name in ("query", "key", "value", "output")
    }
    assert set(plan.ranks.values()) == {345}
    full, low = experiment.phase(), experiment.phase(plan, switch_step=1)
    counts = [sum(x.size for x in jax.tree.leaves(experiment.abstract_state(p).params)) for p in (full, low)]
    assert counts == [108_311_810, 105_436_418]
    assert experiment.num_trained(low) == 48_813_314


def test_the_tokenizer_is_that_of_the_weights_unless_another_one_is_given(make_config, bert):
    config = make_config()
    config.data.tokenizer = ""
    config.model.pretrained = bert
    assert load_task(config).least_sizes["vocab_size"] == BERT["vocab_size"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"data.on_device": True}, "data.on_device: .* set config.data.on_device to False"),
        ({"data.mixup": 0.2}, "data.mixup = 0.2 is for images; glue/stsb is of texts"),
        ({"data.randaugment": "m9"}, "data.randaugment = 'm9' is for images"),
        ({"data.repeated_augmentation": 3}, "data.repeated_augmentation is for images"),
        ({"data.tokenizer": ""}, "glue/stsb needs a tokenizer: --config.data.tokenizer=FILE or FOLDER"),
        ({"loss.label_smoothing": 0.1}, "loss.label_smoothing is for classes; glue/stsb is a regression"),
        ({"data.name": "glue/sts-b"}, "GLUE has no task 'sts-b'; did you mean stsb"),
        ({"data.name": "glue"}, "GLUE has no task 'glue'; choose from cola"),
    ],
)
def test_settings_that_do_not_suit_are_one_line_errors(settings, message, make_config):
    config = make_config("stsb")
    config.update_from_flattened_dict(settings)
    with pytest.raises(ValueError, match=message) as error:
        load_task(config)
    assert "\n" not in str(error.value)
