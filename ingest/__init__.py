"""HDF5 films and CSV reports to verified shards: sources, checks, encoding, tokens, splits."""
