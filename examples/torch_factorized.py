"""A factorized network of Flax in PyTorch, from the safetensors file alone.

    python examples/torch_factorized.py model.safetensors

The file is what ``cuttlefish_jax.serving.save_safetensors(file, variables, plan)`` wrote. Its metadata have
the plan, which says of every layer whether it is one array or two factors. :class:`Weights` makes layers of
PyTorch of it; the network around them is to be written as in Flax, here :class:`Network`. Needs torch and
safetensors, and nothing of JAX.

Flax keeps the features last: dense kernels are [in, out] there and [out, in] here, those of convolutions
[height, width, in, out] there and [out, in, height, width] here, and images [batch, height, width, channels].
"""

import json
import sys

import torch
from safetensors import safe_open
from torch import nn


class Weights:
    """The tensors and the plan of a safetensors file, as layers of PyTorch."""

    def __init__(self, file):
        with safe_open(file, framework="pt") as opened:
            self.tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
            self.plan = json.loads(opened.metadata()["cuttlefish_plan"])

    def tensor(self, path, name, collection="params"):
        """An array of a layer, ``None`` if it has none of that name; in a file of params alone as well."""
        full = ".".join([*path.split("/"), name])
        return self.tensors.get(f"{collection}.{full}", self.tensors.get(full))

    def linear(self, path):
        """A dense layer, or its two factors one after the other."""
        if path in self.plan["ranks"]:
            return nn.Sequential(self.linear(f"{path}/u"), self.linear(f"{path}/v"))
        kernel, bias = self.tensor(path, "kernel"), self.tensor(path, "bias")
        layer = nn.Linear(*kernel.shape, bias=bias is not None, dtype=kernel.dtype)
        return _filled(layer, weight=kernel.T, bias=bias)

    def conv(self, path, **options):
        """A two-dimensional convolution; of two factors the first has the window, and so the options."""
        if path in self.plan["ranks"]:
            return nn.Sequential(self.conv(f"{path}/u", **options), self.conv(f"{path}/v"))
        kernel, bias = self.tensor(path, "kernel"), self.tensor(path, "bias")
        height, width, channels, features = kernel.shape
        layer = nn.Conv2d(
            channels, features, (height, width), bias=bias is not None, dtype=kernel.dtype, **options
        )
        return _filled(layer, weight=kernel.permute(3, 2, 0, 1), bias=bias)

    def batch_norm(self, path, eps=1e-5):
        """A batch norm with its running statistics, which are not parameters."""
        mean, var = (self.tensor(path, name, "batch_stats") for name in ("mean", "var"))
        layer = nn.BatchNorm2d(len(mean), eps=eps)
        return _filled(
            layer,
            weight=self.tensor(path, "scale"),
            bias=self.tensor(path, "bias"),
            running_mean=mean,
            running_var=var,
        )


def _filled(layer, **arrays):
    with torch.no_grad():
        for name, array in arrays.items():
            if array is not None:
                getattr(layer, name).copy_(array)
    return layer


class Network(nn.Module):
    """What is in Flax::

    x = nn.relu(nn.Conv(16, (3, 3), padding=1, name="conv1")(x))
    x = nn.Conv(32, (3, 3), strides=2, padding=1, use_bias=False, name="conv2")(x)
    x = nn.relu(nn.BatchNorm(use_running_average=True, name="norm")(x)).mean(axis=(1, 2))
    return nn.Dense(10, name="head")(nn.relu(nn.Dense(64, name="hidden")(x)))
    """

    def __init__(self, file):
        super().__init__()
        weights = Weights(file)
        self.conv1 = weights.conv("conv1", padding=1)
        self.conv2 = weights.conv("conv2", padding=1, stride=2)
        self.norm = weights.batch_norm("norm")
        self.hidden = weights.linear("hidden")
        self.head = weights.linear("head")
        self.eval()

    def forward(self, images):
        """Images ``[batch, channels, height, width]`` to logits ``[batch, 10]``."""
        x = torch.relu(self.conv1(images))
        x = torch.relu(self.norm(self.conv2(x))).mean(dim=(2, 3))
        return self.head(torch.relu(self.hidden(x)))


if __name__ == "__main__":
    network = Network(sys.argv[1])
    print(network)
    print("parameters:", sum(p.numel() for p in network.parameters()))
    print("logits of a black image:", network(torch.zeros(1, 3, 32, 32)).tolist())
