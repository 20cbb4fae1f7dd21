"""Reading ahead: in order, on another thread, and never at the cost of peak memory."""

from concurrent.futures import wait
from threading import Barrier

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tailorcli.checkpoint.readahead import SPARE_BYTES, ReadAhead

MIB = 1 << 20


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 4000), st.integers(1, 4000)).map(sorted), min_size=1, max_size=12),
    st.integers(1, 3),
)
def test_what_is_read_ahead_fits_beside_what_is_worked_on(sizes, threads):
    """Held and read ahead together stay below the fullest single position, but for the bytes to spare."""
    held_and_loaded = [(held * MIB, loaded * MIB) for loaded, held in sizes]
    most = max(held for held, _ in held_and_loaded) + SPARE_BYTES
    started = []
    reader = ReadAhead(lambda position: started.append(position) or position, held_and_loaded, threads)
    for position, value in enumerate(reader):
        assert value == position
        wait([reader._pool.submit(lambda: None), *reader._loading])  # whatever was queued before it has been read
        ahead = [held_and_loaded[other][1] for other in started if other > position]
        assert held_and_loaded[position][0] + sum(ahead) <= most
        assert len(ahead) <= threads
    assert sorted(started) == list(range(len(sizes)))
    reader.close()


def test_small_tensors_are_read_ahead():
    started = []
    reader = ReadAhead(started.append, [(MIB, MIB)] * 3)
    loads = iter(reader)
    next(loads)
    reader._pool.submit(lambda: None).result()
    assert started == [0, 1]
    reader.close()


def test_threads_load_side_by_side_and_in_order():
    together = Barrier(3, timeout=30)  # none goes on before all three are here

    def load(position):
        together.wait()
        return position

    reader = ReadAhead(load, [(MIB, MIB)] * 6, threads=3)
    assert list(reader) == [0, 1, 2, 3, 4, 5]
    reader.close()


def test_an_error_of_the_reader_comes_where_its_tensor_is_wanted():
    def load(position):
        if position == 1:
            raise ValueError("torn")
        return position

    reader = ReadAhead(load, [(MIB, MIB)] * 3)
    loads = iter(reader)
    assert next(loads) == 0
    with pytest.raises(ValueError, match="torn"):
        next(loads)
    reader.close()
