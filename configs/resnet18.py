"""ResNet-18 on CIFAR-10, CIFAR-100 or SVHN, as in the paper (Wang et al., MLSys 2023).

    python train.py --config configs/resnet18.py                  # CIFAR-10
    python train.py --config configs/resnet18.py:cifar100         # or :svhn, :fashion_mnist, :digits

The data set has to be prepared once; the error that you get without it has the command. Cost: 0.56 GMAC per
image forward before the switch, 300 epochs of 50,000 images; made for one GPU or TPU. Published result of
the original implementation on CIFAR-10, seed 0: 94.66 % in 2,513.8 s on one GPU.

Which stages are factorized is measured on the device. The paper's own choices are

    --config.profile.enabled=False --config.plan.keep="('stage1/*',)"
    --config.switch.criterion=reference_cifar --config.switch.learning_rate=rewarmup
    --config.switch.optimizer=reset --config.optimizer.precondition=False
"""

from configs.shared import use_small_images
from cuttlefish_jax.training.config import default_config


def get_config(dataset: str = "cifar10"):
    """The configuration for one of the data sets."""
    config = default_config()
    config.name = f"resnet18_{dataset}"
    use_cifar_recipe(config, dataset)
    config.model.name = "resnet18"
    config.optimizer.frobenius_decay = 1e-4
    config.pufferfish.keep = ("stage1/block1/*",)
    return config


def use_cifar_recipe(config, dataset: str) -> None:
    """Data, length and learning rate of the CIFAR and SVHN experiments."""
    use_small_images(config, dataset)
    config.epochs = 200 if dataset == "svhn" else 300
    config.batch_size = 1024
    config.optimizer.weight_decay = 1e-4
    config.schedule.name = "steps"
    config.schedule.warmup_start = 0.1
    config.schedule.warmup_epochs = 5.0
    config.schedule.peak = 0.8
    config.schedule.milestones = (0.5, 0.75)
    config.profile.enabled = True
