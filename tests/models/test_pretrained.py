"""What load_pretrained reads, and refuses; the parity with real networks is tested beside this file."""

import json
import struct
import sys

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import traverse_util

import cuttlefish_jax as cf
from cuttlefish_jax.models import create_model
from cuttlefish_jax.models.bert import bert_base
from cuttlefish_jax.models.pretrained import NAMINGS, load_pretrained
from cuttlefish_jax.models.pretrained.torchvision import locate_resnet

SIZES = dict(vocab_size=11, width=4, depth=1, heads=2, ffn_width=6, max_length=8)
IDS = jax.ShapeDtypeStruct((1, 8), jnp.int32)
DTYPES = {
    "float32": "F32",
    "float16": "F16",
    "float64": "F64",
    "bfloat16": "BF16",
    "int64": "I64",
    "int8": "I8",
}


def write(path, tensors):
    """A safetensors file, byte by byte: its format is a header of JSON and the tensors after it."""
    header, data = {}, b""
    for name, tensor in tensors.items():
        tensor = np.asarray(tensor)
        ends = [len(data), len(data) + tensor.nbytes]
        header[name] = dict(dtype=DTYPES[tensor.dtype.name], shape=tensor.shape, data_offsets=ends)
        data += tensor.tobytes()
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def resnet_shapes(**options):
    model = create_model("resnet18", num_classes=3, width=2, stage_sizes=(1, 1), stem="imagenet", **options)
    return jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))


def resnet_tensors(seed=0):
    """A torchvision checkpoint of that network, in torch's shapes."""
    shapes = {
        "conv1.weight": (2, 3, 7, 7),
        "layer1.0.conv1.weight": (2, 2, 3, 3),
        "layer1.0.conv2.weight": (2, 2, 3, 3),
        "layer2.0.conv1.weight": (4, 2, 3, 3),
        "layer2.0.conv2.weight": (4, 4, 3, 3),
        "layer2.0.downsample.0.weight": (4, 2, 1, 1),
        "fc.weight": (3, 4),
        "fc.bias": (3,),
    }
    norms = {"bn1": 2, "layer1.0.bn1": 2, "layer1.0.bn2": 2}
    norms |= {"layer2.0.bn1": 4, "layer2.0.bn2": 4, "layer2.0.downsample.1": 4}
    for norm, size in norms.items():
        for part in ("weight", "bias", "running_mean", "running_var"):
            shapes[f"{norm}.{part}"] = (size,)
    rng = np.random.default_rng(seed)
    tensors = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    return tensors | {f"{norm}.num_batches_tracked": np.int64(7) for norm in norms}


def bert_tensors(variables, prefix="bert.", norm=("weight", "bias")):
    """A transformers checkpoint that holds the values of ``variables``."""
    parts = {
        "word": "word_embeddings",
        "position": "position_embeddings",
        "token_type": "token_type_embeddings",
    }
    layer = {
        "attention/query": "attention.self.query",
        "attention/key": "attention.self.key",
        "attention/value": "attention.self.value",
        "attention/output": "attention.output.dense",
        "attention/norm": "attention.output.LayerNorm",
        "ffn/intermediate": "intermediate.dense",
        "ffn/output": "output.dense",
        "ffn/norm": "output.LayerNorm",
    }
    params, tensors = variables["params"], {}

    def put(name, values):
        for leaf, value in values.items():
            value = np.asarray(value)
            suffix = {"kernel": "weight", "embedding": "weight", "scale": norm[0]}.get(leaf, "bias")
            if leaf == "bias" and "scale" in values:
                suffix = norm[1]
            tensors[f"{name}.{suffix}"] = value.T.copy() if leaf == "kernel" else value

    for ours, theirs in parts.items():
        put(f"{prefix}embeddings.{theirs}", params["embeddings"][ours])
    put(f"{prefix}embeddings.LayerNorm", params["embeddings"]["norm"])
    for path, theirs in layer.items():
        block, sublayer = path.split("/")
        put(f"{prefix}encoder.layer.0.{theirs}", params["layer1"][block][sublayer])
    put(f"{prefix}pooler.dense", params["pooler"])
    put("classifier", params["classifier"])
    return tensors


def random_bert(seed=0):
    shapes = jax.eval_shape(bert_base(num_classes=2, **SIZES).init, jax.random.key(0), IDS)
    rng = np.random.default_rng(seed)
    return shapes, jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), shapes)


def refusal(name, variables, source, **options):
    with pytest.raises(ValueError, match=r".") as error:
        load_pretrained(name, variables, source, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_every_array_is_its_tensor(tmp_path):
    tensors = resnet_tensors()
    variables = load_pretrained("resnet18", resnet_shapes(), write(tmp_path / "model.safetensors", tensors))
    params, stats = variables["params"], variables["batch_stats"]
    assert jax.tree.structure(variables) == jax.tree.structure(resnet_shapes())
    kernel = params["stage2"]["block1"]["conv1"]["kernel"]
    np.testing.assert_array_equal(kernel[1, 2, 0, 3], tensors["layer2.0.conv1.weight"][3, 0, 1, 2])
    np.testing.assert_array_equal(params["classifier"]["kernel"], tensors["fc.weight"].T)
    block = params["stage2"]["block1"]
    np.testing.assert_array_equal(block["shortcut_norm"]["scale"], tensors["layer2.0.downsample.1.weight"])
    np.testing.assert_array_equal(params["stem_norm"]["bias"], tensors["bn1.bias"])
    np.testing.assert_array_equal(stats["stem_norm"]["mean"], tensors["bn1.running_mean"])
    var = stats["stage1"]["block1"]["norm2"]["var"]
    np.testing.assert_array_equal(var, tensors["layer1.0.bn2.running_var"])


def test_the_result_can_be_trained_on(tmp_path):
    write(tmp_path / "model.safetensors", resnet_tensors())
    variables = load_pretrained("resnet18", resnet_shapes(), str(tmp_path))
    for leaf in jax.tree.leaves(variables):
        assert leaf.flags.writeable
        assert leaf.flags.c_contiguous


@pytest.mark.parametrize("stored", [np.float16, np.float64, ml_dtypes.bfloat16])
@pytest.mark.parametrize("wanted", [jnp.float32, jnp.bfloat16])
def test_dtypes_are_those_of_the_tree(stored, wanted, tmp_path):
    shapes, values = random_bert()
    tensors = {name: tensor.astype(stored) for name, tensor in bert_tensors(values).items()}
    shapes = jax.tree.map(lambda leaf: leaf.update(dtype=wanted), shapes)
    loaded = load_pretrained("bert_base", shapes, write(tmp_path / "model.safetensors", tensors))
    expected = jax.tree.map(lambda leaf: leaf.astype(stored).astype(wanted), values)
    jax.tree.map(np.testing.assert_array_equal, loaded, expected)
    assert {leaf.dtype for leaf in jax.tree.leaves(loaded)} == {np.dtype(wanted)}


@pytest.mark.parametrize("prefix", ["bert.", ""])
@pytest.mark.parametrize("norm", [("weight", "bias"), ("gamma", "beta")])
def test_bert_by_all_its_names(prefix, norm, tmp_path):
    shapes, values = random_bert()
    tensors = bert_tensors(values, prefix, norm)
    tensors[f"{prefix}embeddings.position_ids"] = np.arange(8)[None]
    loaded = load_pretrained("bert_base", shapes, write(tmp_path / "model.safetensors", tensors))
    jax.tree.map(np.testing.assert_array_equal, loaded, values)


def test_a_sharded_folder(tmp_path):
    shapes, values = random_bert()
    tensors = list(bert_tensors(values).items())
    weight_map = {}
    for i, part in enumerate((tensors[:9], tensors[9:])):
        write(tmp_path / f"part{i}.safetensors", dict(part))
        weight_map |= {name: f"part{i}.safetensors" for name, _ in part}
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps(dict(weight_map=weight_map)))
    loaded = load_pretrained("bert_base", shapes, tmp_path)
    jax.tree.map(np.testing.assert_array_equal, loaded, values)

    (tmp_path / "part1.safetensors").unlink()
    assert f"cannot read {tmp_path / 'part1.safetensors'}" in refusal("bert_base", shapes, tmp_path)
    index.write_text(json.dumps(dict(weight_map={"x": "../other.safetensors"})))
    assert "'../other.safetensors', which is not a file beside it" in refusal("bert_base", shapes, tmp_path)
    index.write_text("{}")
    assert f"{index}: not a list of safetensors files: there is no 'weight_map'" in refusal(
        "bert_base", shapes, tmp_path
    )


def test_fresh_and_unused(tmp_path):
    shapes, values = random_bert()
    tensors = bert_tensors(values) | {"cls.predictions.bias": np.zeros(11, np.float32)}
    tensors["classifier.weight"] = np.zeros((9, 4), np.float32)  # of another task; has no say in a fresh one
    source = write(tmp_path / "model.safetensors", tensors)
    variables = jax.tree.map(np.ones_like, values)
    loaded = load_pretrained("bert_base", variables, source, fresh=["classifier/*"], unused=["cls.*"])
    head = loaded["params"].pop("classifier")
    assert head["kernel"] is variables["params"]["classifier"]["kernel"]
    assert head["bias"] is variables["params"]["classifier"]["bias"]
    values["params"].pop("classifier")
    jax.tree.map(np.testing.assert_array_equal, loaded, values)

    assert "nothing uses its cls.predictions.bias" in refusal(
        "bert_base", variables, source, fresh=["classifier/*"]
    )
    message = refusal("bert_base", shapes, source, fresh=["classifier/*"], unused=["cls.*"])
    assert message == "'classifier/bias' is to be fresh, but has no value: give arrays, not shapes"
    assert "fresh 'clasifier/*' matches nothing; near it: classifier/" in refusal(
        "bert_base", variables, source, fresh=["clasifier/*"]
    )
    assert "unused 'cls.seq.*' matches nothing; near it: " in refusal(
        "bert_base", variables, source, unused=["cls.seq.*"]
    )
    assert "fresh is 'classifier/*'; give a list" in refusal(
        "bert_base", variables, source, fresh="classifier/*"
    )


def test_what_is_missing_and_what_is_left_over_is_listed(tmp_path):
    tensors = resnet_tensors()
    del tensors["fc.bias"]
    tensors["layer2.0.extra"] = np.zeros(1, np.float32)
    source = write(tmp_path / "model.safetensors", tensors)
    assert refusal("resnet18", resnet_shapes(), source) == (
        f"{source} is not a checkpoint of this resnet18: it lacks classifier/bias (fc.bias); "
        "nothing uses its layer2.0.extra"
    )


def test_long_lists_are_cut(tmp_path):
    tensors = {name: tensor for name, tensor in resnet_tensors().items() if not name.startswith("layer2")}
    message = refusal("resnet18", resnet_shapes(), write(tmp_path / "model.safetensors", tensors))
    missing = message.split("it lacks ")[1]
    assert missing.count("(layer2.0.") == 10
    assert missing.endswith(", and 5 more")  # three convolutions and three norms of four, less ten


def test_wrong_shapes_are_listed(tmp_path):
    tensors = resnet_tensors()
    tensors["fc.weight"], tensors["fc.bias"] = np.zeros((10, 4), np.float32), np.zeros(10, np.float32)
    tensors["conv1.weight"] = np.zeros((2, 3), np.float32)
    source = write(tmp_path / "model.safetensors", tensors)
    message = refusal("resnet18", resnet_shapes(), source)
    assert message.startswith(f"{source} has other shapes: ")
    assert "classifier/kernel is (4, 3), but fc.weight (10, 4) gives (4, 10)" in message
    assert "classifier/bias is (3,), but fc.bias (10,) gives (10,)" in message
    assert "stem_conv/kernel is (7, 7, 3, 2), but conv1.weight (2, 3) does not fit" in message


def test_a_checkpoint_of_another_network(tmp_path):
    _, values = random_bert()
    source = write(tmp_path / "model.safetensors", bert_tensors(values))
    assert refusal("resnet18", resnet_shapes(), source) == (
        f"{source} looks like a transformers BERT checkpoint, not the torchvision ResNet of resnet18"
    )
    source = write(tmp_path / "model.safetensors", resnet_tensors())
    shapes, _ = random_bert()
    assert "looks like a torchvision ResNet checkpoint" in refusal("bert_base", shapes, source)


def test_variables_that_no_checkpoint_has(tmp_path):
    shapes, values = random_bert()
    source = write(tmp_path / "model.safetensors", bert_tensors(values))
    assert "no checkpoints are known for model 'alexnet'" in refusal("alexnet", shapes, source)
    assert "no place for 'embeddings/norm/bias' of resnet18" in refusal("resnet18", shapes, source)
    assert "variables have 'cache'" in refusal("bert_base", {**shapes, "cache": {}}, source)
    kernels = cf.find_kernels(bert_base(num_classes=2, **SIZES), IDS)
    plan = cf.FactorizationPlan.from_ranks(kernels, {"layer1/attention/query": 1})
    low = {"params": cf.factorize_params(values["params"], plan)}
    assert "'layer1/attention/query/u/kernel' of bert_base; load before factorizing" in refusal(
        "bert_base", low, source
    )


def test_quantised_tensors(tmp_path):
    shapes, values = random_bert()
    tensors = bert_tensors(values)
    tensors["bert.pooler.dense.weight"] = np.zeros((4, 4), np.int8)
    message = refusal("bert_base", shapes, write(tmp_path / "model.safetensors", tensors))
    assert "'bert.pooler.dense.weight' is I8: quantised" in message


@pytest.mark.parametrize("content", [b"", b"\x80\x02}q\x00.", b"PK\x03\x04" + bytes(100), "half"])
def test_files_that_are_damaged_or_something_else(content, tmp_path):
    shapes, values = random_bert()
    path = write(tmp_path / "model.safetensors", bert_tensors(values))
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2] if content == "half" else content)
    assert refusal("bert_base", shapes, path).startswith(f"{path} is truncated, or not a safetensors file")


def test_pickles_are_refused_unread(tmp_path):
    shapes, _ = random_bert()
    for name in ("pytorch_model.bin", "model.pth", "model.pt"):
        (tmp_path / name).write_bytes(b"")
        message = refusal("bert_base", shapes, tmp_path / name)
        assert message.startswith(f"{tmp_path / name} is a pickle")
        assert "safetensors.torch.save_file" in message
        assert "is a pickle" in refusal("bert_base", shapes, tmp_path)
        (tmp_path / name).unlink()


@pytest.mark.parametrize("name", ["absent.safetensors", "absent/deep/folder", "absent/"])
def test_paths_of_nothing(name, tmp_path):
    shapes, _ = random_bert()
    assert "there is no file or folder" in refusal("bert_base", shapes, f"{tmp_path}/{name}")
    assert "there is no file or folder" in refusal("bert_base", shapes, tmp_path / name)
    empty = tmp_path / "empty"
    empty.mkdir()
    assert f"folder {empty} has neither model.safetensors nor" in refusal("bert_base", shapes, str(empty))


def test_a_repository_of_the_hub(tmp_path, monkeypatch):
    hub = pytest.importorskip("huggingface_hub", reason="the hub's client is not installed")
    shapes, values = random_bert()
    source = write(tmp_path / "model.safetensors", bert_tensors(values))
    asked = []

    def download(repository, name):
        asked.append((repository, name))
        if name != source.name:
            raise hub.errors.EntryNotFoundError("404 Client Error.\n\nEntry Not Found")
        return str(tmp_path / name)

    monkeypatch.setattr(hub, "hf_hub_download", download)
    jax.tree.map(np.testing.assert_array_equal, load_pretrained("bert_base", shapes, "some-one/bert"), values)
    assert asked == [("some-one/bert", "model.safetensors")]

    source.rename(tmp_path / "part.safetensors")
    source = tmp_path / "model.safetensors.index.json"
    source.write_text(json.dumps(dict(weight_map=dict.fromkeys(bert_tensors(values), "part.safetensors"))))
    message = refusal("bert_base", shapes, "some-one/bert")
    assert message == (
        "some-one/bert is no local path, and could not be fetched from the Hugging Face hub: "
        "404 Client Error. Entry Not Found"
    )
    assert [name for _, name in asked[1:]] == [
        "model.safetensors",
        "model.safetensors.index.json",
        "part.safetensors",
    ]


def test_the_hub_without_a_network(monkeypatch, tmp_path):
    hub = pytest.importorskip("huggingface_hub", reason="the hub's client is not installed")
    shapes, _ = random_bert()
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(hub.constants, "HF_HUB_CACHE", str(tmp_path))
    message = refusal("bert_base", shapes, "some-one/bert")
    assert message.startswith(
        "some-one/bert is no local path, and could not be fetched from the Hugging Face"
    )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("package", "advice"),
    [("safetensors", "'cuttlefish-jax[serving]'"), ("huggingface_hub", "huggingface_hub")],
)
def test_packages_that_are_not_installed(package, advice, monkeypatch):
    shapes, _ = random_bert()
    monkeypatch.setitem(sys.modules, package, None)
    assert f"pip install {advice}" in refusal("bert_base", shapes, "some-one/bert")


def test_unknown_paths_have_no_place():
    for path in ("stem_conv/scale", "stage1/block1/conv1", "stageX/block1/conv1/kernel", "head/kernel"):
        assert locate_resnet(path) is None
    for naming in NAMINGS.values():
        for path in ("layer/kernel", "block/norm1/scale", "stage1/conv1/thing", "a/b/c/d/e", "kernel"):
            assert naming.locate(path) is None


@pytest.mark.parametrize(
    ("name", "options", "size"),
    [
        ("wide_resnet50_2", dict(stem="imagenet"), 32),
        ("vgg19", dict(stem="imagenet"), 32),
        ("vgg19", dict(stem="cifar"), 32),
        ("deit_tiny", {}, 32),
        ("resmlp_s12", {}, 32),
    ],
)
def test_every_parameter_has_a_name_of_its_own(name, options, size):
    model = create_model(name, num_classes=3, **options)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, size, size, 3)))
    naming = next(naming for pattern, naming in NAMINGS.items() if name.startswith(pattern.rstrip("*")))
    places = [naming.locate("/".join(path[1:])) for path in traverse_util.flatten_dict(shapes)]
    names = [place.names[0] for place in places]
    assert len(set(names)) == len(names)
    assert naming.signature in names
