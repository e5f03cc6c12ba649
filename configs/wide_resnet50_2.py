"""WideResNet-50-2 on ImageNet, as in the paper (Wang et al., MLSys 2023).

    python train.py --config configs/wide_resnet50_2.py
    python train.py --config configs/wide_resnet50_2.py:fashion_mnist    # or :cifar10, ...

The recipe is that of ``configs/resnet50.py``, and so are the flags of the paper's own choices. Cost: 11.4
GMAC per image forward before the switch, 90 epochs of 1.28 million images; made for eight GPUs or TPUs.
"""

from configs import resnet50


def get_config(dataset: str = "imagenet"):
    """The configuration for ImageNet or one of the small data sets."""
    config = resnet50.get_config(dataset)
    config.name = f"wide_resnet50_2_{dataset}"
    config.model.name = "wide_resnet50_2"
    config.pufferfish.switch_share = 6 / 90
    return config
