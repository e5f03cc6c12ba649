"""How much faster a model gets, measured on the device: `timing` makes a `kernel_profile`, by `stacks`."""
