"""Every setting of a run, with its default; the files in configs/ change what their experiment needs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeAlias

from ml_collections import ConfigDict

# For signatures. The attributes of a ConfigDict have no types of their own, so a checker is told nothing.
if TYPE_CHECKING:
    Config: TypeAlias = Any
else:
    Config = ConfigDict


def default_config() -> Config:
    """A locked configuration: a key that is not named here is an error, not a new setting.

    Lengths of time are in epochs, images in pixels. ``0`` and ``""`` turn an option off; in ``model`` they
    and ``()`` stand for the network's own.
    """
    config = ConfigDict()
    config.name = "unnamed"  # the experiment's; the default workdir is runs/<name>
    config.method = "cuttlefish"  # see training/method.py
    config.seed = 0
    config.epochs = 1
    config.batch_size = 128  # global: shared by all devices of all hosts
    config.parallelism = "pmap"  # the state whole on every device; or fsdp: split over them
    config.nonfinite = "stop"  # at a step with a NaN or an infinity; or skip: it changes nothing, and counts
    config.max_skipped_steps = 20  # "skip": more in a row, or all of an epoch, stop the run

    config.model = ConfigDict(
        dict(
            name="resnet18",
            dtype="float32",  # of the computation; parameters are always float32
            sync_batch_norm=False,  # batch statistics over all devices, instead of per device
            pretrained="",  # safetensors to start from: a file, a folder, or a name on the Hugging Face hub
            fresh=(),  # patterns of the parameters that these do not give, e.g. classifier/*
            unused=(),  # patterns of the tensors in them that the network has no use for
            # What the network is made of. Not every network has every option.
            width=0,  # channels of the first stage, or of every token
            depth=0,  # transformer blocks
            heads=0,  # of attention
            stage_sizes=(),  # ResNet's blocks per stage
            stem="",  # "cifar": 3x3, stride 1; "imagenet": 7x7, stride 2, max-pool
            patch=0,  # side of the patches of DeiT and ResMLP
            drop_path=0.0,  # stochastic depth: the share of samples that skip the last block
            config_file="",  # BERT: a config.json, or the folder it is in
        )
    )

    config.data = ConfigDict(
        dict(
            name="cifar10",
            data_dir="",  # where prepared TFDS data sets are; "" is TFDS's default
            train_examples=0,  # use only so many training examples; 0 is all
            validation_examples=0,  # held out of the training data to choose "best"; 0 is 5 % of it
            on_device=True,  # keep the whole data set in device memory
            workers=0,  # grain worker processes where it is not; 0 reads in threads
            # Images.
            image_size=32,  # smaller images are enlarged or padded to it
            channels=3,  # grey images are repeated to it
            crop_padding=4,  # random crops from the image padded by so many pixels; 0 is none
            flip=True,  # random horizontal flips
            mixup=0.0,  # alpha; with probability 1/2 where there is cutmix too
            cutmix=0.0,  # alpha
            repeated_augmentation=1,  # differently augmented copies of an example in an epoch that has it
            # ImageNet.
            interpolation="bilinear",  # or bicubic
            crop_ratio=0.875,  # of the image that the evaluation crops
            randaugment="",  # e.g. m9-mstd0.5-inc1
            color_jitter=0.0,  # strength, where there is no RandAugment
            random_erasing=0.0,  # probability
            # Texts.
            tokenizer="",  # a tokenizer.json, or the folder it is in; "" is that of the pre-trained weights
            max_length=128,  # tokens; longer texts are cut
            lengths=(32, 64, 128),  # batches are padded to the shortest of these that fits
        )
    )

    config.loss = ConfigDict(dict(label_smoothing=0.0))

    config.optimizer = ConfigDict(
        dict(
            name="sgd",  # or adamw
            momentum=0.9,
            nesterov=False,
            b1=0.9,  # adamw
            b2=0.999,
            weight_decay=1e-4,  # kernels only; coupled (L2) with sgd, decoupled with adamw
            frobenius_decay=0.0,  # on the products of factors, in place of their weight decay
            precondition=True,  # steps of the factors are those of their product, if no norm is between them
            clip_norm=0.0,  # global norm of the gradient
            ema=0.0,  # decay of the moving average of the parameters, evaluated in their place
            freeze=(),  # patterns of layers whose kernels are not trained
            accumulation_steps=1,  # parts that a device's batch is computed in, to save memory
        )
    )

    config.schedule = ConfigDict(
        dict(
            name="steps",  # or cosine, linear, constant
            peak=0.1,
            warmup_epochs=0.0,
            warmup_start=0.0,  # learning rate of the first warm-up epoch
            milestones=(0.5, 0.75),  # "steps": shares of the run after which the rate is cut
            decay=0.1,  # "steps": by this factor
            final=0.0,  # "cosine", "linear": rate at the end
        )
    )

    config.switch = ConfigDict(
        dict(
            criterion="relative_plateau",  # or reference_cifar, reference_resnet50, reference_deit, at_epoch
            epoch=0,  # "at_epoch": the first low-rank epoch
            deadline=0.7,  # share of the run by which the ranks should have converged
            if_never="switch",  # then (with a warning): switch at the ranks of that day, or stay full_rank
            compile_ahead=True,  # the low-rank programs in the background, when the switch is near
            rank_tolerance=0.05,  # how far ranks may be from those these were compiled for; 0: not at all
            recalibration_batches=0,  # that batch statistics are estimated on anew; 0: they adapt in training
            optimizer="carry",  # its state goes into factor space; or reset
            learning_rate="continue",  # the schedule goes on; or rewarmup, restart
            learning_rate_factor=1.0,  # on all learning rates after the switch
        )
    )

    config.plan = ConfigDict(
        dict(
            rank_rule="scaled_stable_rank",  # or another of plan/rank_rules.py, or several joined by "+"
            rank_ratio=0.25,  # "rank_ratio": rank as a share of min(m, n)
            keep=(),  # patterns of layers that stay full-rank
            factorize=(),  # patterns of layers that are factorized though the defaults keep them
            budget="",  # the share of the model to leave: parameters:0.3, flops:0.5 or, if profiled, time:0.7
            calibration_batches=0,  # that show what layers are given, for whitened SVD; 0: plain SVD
            min_rank_ratio=0.0,  # lowest rank, as a share of min(m, n)
            round_to=1,  # ranks are rounded up to a multiple of this
            extra_batch_norm=False,  # a batch norm between the factors
        )
    )

    # Which layers get faster is measured on the device before the run (the paper's K); the others are kept.
    config.profile = ConfigDict(
        dict(
            enabled=False,
            ratio=0.25,  # rank that is measured, as a share of min(m, n)
            min_speedup=1.5,  # of a stack of layers, at that rank
            min_layer_speedup=1.0,  # predicted of a layer at its own rank; 0: being smaller is enough
        )
    )

    # What the methods of these names do in place of the settings above.
    config.pufferfish = ConfigDict(
        dict(
            switch_share=80 / 300,  # of the run, trained full-rank
            rank_ratio=0.25,
            keep=(),  # patterns of layers that stay full-rank: its K
        )
    )
    config.si_fd = ConfigDict(dict(rank_ratio=0.08, frobenius_decay=1e-4, keep=()))

    config.ranks = ConfigDict(dict(method="warm"))  # from the last epoch's vectors; or lanczos, exact
    config.evaluation = ConfigDict(dict(every_epochs=1))  # and after the last epoch
    config.checkpoint = ConfigDict(
        dict(
            every_epochs=1,  # and after the last epoch
            every_steps=0,  # within an epoch; 0: only when the process is told to stop
            keep=2,  # epochs that have one
        )
    )
    return config.lock()
