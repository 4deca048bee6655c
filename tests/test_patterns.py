"""Slices, blocks, N:M and single weights: labels on weights small enough to write down."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pruningawaretraining.errors import ConfigError, ModelError
from pruningawaretraining.groups.grouping import Grouping, GroupSet, Member
from pruningawaretraining.groups.views import entry_vectors, fill_groups, fold_of, slot_counts, slot_maxima, slot_sums
from pruningawaretraining.masks.view_writer import kept_of_members
from pruningawaretraining.patterns.block import Block, NofM, Unstructured
from pruningawaretraining.patterns.slice import Slice, pruned_channels
from pruningawaretraining.patterns.stacking import Claim, check_stacking
from pruningawaretraining.registry import build


def groups_of(grouping: Grouping) -> list[Any]:
    """The group of every weight of the first member, -1 outside."""
    (member, first), *_ = grouping.expand(torch.arange(grouping.size), outside=-1)
    labels: list[Any] = first.expand(member.parameter.shape).tolist()
    return labels


def linear(outputs: int, inputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, outputs))


LINEAR_4_BY_4 = {
    "2x1": [[0, 1, 2, 3], [0, 1, 2, 3], [4, 5, 6, 7], [4, 5, 6, 7]],
    "1x2": [[0, 0, 1, 1], [2, 2, 3, 3], [4, 4, 5, 5], [6, 6, 7, 7]],
    "2x2": [[0, 0, 1, 1], [0, 0, 1, 1], [2, 2, 3, 3], [2, 2, 3, 3]],
    "3x1": [[0, 1, 2, 3], [0, 1, 2, 3], [0, 1, 2, 3], [4, 5, 6, 7]],  # the last block is padded
    "1x3": [[0, 0, 0, 1], [2, 2, 2, 3], [4, 4, 4, 5], [6, 6, 6, 7]],
    "8x1": [[0, 1, 2, 3]] * 4,
    "channelx1": [[0, 1, 2, 3]] * 4,
    "1xchannel": [[0] * 4, [1] * 4, [2] * 4, [3] * 4],
    "1x1": [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11], [12, 13, 14, 15]],
    "2:4": [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11], [12, 13, 14, 15]],
}


@pytest.mark.parametrize("spec", LINEAR_4_BY_4)
def test_blocks_of_a_linear_layer(spec: str) -> None:
    assert groups_of(build("pattern", spec).build(linear(4, 4))) == LINEAR_4_BY_4[spec]


CONV_1_BY_2_BY_2_BY_2 = {  # [input][row][column] of one filter: the matrix has kernel positions first, then inputs
    "1x1": [[[0, 1], [2, 3]], [[4, 5], [6, 7]]],
    "1x2": [[[0, 1], [2, 3]], [[0, 1], [2, 3]]],  # both inputs at one kernel position
    "1x4": [[[0, 0], [1, 1]], [[0, 0], [1, 1]]],  # both inputs in one kernel row
    "1x8": [[[0, 0], [0, 0]], [[0, 0], [0, 0]]],
    "1x3": [[[0, 1], [2, 3]], [[0, 1], [2, 3]]],  # stops at the end of a position
    "1x16": [[[0, 0], [0, 0]], [[0, 0], [0, 0]]],
    "channelx1": [[[0, 1], [2, 3]], [[4, 5], [6, 7]]],
    "1xchannel": [[[0, 0], [0, 0]], [[0, 0], [0, 0]]],
}


@pytest.mark.parametrize("spec", CONV_1_BY_2_BY_2_BY_2)
def test_blocks_of_a_convolution_are_read_channels_last(spec: str) -> None:
    model = nn.Sequential(nn.Conv2d(2, 1, 2))
    assert groups_of(build("pattern", spec).build(model)) == [CONV_1_BY_2_BY_2_BY_2[spec]]


def test_output_rows_of_a_convolution_are_pruned_too() -> None:
    assert groups_of(Block(1, 0).build(nn.Sequential(nn.Conv2d(2, 3, 1)))) == [
        [[[row]], [[row]]] for row in range(3)
    ]  # fmt: skip


def test_transposed_convolutions_have_their_outputs_in_the_second_dimension() -> None:
    grouping = Block(2, 1).build(nn.Sequential(nn.ConvTranspose2d(2, 4, 1)))
    assert groups_of(grouping) == [[[[0]], [[0]], [[1]], [[1]]], [[[2]], [[2]], [[3]], [[3]]]]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"order": "interleaved"}, [0, 1, 0, 1, -1]),
        ({"order": "contiguous"}, [0, 0, 1, 1, -1]),
    ],
)
def test_slices_take_filters_in_order_and_leave_the_remainder_whole(
    options: dict[str, Any], expected: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "pruningawaretraining"):
        grouping = Slice(block_size=2, **options).build(nn.Sequential(nn.Conv2d(1, 5, 1)))
    assert [value[0][0][0] for value in groups_of(grouping)] == expected
    assert [record.getMessage() for record in caplog.records] == [
        "0: the last 1 of 5 filters fill no block of 2 and stay whole"
    ]


@pytest.mark.parametrize(
    ("kernel", "first_tap", "expected"),
    [
        ((2, 3), False, [[0, 1, 2], [3, 4, 5]]),
        ((2, 3), True, [[-1, 0, 1], [-1, 2, 3]]),  # the first of each row along the width, not modulo the height
        ((3, 2), True, [[-1, 0], [-1, 1], [-1, 2]]),
    ],
)
def test_slices_spare_the_first_tap_of_each_row(
    kernel: tuple[int, int], first_tap: bool, expected: list[list[int]]
) -> None:
    grouping = Slice(block_size=2, first_tap=first_tap).build(nn.Sequential(nn.Conv2d(1, 2, kernel)))
    assert groups_of(grouping) == [[expected]] * 2


def test_depthwise_slices_have_a_block_size_of_their_own() -> None:
    model = nn.Sequential(nn.Conv2d(4, 4, 1, groups=4), nn.Conv2d(4, 8, 1))
    grouping = Slice(block_size=8, depthwise_block_size=2).build(model)
    assert [one.size for one in grouping.sets] == [2, 4]
    assert [value[0][0][0] for value in groups_of(grouping)] == [0, 1, 0, 1]


def test_slices_are_for_convolutions_unless_linear_layers_are_named() -> None:
    model = nn.Sequential(nn.Conv2d(1, 8, 1), nn.Linear(3, 8))
    assert [one.name for one in Slice().build(model).sets] == ["0"]
    assert [one.name for one in Slice().build(model, ["1"]).sets] == ["1"]


@pytest.mark.parametrize(
    ("layer", "options", "message"),
    [
        (nn.Conv2d(1, 4, 1), {"block_size": 8}, "its 4 filters are fewer than the 8 of a block"),
        (nn.Conv2d(1, 8, 1), {"first_tap": True}, "every position of its kernel is the first of a row"),
    ],
)
def test_layers_without_slices(layer: nn.Module, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        Slice(**options).build(nn.Sequential(layer))


CHANNELS = [
    # filters that are zero, inputs that are zero, of interleaved slices over filters {0, 2} and {1, 3}
    ([], [], [0, 0, 0, 0]),
    ([0], [], [0, 0, 0, 0]),
    ([0, 2], [], [1, 1, 0, 0]),
    ([], [1], [0, 1, 0, 1]),
    ([0, 2], [1], [1, 1, 0, 1]),
]


@pytest.mark.parametrize(("filters", "inputs", "expected"), CHANNELS)
def test_slices_of_pruned_channels(filters: list[int], inputs: list[int], expected: list[int]) -> None:
    model = nn.Sequential(nn.Conv2d(2, 4, 1))
    with torch.no_grad():
        model[0].weight.fill_(1.0)
        model[0].weight[filters] = 0
        model[0].weight[:, inputs] = 0
    assert pruned_channels(Slice(block_size=2).build(model)).int().tolist() == expected


def test_a_slice_that_was_pruned_itself_makes_no_pruned_channel() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 1))
    grouping = Slice(block_size=2).build(model)
    with torch.no_grad():
        model[0].weight.zero_()
    assert pruned_channels(grouping).tolist() == [True]
    assert pruned_channels(grouping, torch.tensor([False])).tolist() == [False]


def test_sums_that_cancel_are_no_pruned_channel() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, (1, 2)))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([1.0, -1.0]).expand(2, 1, 1, 2))
    assert not pruned_channels(Slice(block_size=2).build(model)).any()


def test_layers_are_chosen_by_name_and_class() -> None:
    model = nn.ModuleDict({"conv": nn.Conv1d(4, 4, 1), "fc1": nn.Linear(4, 4), "fc": nn.Linear(4, 4)})
    names = lambda **options: [one.name for one in Block(**options).build(model).sets]  # noqa: E731
    assert names() == ["conv", "fc1", "fc"]
    assert names(types=("Linear",)) == ["fc1", "fc"]
    assert names(spare_last=True) == ["conv", "fc1"]
    assert [one.name for one in Block(spare_last=True).build(model, ["fc"]).sets] == ["fc"]
    assert [one.name for one in Block().build(model, exclude=["fc"]).sets] == ["conv", "fc1"]


def test_a_shared_weight_is_labelled_once() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[1].weight = model[0].weight
    assert [member.name for member in Unstructured().build(model).members] == ["0.weight"]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("4y1", "pattern.type: '4y1' is not known"),
        ("0x1", "pattern: '0x1' has a block of 0"),
        ("4:4", "pattern: drop: 4 of 4 leaves nothing. Allowed: 1 to 3"),
        ("0:4", "pattern: drop: 0 must be a whole number of 1 or more"),
        ({"type": "block", "row": 4}, "did you mean 'rows'"),
        ({"type": "slice", "order": "interleved"}, "did you mean 'interleaved'"),
    ],
)
def test_patterns_that_are_refused(spec: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build("pattern", spec)


def test_a_class_that_is_no_layer() -> None:
    with pytest.raises(ConfigError, match="types: 'Liner' is not known; did you mean 'Linear'"):
        Block(types=("Liner",)).build(linear(4, 4))


def test_n_of_m_leaves_layers_that_are_too_narrow(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Sequential(nn.Conv2d(2, 8, 3), nn.Conv2d(8, 8, 3))
    with caplog.at_level(logging.INFO, "pruningawaretraining"):
        assert [one.name for one in NofM(2, 4).build(model).sets] == ["1"]
    assert "0 stays as it is: its 2 inputs are no more than the 2 that a window keeps" in caplog.text


@pytest.mark.parametrize(
    "spec", ["4x1", "3x1", "1x3", "2x2", "channelx1", "1xchannel", "1x1", "1x12", {"type": "slice", "first_tap": True},
             {"type": "slice", "order": "contiguous", "block_size": 3}],
    ids=str,
)  # fmt: skip
def test_folded_and_general_reductions_agree(spec: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Conv2d(6, 8, (2, 3)), nn.Conv2d(8, 8, 3, groups=8), nn.ConvTranspose2d(8, 12, 2))
    model[0].weight.data = model[0].weight.data.to(memory_format=torch.channels_last)
    grouping = build("pattern", spec).build(model)
    for member in grouping.members:
        values = torch.randn(member.parameter.shape, generator=generator)
        assert torch.allclose(slot_sums(member, values), member.slot_sums(values), atol=1e-5)
        chosen = torch.rand(member.n_slots, generator=generator) < 0.5
        by_fold = torch.ones_like(values)
        fill_groups(member, by_fold, chosen, 0.0)
        assert torch.equal(by_fold, (~member.spread(chosen, 0.0).bool()).float().expand(values.shape))
        rows = entry_vectors(member, values)
        assert torch.allclose(rows.sum(1), member.slot_sums(values), atol=1e-5)
        assert torch.allclose(slot_counts(member).expand(member.sizes).reshape(-1),
                              member.slot_sums(torch.ones_like(values)))  # fmt: skip
        largest = torch.stack([part.max() for part in _by_slot(member, values)])
        assert torch.equal(slot_maxima(member, values), largest)
    assert any(fold_of(member) for member in grouping.members)


@pytest.mark.parametrize(
    ("labels", "size", "shape"),
    [
        ([0, 0, 1, 1, 0, 0, 1, 1], 2, (2, 2, 2)),  # runs that come in turns, as heads of packed projections
        ([0, 0, 0, 1, 1, 1], 2, (2, 3)),
        ([0, 1, 0, 1, 0, 1], 2, (3, 2)),
        ([2, 0, 0, 1, 1, 2], 2, (2, 2)),  # the ends are outside
        ([0, 0, 0], 1, (1, 3)),
        ([], 0, (0,)),
        ([0, 0, 1], 2, None),
        ([1, 1, 0, 0], 2, None),
        ([0, 1, 1, 0], 2, None),
    ],
)
def test_labels_that_a_view_can_fold(labels: list[int], size: int, shape: tuple[int, ...] | None) -> None:
    values = torch.randn(len(labels), 3, generator=torch.Generator().manual_seed(0))
    member = Member("weight", values, (torch.tensor(labels, dtype=torch.int64), None), (size, 1))
    fold = fold_of(member)
    assert (fold.shape[:-1] if fold is not None else None) == shape
    assert torch.allclose(slot_sums(member, values), member.slot_sums(values), atol=1e-6)


def test_kept_groups_are_counted_by_sets_or_by_members() -> None:
    weights = [torch.zeros(4, 1), torch.zeros(6, 1)]
    labels = [((torch.arange(len(one)), None), (len(one), 1)) for one in weights]
    members = tuple(
        Member(str(start), weight, *label, offset=start)
        for start, weight, label in zip((0, 4), weights, labels, strict=True)
    )
    keep = torch.tensor([1, 1, 0, 1, 0, 0, 0, 1, 1, 0]).bool()
    by_sets = Grouping("own", members, (GroupSet("0", 0, 4), GroupSet("4", 4, 10)))
    assert kept_of_members(by_sets, keep, [3, 2]) == [3, 2]
    assert kept_of_members(by_sets, keep, [30, 20]) == [30, 20], "what is known is not counted again"
    one_set = Grouping("own", members, (GroupSet("0", 0, 10),))
    assert kept_of_members(one_set, keep, [5]) == [3, 2]


def _by_slot(member: Any, values: Tensor) -> list[Tensor]:
    numbers = member.spread(torch.arange(member.n_slots), -1).expand(values.shape)
    return [values[numbers == number] for number in range(member.n_slots)]


def test_labels_are_small() -> None:
    model = nn.Sequential(nn.Linear(512, 512))
    for spec in ("4x1", "2:4", "1x1", "1xchannel"):
        (member,) = build("pattern", spec).build(model).members
        assert member.slots is None
        assert sum(len(label) for label in member.labels if label is not None) <= 1024


def test_rules_that_do_not_stack_are_both_named() -> None:
    check_stacking([Claim("a", "channel", ["conv"]), Claim("b", "slice", ["conv"]), Claim("c", "block", ["fc"])])
    with pytest.raises(ConfigError, match=r"c\.layers: 'conv' is pruned by b \(slice\) already, and block does not"):
        check_stacking(
            [Claim("a", "channel", ["conv"]), Claim("b", "slice", ["conv"]), Claim("c", "block", ["fc", "conv"])]
        )
    check_stacking([Claim("b", "slice", ["conv"]), Claim("c", "block", ["fc", "conv"], nested=True)])
    with pytest.raises(ConfigError, match=r"c\.layers: 'conv' is pruned by b"):
        check_stacking([Claim("b", "slice", ["conv"], lives=True), Claim("c", "block", ["conv"], nested=True)])
    with pytest.raises(ConfigError, match=r"b\.layers: 'conv' is pruned by a \(channel\)"):
        check_stacking([Claim("a", "channel", ["conv"]), Claim("b", "channel", ["conv"])])
