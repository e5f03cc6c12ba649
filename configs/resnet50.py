"""ResNet-50 on ImageNet, as in the paper (Wang et al., MLSys 2023).

    python train.py --config configs/resnet50.py
    python train.py --config configs/resnet50.py:fashion_mnist    # or :cifar10, ...: small images, small stem

ImageNet has to be prepared once; the error that you get without it has the command. Cost: 4.1 GMAC per image
forward before the switch, 90 epochs of 1.28 million images; made for eight GPUs or TPUs. Published by the
authors of the original: 76.44 % top-1 (76.00 % in another paper's table), 14.7 M of 25.6 M parameters.

Which stages are factorized is measured on the device. The paper's own choices are

    --config.profile.enabled=False --config.plan.keep="('stage1/*','stage2/*','stage3/*')"
    --config.switch.criterion=reference_resnet50 --config.switch.learning_rate=restart
    --config.switch.optimizer=reset
"""

from configs.shared import use_imagenet, use_small_images
from cuttlefish_jax.training.config import default_config


def get_config(dataset: str = "imagenet"):
    """The configuration for ImageNet or one of the small data sets."""
    config = default_config()
    config.name = f"resnet50_{dataset}"
    config.model.name = "resnet50"
    config.epochs = 90
    config.batch_size = 256
    if dataset == "imagenet":
        use_imagenet(config)
        config.model.stem = "imagenet"
    else:
        use_small_images(config, dataset)
        config.model.stem = "cifar"

    config.loss.label_smoothing = 0.1
    config.optimizer.weight_decay = 1e-4
    config.schedule.name = "steps"
    config.schedule.peak = 0.1
    config.schedule.milestones = (1 / 3, 2 / 3, 8 / 9)

    config.plan.extra_batch_norm = True
    config.plan.min_rank_ratio = 0.2
    # The last stage's shortcut is the only large one.
    config.plan.factorize = ("stage4/block1/shortcut_conv",)
    config.profile.enabled = True
    config.pufferfish.keep = ("stage1/*", "stage2/*", "stage3/*")
    config.pufferfish.switch_share = 10 / 90
    return config
