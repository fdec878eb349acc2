"""Shards to batches on the device: order, augmentation, block reader, backends. Start at `pipeline.loader`."""
