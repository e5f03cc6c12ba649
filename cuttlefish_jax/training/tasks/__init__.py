"""What can be learnt: the classification of images, and the tasks of GLUE."""

from cuttlefish_jax.training.tasks.glue import load_glue
from cuttlefish_jax.training.tasks.images import load_images
from cuttlefish_jax.training.tasks.task import Task

__all__ = ["Task", "load_task"]


def load_task(config) -> Task:
    """The task of ``config.data.name``: a data set of images, or ``glue/<task>``.

    Args:
      config: a run's configuration.

    Raises:
      ValueError: if there is no such data set, it is not prepared, or it does not suit the settings.
    """
    kind = config.data.name.partition("/")[0]
    return load_glue(config) if kind == "glue" else load_images(config)
