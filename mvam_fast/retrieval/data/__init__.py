"""Image-caption data: formats, decoding, batches for training."""
