"""What a loss changes when it is computed again, by the side of training, is put back."""

import copy

import torch
from torch import nn

from hf_ewc.training.repeatable import same_attributes


class Meter:
    """A running mean, as people keep one."""

    def __init__(self):
        self.count, self.total, self.kept = 0, 0.0, []

    def update(self, value):
        self.count += 1
        self.total += value
        self.kept.append(value)


class Holder:
    def __init__(self, owner, model):
        self.owner, self.teacher, self.meters = owner, copy.deepcopy(model), {"loss": Meter()}


class Owner:
    def __init__(self, model):
        self.model = model
        self.teachers = {"slow": copy.deepcopy(model)}
        self.layers = [copy.deepcopy(model)]
        self.meter = Meter()
        self.holder = Holder(self, model)
        self.ring = []
        self.ring.append(self.ring)


def test_what_a_trainer_holds_in_containers_and_objects_of_its_own():
    model = nn.Linear(2, 2)
    owner = Owner(model)
    holder, meter = owner.holder, owner.meter
    modules = [owner.teachers["slow"], owner.layers[0], holder.teacher]
    before = copy.deepcopy([m.weight for m in modules])
    with same_attributes(owner, but_for=model), torch.no_grad():
        for module in (*modules, model):
            module.weight.add_(1.0)
        for each in (meter, holder.meters["loss"]):
            each.update(3.0)
        owner.holder = None
        owner.new = 1
    assert all(torch.equal(m.weight, w) for m, w in zip(modules, before, strict=True))
    assert not torch.equal(model.weight, before[0])  # is looked after elsewhere
    assert owner.holder is holder
    assert owner.meter is meter
    assert not hasattr(owner, "new")
    for each in (meter, holder.meters["loss"]):
        assert (each.count, each.total, each.kept) == (0, 0.0, [])


def test_data_sets_are_not_copied():
    class Data(torch.utils.data.Dataset):
        def __init__(self):
            self.pixels = torch.zeros(4)

        def __getitem__(self, i):
            return self.pixels[i]

    owner, model = Owner(nn.Linear(2, 2)), nn.Linear(2, 2)
    owner.train_dataset = Data()
    with same_attributes(owner, but_for=model):
        owner.train_dataset.pixels.add_(1.0)
    assert owner.train_dataset.pixels.sum() == 4
