"""VGG-19 with batch norms on CIFAR-10, CIFAR-100 or SVHN, as in the paper (Wang et al., MLSys 2023).

    python train.py --config configs/vgg19.py                  # CIFAR-10
    python train.py --config configs/vgg19.py:svhn             # or :cifar100, :fashion_mnist, :digits

The data set has to be prepared once; the error that you get without it has the command. Cost: 0.40 GMAC per
image forward before the switch, 300 epochs of 50,000 images (SVHN: 200 of 73,257); made for one GPU or TPU.
On SVHN a batch norm stands between the factors, as in the paper.

Which stages are factorized is measured on the device. The paper's own choices are

    --config.profile.enabled=False --config.plan.keep="('stage1/*','stage2/*')"
    --config.switch.criterion=reference_cifar --config.switch.learning_rate=rewarmup
    --config.switch.optimizer=reset --config.optimizer.precondition=False
"""

from configs.resnet18 import use_cifar_recipe
from cuttlefish_jax.training.config import default_config


def get_config(dataset: str = "cifar10"):
    """The configuration for one of the data sets."""
    config = default_config()
    config.name = f"vgg19_{dataset}"
    use_cifar_recipe(config, dataset)
    config.model.name = "vgg19"
    config.plan.extra_batch_norm = dataset == "svhn"
    # Its first nine convolutions are full-rank.
    config.pufferfish.keep = ("stage1/*", "stage2/*", "stage3/*", "stage4/conv1")
    return config
