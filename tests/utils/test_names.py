"""Repeated names become one pattern; what tells layers apart stays."""

from __future__ import annotations

import pytest

from prox24_lightning.utils.names import collapse_names, numbers_as_wildcards


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
