"""What a plan says of its groups: who is coupled to whom, through what, and what cannot be cut."""

from __future__ import annotations

import json

import torch
from torch import nn

from secateur.cli.plan import print_groups
from secateur.graph import make_plan, trace
from secateur.types import Plan


class Branches(nn.Module):
    """A residual sum, a depthwise convolution and a concatenation."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.depth = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.point = nn.Conv2d(8, 8, 1)
        self.side = nn.Conv2d(3, 6, 3, padding=1)
        self.head = nn.Conv2d(14, 5, 1)

    def forward(self, x):
        y = self.norm(self.stem(x))
        y = y + self.point(self.depth(y))
        return self.head(torch.cat([y, self.side(x)], 1))


def planned() -> Plan:
    model = Branches().eval()
    graph = trace(model, torch.randn(1, 3, 6, 6))
    return make_plan(graph, model, {graph.units("channel")[0].id: [0, 1, 2]})


def test_every_group_says_who_is_coupled_to_whom_and_through_what():
    stream, side = [g for g in planned().groups if g.reason is None]
    assert (stream.kind, stream.units, stream.kept) == ("channel", 8, 5)
    assert "depth.weight:0" in stream.members
    assert stream.links == {
        "made by": ("stem", "point"),
        "normalised by": ("norm",),
        "depthwise convolution": ("depth",),
        "read by": ("point", "head"),
        "added in": ("the model itself",),
        "concatenated in": ("the model itself",),
    }
    assert side.kept == side.units == 6
    assert side.links == {"made by": ("side",), "concatenated in": ("the model itself",), "read by": ("head",)}


def test_what_cannot_be_cut_is_there_with_its_reason():
    frozen = {m: g.reason for g in planned().groups if g.reason for m in g.members}
    assert frozen["head.weight:0"] == "it is an output of the model"
    assert "summed against a dimension that cannot be cut" in frozen["stem.weight:1"]
    assert "stem.weight:2" not in frozen  # positions of a kernel are no units


def test_groups_survive_json():
    plan = planned()
    assert Plan.from_json(json.loads(json.dumps(plan.to_json()))) == plan


def test_the_command_sums_up_what_is_alike_and_full_shows_all(capsys):
    model = nn.Sequential(*[m for _ in range(12) for m in (nn.Linear(8, 8), nn.ReLU())], nn.Linear(8, 2))
    plan = make_plan(trace(model, torch.randn(1, 8)), model, {})
    print_groups(plan.groups, full=False)
    short = capsys.readouterr().out
    assert "neuron 8 of 8 stay (and 11 alike)" in short
    assert "made by 0\n" in short
    print_groups(plan.groups, full=True)
    assert capsys.readouterr().out.count("8 of 8 stay") == 12
