"""The shard format: schema, writer, index, manifest, reader, verify. No torch, no DALI. `FORMAT.md` shows the bytes."""
