"""What reaches the driver in a launch; the driver itself is a stand-in that reads the structures."""

from __future__ import annotations

import ctypes
import sys
from concurrent.futures import ThreadPoolExecutor
from ctypes import Structure, c_int, c_ubyte, c_void_p

import pytest

from prox24_lightning.convert.kernels.cuda_driver import PreparedLaunch


class Parameters(Structure):
    _fields_ = (("map", c_ubyte * 16), ("x", c_void_p), ("y", c_void_p), ("rows", c_int), ("columns", c_int))


class Config(Structure):  # CUlaunchConfig
    _fields_ = (
        ("sizes", ctypes.c_uint * 7),
        ("stream", c_void_p),
        ("attributes", c_void_p),
        ("count", ctypes.c_uint),
    )


class Driver:
    """Copies what a launch points to, as the driver does."""

    def __init__(self):
        self.seen = []

    def __call__(self, config, function, pointers, extra):
        config = Config.from_address(config)
        addresses = (c_void_p * 5).from_address(pointers)
        values = (
            bytes((c_ubyte * 16).from_address(addresses[0])),
            *(c_void_p.from_address(address).value for address in addresses[1:3]),
            *(c_int.from_address(address).value for address in addresses[3:]),
        )
        self.seen.append((tuple(config.sizes), config.stream, config.attributes, config.count, function.value, values))
        return 0


def tensor_map(number):
    return (c_ubyte * 16)(*[number] * 16)


def test_every_launch_passes_its_own_grid_stream_and_arguments():
    driver = Driver()
    launch = PreparedLaunch(driver, c_void_p(7), Parameters, 256, 1024, (99, 1))
    assert launch((3, 2, 1), 11, (tensor_map(1), 1 << 40, 0, 5, 6)) == 0
    assert launch((4, 1, 1), 0, (tensor_map(2), 2 << 40, 3 << 40, 7, 8)) == 0
    sizes = (256, 1, 1, 1024)
    assert driver.seen == [
        ((3, 2, 1, *sizes), 11, 99, 1, 7, (bytes([1] * 16), 1 << 40, None, 5, 6)),
        ((4, 1, 1, *sizes), None, 99, 1, 7, (bytes([2] * 16), 2 << 40, 3 << 40, 7, 8)),
    ]


@pytest.fixture
def busy_threads():
    """Threads that take turns after every few instructions."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval)


def test_threads_that_launch_one_kernel_do_not_mix_their_arguments(busy_threads):
    driver = Driver()
    launch = PreparedLaunch(driver, c_void_p(7), Parameters, 32, 0, (None, 0))

    def many(number):
        for _ in range(200):
            launch((number, number, number), number, (tensor_map(number), number, number, number, number))

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(many, range(1, 5)))
    assert len(driver.seen) == 800
    for (x, y, z, *_), stream, _, _, _, values in driver.seen:
        assert {x, y, z, stream, *values[1:]} == {x}
        assert values[0] == bytes([x] * 16)
