"""Names, nesting and sampling of subnets."""

from collections import Counter

import pytest

from dspnet_fast.errors import InputError
from dspnet_fast.models import family, subnet
from dspnet_fast.subnets import Family, make_divisible, sandwich, width_name

WIDTHS = ("w0.50", "w0.625", "w0.75", "w0.875", "w1.00")


@pytest.mark.parametrize(
    ("channels", "expected"), [(12, 16), (15, 16), (11, 16), (8.8, 8), (9, 16), (18, 24), (42, 40), (3, 8), (960, 960)]
)
def test_make_divisible_rounds_to_multiples_of_8(channels, expected):
    assert make_divisible(channels) == expected


@pytest.mark.parametrize(
    ("name", "channels"),
    [
        ("w0.50", (16, 8, 16, 24, 40, 56, 80, 480)),
        ("w0.625", (16, 16, 16, 24, 48, 72, 104, 600)),
        ("w0.75", (16, 16, 24, 32, 64, 88, 120, 720)),
        ("w0.875", (16, 16, 24, 32, 72, 96, 144, 840)),
        ("w1.00", (16, 16, 24, 40, 80, 112, 160, 960)),
    ],
)
def test_mobilenet_v3_channels_follow_from_the_width(name, channels):
    assert subnet("mobilenet_v3_large", name).channels == channels


def test_spellings_of_a_width_have_one_name():
    assert [subnet("mobilenet_v3_large", name).name for name in ("w.5", "w0.5", "w0.500", "w1", "w0.6250")] == [
        "w0.50",
        "w0.50",
        "w0.50",
        "w1.00",
        "w0.625",
    ]
    assert width_name(0.0625) == "w0.0625"


def test_resnet_name_gives_channels_and_depths():
    assert subnet("resnet", "c64-d3463").channels == (64, 64, 128, 256, 512)
    assert subnet("resnet", "c64-d3463").depths == (3, 4, 6, 3)
    assert subnet("resnet", "c32-d3.4.23.3").depths == (3, 4, 23, 3)


@pytest.mark.parametrize(
    ("network", "name"),
    [("resnet", "w0.50"), ("resnet", "c64-d222"), ("resnet", "c0-d2222"), ("resnet", "c64-d2022")]
    + [("mobilenet_v3_large", name) for name in ("c64-d2222", "w", "w0", "0.5", "w-1", "wide")],
)
def test_unknown_subnet_name_is_rejected(network, name):
    with pytest.raises(InputError, match="named by"):
        subnet(network, name)


def test_family_is_sorted_from_smallest_to_full():
    made = family("mobilenet_v3_large", ["w1.00", "w0.50", "w0.75"])
    assert made.names == ("w0.50", "w0.75", "w1.00")
    assert (made.smallest.name, made.full.name, len(made)) == ("w0.50", "w1.00", 3)
    assert made.find("w0.75") is made[1]
    with pytest.raises(InputError, match=r"w0.60.*it has w0.50, w0.75, w1.00"):
        made.find("w0.60")


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["c64-d3463", "c96-d2222"], r"does not nest: c64-d3463 is no prefix of the largest, c96-d2222"),
        (["c64-d2222", "c64-d2222"], "are the same network"),
        ([], "at least one"),
    ],
)
def test_invalid_family_is_rejected(names, message):
    with pytest.raises(InputError, match=message):
        family("resnet", names)


def test_widths_with_equal_channels_are_rejected_as_one_network():
    with pytest.raises(InputError, match="w1.00 and w0.999 are the same network"):
        family("mobilenet_v3_large", ["w1.00", "w0.999"])


def test_sandwich_starts_with_smallest_and_ends_with_full():
    made = family("mobilenet_v3_large", WIDTHS)
    for step in range(50):
        names = [dn.name for dn in sandwich(made, 4, seed=1, step=step)]
        assert names[0] == "w0.50" and names[-1] == "w1.00" and len(set(names)) == 4


def test_sandwich_depends_on_seed_and_step_only():
    made = family("mobilenet_v3_large", WIDTHS)
    drawn = [sandwich(made, 4, seed=3, step=step) for step in range(100)]
    assert drawn == [sandwich(made, 4, seed=3, step=step) for step in range(100)]
    assert drawn != [sandwich(made, 4, seed=4, step=step) for step in range(100)]
    assert len({tuple(dn.name for dn in step) for step in drawn}) == 6


def test_sandwich_draws_random_subnets_uniformly():
    made = family("mobilenet_v3_large", WIDTHS)
    counts = Counter(dn.name for step in range(3000) for dn in sandwich(made, 3, seed=0, step=step)[1:-1])
    assert set(counts) == {"w0.625", "w0.75", "w0.875"}
    assert all(900 < count < 1100 for count in counts.values())  # 1000 +- 4 standard deviations


@pytest.mark.parametrize(("members", "count", "expected"), [(1, 4, 1), (2, 4, 2), (5, 2, 2), (5, 9, 5)])
def test_sandwich_has_count_subnets_or_the_whole_family(members, count, expected):
    made = family("mobilenet_v3_large", WIDTHS[-members:])
    assert len(sandwich(made, count, seed=0, step=0)) == expected


def test_sandwich_of_one_subnet_is_rejected():
    with pytest.raises(InputError, match="at least"):
        sandwich(family("mobilenet_v3_large", WIDTHS), 1, seed=0, step=0)


def test_only_member_of_a_family_is_smallest_and_full():
    only = Family([subnet("resnet", "c8-d1111")])
    assert only.smallest is only.full
