"""``python -m cuttlefish_jax`` is the command ``cuttlefish``."""

from cuttlefish_jax.command.main import run

if __name__ == "__main__":
    run()
