"""ResMLP-S36 on ImageNet, as in the paper (Wang et al., MLSys 2023).

    python train.py --config configs/resmlp_s36.py
    python train.py --config configs/resmlp_s36.py:fashion_mnist    # or :cifar10, ...: small patches

The recipe is that of ``configs/deit_base.py``, and so are the flags of the paper's own choices. Cost: 8.9
GMAC per image forward before the switch, 300 epochs of 1.28 million images in half precision; made for
sixteen GPUs or TPUs and up.
"""

from configs.deit_base import use_deit_recipe
from cuttlefish_jax.training.config import default_config


def get_config(dataset: str = "imagenet"):
    """The configuration for ImageNet or one of the small data sets."""
    config = default_config()
    config.name = f"resmlp_s36_{dataset}"
    config.model.name = "resmlp_s36"
    use_deit_recipe(config, dataset)
    # Mixing of patches is small, and not factorized in the paper.
    config.plan.keep = ("*/token_mixing",)
    config.pufferfish.keep = ("*/token_mixing",)
    return config
