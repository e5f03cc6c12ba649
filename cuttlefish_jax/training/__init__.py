"""What train.py needs: configuration, data, recipe, steps, the loop, checkpoints and reports."""
