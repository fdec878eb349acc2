"""Try to decode each image before a backend that fails a batch as a whole gets it, the first time it is seen.

With libjpeg-turbo and Pillow, as the `cpu` backend does, so that all backends call the same images bad. It costs a
decode on the CPU for each image of the first epoch; none later, and none where no bad sample is tolerated.
"""

from pipeline.encoded import Encoded, EncodedBatches
from pipeline.kernels import ImageKernel, Normalise
from shards.schema import Manifest


class Trial:
    """Replaces what cannot be decoded. One bit a sample remembers what was tried."""

    def __init__(self, manifest: Manifest, batches: EncodedBatches) -> None:
        self._batches = batches
        self._kernel = ImageKernel(manifest.image, size=1, normalise=Normalise((0, 0, 0), (1, 1, 1)))
        self._tried: dict[int, bytearray] = {}

    def run(self, encoded: Encoded) -> None:
        """Try each image of a batch that was not tried before."""
        for index in range(len(encoded)):
            while not self._is_known(*_place(encoded, index)):
                try:
                    self._kernel.decode(encoded.images[index])
                except ValueError as error:
                    self._batches.replace(encoded, index, error)
                else:
                    self._remember(*_place(encoded, index))

    def _is_known(self, shard: int, row: int) -> bool:
        bits = self._tried.get(shard, b"")
        return row >> 3 < len(bits) and bool(bits[row >> 3] >> (row & 7) & 1)

    def _remember(self, shard: int, row: int) -> None:
        bits = self._tried.setdefault(shard, bytearray())
        bits.extend(bytes(max(0, (row >> 3) + 1 - len(bits))))
        bits[row >> 3] |= 1 << (row & 7)


def _place(encoded: Encoded, index: int) -> tuple[int, int]:
    """Shard and row of a sample."""
    record = encoded.records[index]
    return int(record["shard"]), int(record["row"])
