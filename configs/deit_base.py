"""DeiT-base on ImageNet, as in the paper (Wang et al., MLSys 2023).

    python train.py --config configs/deit_base.py
    python train.py --config configs/deit_base.py:fashion_mnist    # or :cifar10, ...: small patches

ImageNet has to be prepared once; the error that you get without it has the command. Cost: 17.6 GMAC per image
forward before the switch, 300 epochs of 1.28 million images in half precision; made for sixteen GPUs or TPUs
and up.

Which layers are factorized is measured on the device, but for the projections of attention, which are not.
The paper's own choices are

    --config.profile.enabled=False --config.switch.criterion=reference_deit --config.plan.min_rank_ratio=0.5
    --config.plan.rank_rule=scaled_stable_rank --config.switch.learning_rate_factor=0.333
    --config.switch.optimizer=reset --config.optimizer.precondition=False
"""

from configs.shared import use_imagenet, use_small_images
from cuttlefish_jax.training.config import default_config


def get_config(dataset: str = "imagenet"):
    """The configuration for ImageNet or one of the small data sets."""
    config = default_config()
    config.name = f"deit_base_{dataset}"
    config.model.name = "deit_base"
    use_deit_recipe(config, dataset)
    config.plan.keep = ("*/attention/proj",)
    config.pufferfish.keep = ("*/attention/proj",)
    return config


def use_deit_recipe(config, dataset: str) -> None:
    """Data, augmentation, optimizer and ranks of the transformers and MLPs."""
    config.epochs = 300
    config.batch_size = 1024
    config.data.mixup = 0.8
    config.data.cutmix = 1.0
    config.data.repeated_augmentation = 3
    if dataset == "imagenet":
        use_imagenet(config)
        config.data.interpolation = "bicubic"
        config.data.randaugment = "m9-mstd0.5-inc1"
        config.data.color_jitter = 0.4
        config.data.random_erasing = 0.25
    else:
        use_small_images(config, dataset)
        config.model.patch = 4

    config.model.dtype = "bfloat16"
    config.model.drop_path = 0.1
    config.loss.label_smoothing = 0.1
    config.optimizer.name = "adamw"
    config.optimizer.weight_decay = 0.05
    config.optimizer.ema = 0.99996
    config.schedule.name = "cosine"
    config.schedule.peak = 1e-3  # 5e-4 for every 512 images of a batch
    config.schedule.warmup_epochs = 5.0
    config.schedule.warmup_start = 1e-6
    config.schedule.final = 1e-5

    config.plan.rank_rule = "scaled_stable_rank+accumulative_rank"
    config.profile.enabled = True
