"""Images: the data sets, decoding, and augmentation on the host and on the device."""
