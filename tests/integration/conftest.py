"""The quickstart at a size for tests: seconds a run, through the switch."""

import jax
import pytest

from configs import quickstart


@pytest.fixture(scope="session")
def compilation_cache(tmp_path_factory):
    """A folder for compiled programs: most of these runs compile the same steps, and once is enough."""
    return str(tmp_path_factory.mktemp("compiled"))


@pytest.fixture(scope="module", autouse=True)
def quick_compilation(compilation_cache):
    """Only in these files: programs optimised otherwise give other bits, which other tests compare."""
    settings = {
        "jax_compilation_cache_dir": compilation_cache,
        "jax_persistent_cache_min_compile_time_secs": 0.2,
        # A program runs a few times here: optimising it takes longer than it saves.
        "jax_disable_most_optimizations": True,
    }
    before = {name: jax.config.values[name] for name in settings}
    for name, value in settings.items():
        jax.config.update(name, value)
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    # The jitted functions of this process were compiled in the meantime for these settings.
    jax.clear_caches()


@pytest.fixture(scope="session")
def tiny_config():
    """A function that makes the configuration with some settings changed: ``tiny_config(**{"a.b": 1})``."""

    def make(**changes):
        config = quickstart.get_config()
        settings = {
            "name": "tiny",
            "epochs": 4,
            "batch_size": 16,
            # Wide enough for the last convolution to be of low rank after two epochs, whatever the rounding.
            "model.width": 16,
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
