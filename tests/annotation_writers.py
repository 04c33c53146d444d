"""What annotation tools would have written for given masks: small writers for the tests of the importers."""
import numpy as np


def bits(value, n): return f"{int(value):0{n}b}"


def brush_rle(mask):
    "A mask in Label Studio's brush format: runs where a value repeats, else values one by one"
    flat = np.repeat(np.asarray(mask, bool).ravel(), 4).astype(int) * 255
    stream = bits(len(flat), 32) + bits(7, 5) + "".join(bits(n - 1, 4) for n in (3, 4, 8, 16))
    starts = np.flatnonzero(np.diff(flat, prepend=-1))
    for start, end in zip(starts, [*starts[1:], len(flat)]):
        for first in range(start, end, 2**16):
            n = min(2**16, end - first)
            size = next(i for i, b in enumerate((3, 4, 8, 16)) if n <= 2**b)
            if n > 2: stream += "1" + bits(size, 2) + bits(n - 1, (3, 4, 8, 16)[size]) + bits(flat[first], 8)
            else: stream += "0" + bits(0, 2) + bits(n - 1, 3) + bits(flat[first], 8) * n
    stream += "0" * (-len(stream) % 8)
    return [int(stream[i:i + 8], 2) for i in range(0, len(stream), 8)]
