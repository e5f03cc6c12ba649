"""A small ResNet on scikit-learn's handwritten digits: the whole method in about two minutes.

    python train.py --config configs/quickstart.py

No download: the 1,797 images of 8x8 pixels come with scikit-learn.
"""

from cuttlefish_jax.training.config import default_config


def get_config():
    """The configuration."""
    config = default_config()
    config.name = "quickstart"
    config.epochs = 30
    config.batch_size = 64

    config.model.width = 64
    config.model.stage_sizes = (1, 1, 1)

    config.data.name = "digits"
    config.data.image_size = 8
    config.data.channels = 1
    config.data.crop_padding = 1
    config.data.flip = False  # a mirrored 2 is no digit

    config.optimizer.weight_decay = 1e-3
    config.schedule.name = "cosine"
    config.schedule.peak = 0.1
    config.schedule.warmup_epochs = 2.0

    config.plan.keep = ("stage1/*",)
    return config
