from __future__ import annotations

from functools import cached_property

import pytest
import torch
from jsonargparse import ArgumentParser
from torch import Tensor, nn

from heliostat.components import TwoBitLinear, prepare_two_bit, quantize_model, two_bit_network
from heliostat.components.two_bit_networks import packed_names
from heliostat.pretrained import load_tokenizer
from heliostat.towers import TextEmbedder
from tests.lit_models.test_whitened_cse import tiny_encoder


class Net(nn.Module):
    def __init__(self, width: int = 20) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(width, 24), nn.ReLU(), nn.Linear(24, 8, bias=False))
        self.head = nn.Linear(8, 2)
        self.again = self.body[0]  # a second name

    @cached_property
    def fingerprint(self) -> str:
        return str(float(self(torch.ones(1, 20)).sum()))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


def test_two_bit_network_is_what_a_configuration_can_write() -> None:
    parser = ArgumentParser()
    parser.add_argument("--teacher", type=nn.Module | None)
    network = {"class_path": f"{__name__}.Net", "init_args": {"width": 20}}
    arguments = {"network": network, "exclude": "head", "four_bit_fraction": 1.0}
    config = {"teacher": {"class_path": "heliostat.components.two_bit_network", "init_args": arguments}}
    teacher = parser.instantiate_classes(parser.parse_object(config)).teacher
    assert isinstance(teacher, Net)
    kinds = [
        isinstance(layer, TwoBitLinear) for layer in (teacher.body[0], teacher.body[2], teacher.again, teacher.head)
    ]
    assert kinds == [True, True, True, False]
    assert teacher.body[0].average_bits() > 5


def test_caches_of_the_dense_network_are_not_used() -> None:
    network = Net()
    before = network.fingerprint
    assert two_bit_network(network) is network
    assert network.fingerprint != before


def test_fingerprint_of_a_tower_is_that_of_its_packed_weights(tmp_path) -> None:
    for part in (tiny_encoder(), load_tokenizer("minilm")):
        part.save_pretrained(tmp_path)
    towers = [TextEmbedder(str(tmp_path)) for _ in range(3)]
    dense = towers[0].fingerprint
    first, second = (two_bit_network(tower).fingerprint for tower in towers[:2])
    other = two_bit_network(towers[2], four_bit_fraction=1.0).fingerprint
    assert first == second
    assert len({dense, first, other}) == 3
    assert towers[0](["a text"]).isfinite().all()


@pytest.mark.parametrize("prefix", ["", "model.teacher."])
def test_prepared_model_loads_what_a_quantised_one_saved(prefix: str) -> None:
    saved, fresh = Net(), Net()
    quantize_model(saved, exclude="head", outlier_fraction=0.05)
    state = {prefix + name: tensor for name, tensor in saved.state_dict().items()}
    bias = fresh.body[0].bias
    assert sorted(prepare_two_bit(fresh, state, prefix)) == ["again", "body.0", "body.2"]
    assert fresh.body[0].bias is bias
    fresh.load_state_dict(saved.state_dict())
    assert fresh.again is fresh.body[0]
    assert prepare_two_bit(fresh, state, prefix) == []
    x = torch.randn(4, 20)
    assert torch.equal(fresh(x), saved(x))
    assert prepare_two_bit(Net(), Net().state_dict()) == []
    other = Net(width=36)
    prepare_two_bit(other, saved.state_dict())
    with pytest.raises(RuntimeError, match=r"body.0: the weight's shape \(O, I\) is \(24, 20\)"):
        other.load_state_dict(saved.state_dict())


def test_packed_names_are_the_buffers_of_two_bit_layers() -> None:
    network = Net()
    assert packed_names(network) == []
    quantize_model(network, include="head")
    assert set(packed_names(network)) == {name for name in network.state_dict() if name.startswith("head.")} - {
        "head.bias"
    }
