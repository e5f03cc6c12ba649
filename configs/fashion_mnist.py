"""ResNet-18 on Fashion-MNIST at the size of two CPU cores: the experiment that methods are compared on.

    python train.py --config configs/fashion_mnist.py
    python benchmarks/methods.py --config configs/fashion_mnist.py --seeds 3

Images of 28x28 pixels, 16 channels in the first stage, 3,000 training images. The data set has to be prepared
once; the error that you get without it has the command.
"""

from cuttlefish_jax.training.config import default_config


def get_config():
    """The configuration."""
    config = default_config()
    config.name = "fashion_mnist"
    config.epochs = 20
    config.batch_size = 64

    config.model.width = 16

    config.data.name = "fashion_mnist"
    config.data.image_size = 28
    config.data.channels = 1
    config.data.train_examples = 3000
    config.data.crop_padding = 2
    config.evaluation.every_epochs = 10

    config.optimizer.weight_decay = 5e-4
    config.optimizer.frobenius_decay = 5e-4
    config.schedule.name = "cosine"
    config.schedule.peak = 0.1
    config.schedule.warmup_epochs = 2.0

    config.pufferfish.keep = ("stage1/block1/*",)
    config.si_fd.frobenius_decay = 5e-4
    return config
