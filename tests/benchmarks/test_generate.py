"""``benchmarks.generate``: the table of a token's kernels."""

from __future__ import annotations

from benchmarks.generate import covered, per_token, shortened


def test_the_kernels_of_the_first_token_are_taken_away():
    whole, first = {"product": (22, 44.0), "attention": (10, 30.0)}, {"product": (2, 4.0)}
    assert per_token(whole, first, 10) == {"product": (2, 4.0), "attention": (1, 3.0)}


def test_kernels_are_sorted_and_the_rest_is_summed():
    kernels = {
        "void at::native::copy<bf16>(int)": (1, 2.0),
        "slow": (2, 9.0),
        "void (anonymous namespace)::few_tokens<1|2>": (4, 5.0),
        "small": (1, 1.0),
    }
    expected = {"slow": (2, 9.0), "few_tokens<1/2>": (4, 5.0), "2 others": (2, 3.0), "all": (8, 17.0)}
    found = shortened(kernels, most=2)
    assert found == expected
    assert list(found) == list(expected)
    assert "copy<bf16>(int)" in shortened(kernels)


def test_kernels_that_overlap_count_once():
    assert covered([(4.0, 6.0), (0.0, 2.0), (1.0, 3.0), (1.5, 2.5)]) == 5.0
    assert covered([]) == 0.0
