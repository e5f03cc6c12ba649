"""The quickstart at a size for tests: seconds a run, through the switch."""

import pytest

from configs import quickstart


@pytest.fixture
def tiny_config():
    """A function that makes the configuration with some settings changed: ``tiny_config(**{"a.b": 1})``."""

    def make(**changes):
        config = quickstart.get_config()
        settings = {
            "name": "tiny",
            "epochs": 4,
            "batch_size": 16,
            "model.width": 8,
            "model.stage_sizes": (1, 1),
            "data.train_examples": 320,
            "schedule.warmup_epochs": 0.0,
            "switch.criterion": "at_epoch",
            "switch.epoch": 2,
            "plan.keep": (),
            "plan.factorize": (),
        }
        config.update_from_flattened_dict(settings | changes)
        return config

    return make
