"""Repeated names become one pattern; what tells layers apart stays."""

from __future__ import annotations

import pytest

from prox24_lightning.utils.names import collapse_names, common_start, numbers_as_wildcards, shorten, shorten_all


@pytest.mark.parametrize(
    ("name", "pattern"),
    [
        ("layers.3.up.weight", "layers.*.up.weight"),
        ("0.weight", "*.weight"),
        ("net.2", "net.2"),
        ("conv2d.weight", "conv2d.weight"),
        ("h.1.mlp.12.up", "h.*.mlp.*.up"),
    ],
)
def test_numbers_become_wildcards(name, pattern):
    assert numbers_as_wildcards(name) == pattern


def test_names_that_differ_in_numbers_share_a_pattern():
    assert collapse_names(["layers.0.up", "layers.1.up", "head"]) == "layers.*.up x 2, head"


def test_more_than_three_patterns_are_counted():
    assert collapse_names(["a", "b", "c", "d", "e"]) == "a, b, c and 2 more"


def test_the_model_itself_has_a_name():
    assert collapse_names([""]) == "(the model)"


@pytest.mark.parametrize(
    ("width", "short"), [(40, "model.layers.0.mlp.up_proj"), (16, "mod….mlp.up_proj"), (8, "m…p_proj")]
)
def test_a_name_is_cut_in_the_middle(width, short):
    assert shorten("model.layers.0.mlp.up_proj", width) == short
    assert len(short) <= width


def test_names_that_would_read_the_same_are_cut_less():
    names = [f"model.{part}.layers.0.up" for part in ("vision", "text")]
    short = shorten_all(names, 8)
    assert len(set(short.values())) == 2
    assert shorten_all(["a.b", "a.c"], 8) == {"a.b": "a.b", "a.c": "a.c"}
    assert shorten_all([], 8) == {}


@pytest.mark.parametrize(
    ("names", "start"),
    [
        (["model.layers.0.up", "model.layers.1.up"], "model.layers."),
        (["model.layers.0.up", "model.layers.0.down"], "model.layers.0."),
        (["up", "down"], ""),
        (["model.up"], ""),
        ([], ""),
    ],
)
def test_what_all_names_begin_with(names, start):
    assert common_start(names) == start
