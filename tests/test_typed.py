"""Values that anyone may have written into a file: each reader gives the value, or says what is wrong with it."""

import json
import math
import os
import socket

import pytest
from helpers import ODD_VALUES

from tailorcli import typed
from tailorcli.errors import CheckpointError
from tailorcli.files import open_regular, parse_json, read_json, require_file

NUMBERS = [math.nan, math.inf, -math.inf, 10**400, True, "1", None, [1]]


@pytest.mark.parametrize("value", NUMBERS)
def test_only_a_finite_number_is_a_number(value):
    for read in (typed.read_number, typed.read_amount, typed.read_count):
        with pytest.raises(ValueError, match="expected"):
            read(value)


@pytest.mark.parametrize("value", NUMBERS[:4])
def test_what_is_plain_holds_finite_numbers_alone(value):
    typed.require_plain({"a": [True, None, "1", 1.5, {"b": []}]})
    with pytest.raises(ValueError, match="finite"):
        typed.require_plain({"a": [{"b": value}]})


def nested(depth):
    return "[" * depth + "]" * depth


@pytest.mark.parametrize("depth", [70, 900, 5000, 2_000_000])
def test_a_value_nested_without_end_is_refused_and_not_followed(depth, tmp_path):
    with pytest.raises(ValueError, match="nested"):
        parse_json(nested(depth))
    (tmp_path / "config.json").write_text(f'{{"a": {nested(depth)}}}')
    with pytest.raises(CheckpointError, match="nested"):
        read_json(tmp_path / "config.json")
    assert parse_json(nested(60)) is not None


@pytest.mark.parametrize("text", ['{"a": "\\ud800"}', '{"\\udfff": 1}', '[["\\udc80"]]'])
def test_half_a_character_is_no_text(text):
    with pytest.raises(ValueError, match="surrogate"):
        parse_json(text)
    assert parse_json('"\\ud83d\\ude00"') == "\U0001f600"  # a whole one, in two escapes


def test_a_config_may_name_infinity_and_our_own_files_may_not():
    assert parse_json('{"time_step_limit": [0.0, Infinity]}')["time_step_limit"][1] == math.inf
    with pytest.raises(ValueError, match="finite"):
        typed.require_plain(parse_json('{"a": Infinity}'))


@pytest.mark.parametrize("value", ODD_VALUES, ids=repr)
def test_every_reader_gives_a_value_of_its_type_or_refuses_it(value):
    types = {
        typed.read_text: str,
        typed.read_count: int,
        typed.read_number: (int, float),
        typed.read_flag: bool,
        typed.read_shape: tuple,
        typed.list_of(typed.read_count): tuple,
        typed.read_object: dict,
        typed.one_of("F32", "BF16"): str,
    }
    for read, kind in types.items():
        try:
            found = read(value)
        except ValueError:
            continue
        assert isinstance(found, kind)
        json.dumps(found, allow_nan=False, ensure_ascii=False).encode()


def test_an_index_is_below_its_bound():
    assert typed.read_index(4, 5) == 4
    for value in (5, 10**12, -1, True, 1.0):
        with pytest.raises(ValueError, match="expected"):
            typed.read_index(value, 5)


def test_pipes_devices_and_odd_names_are_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / "socket"))
    (tmp_path / "link").symlink_to("/dev/zero")
    for name in ("pipe", "socket", "link"):
        with pytest.raises(OSError, match="a pipe or a device"):
            open_regular(tmp_path / name)
        with pytest.raises(CheckpointError, match="a pipe or a device"):
            require_file(tmp_path / name)
        with pytest.raises(CheckpointError, match="a pipe or a device"):
            read_json(tmp_path / name)
    for name in ("a\0b", "\ud800"):
        with pytest.raises(OSError, match="no file can have this name"):
            open_regular(tmp_path / name)
    with pytest.raises(IsADirectoryError):
        open_regular(tmp_path)
