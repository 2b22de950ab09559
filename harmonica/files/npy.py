"""Headers of numpy arrays in files, read before anything else is."""

import math
from typing import IO

import numpy as np

_HEADERS = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}


class Pickled(ValueError):
    """The array is made of Python objects."""


def read_header(file: IO[bytes], size: int) -> tuple[tuple[int, ...], np.dtype, int]:
    """Shape, type and offset of the array in a file of ``size`` bytes, in C order.

    Raises:
        Pickled: it would have to be unpickled.
        ValueError: it is no array, or not a whole one.
    """
    version = np.lib.format.read_magic(file)
    if version not in _HEADERS:
        raise ValueError(f"npy format {version} is not known")
    try:
        shape, is_fortran, dtype = _HEADERS[version](file)
    except OSError:
        raise
    except Exception as error:  # the header is Python text, parsed by several parsers
        raise ValueError(f"its header is malformed ({type(error).__name__})") from None
    if dtype.hasobject:
        raise Pickled("pickled objects are never loaded; save plain arrays")
    if is_fortran and len(shape) > 1:
        raise ValueError("it is in Fortran order; save it in C order")
    if dtype.itemsize == 0:
        raise ValueError("its numbers are of no size")
    start = file.tell()
    if any(side < 0 for side in shape) or size - start != math.prod(shape) * dtype.itemsize:
        raise ValueError("it is shorter or longer than its header says")
    return shape, dtype, start
