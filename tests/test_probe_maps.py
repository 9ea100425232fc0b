"""Maps from one layer's keys and values to those above, over passages that a model reads."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaForCausalLM

from memlong_vllm.probe.backbone import Backbone, read_passage
from memlong_vllm.probe.maps import MapFitter, sums_bytes
from memlong_vllm.probe.reading import Memory
from tests.checkpoints import Checkpoints

WINDOW, CHUNK, PASSAGE, MEMORY_LAYER = 64, 32, 256, 3


@pytest.fixture(scope="module")
def backbone(checkpoints: Checkpoints) -> Backbone:
    return Backbone(LlamaForCausalLM.from_pretrained(checkpoints.base(), dtype=torch.float32))


@pytest.mark.parametrize("width", [1, 2])
def test_maps_and_their_r_squared(backbone: Backbone, tokens: list[int], width: int) -> None:
    passages = [tokens[first : first + PASSAGE] for first in range(0, 20 * PASSAGE, PASSAGE)]
    fitter = MapFitter(backbone, [MEMORY_LAYER, backbone.num_layers - 1], WINDOW, CHUNK, width)
    fitter.add(passages[:16])
    fitter.add(passages[16:], unseen=True)
    found = fitter.fit(1e-4)
    assert set(found) == {MEMORY_LAYER}, "no layer lies above the last"
    assert set(found[MEMORY_LAYER]) == {MEMORY_LAYER + 1}
    reader = found[MEMORY_LAYER][MEMORY_LAYER + 1]
    wanted, mapped = [], []
    for passage in passages[16:]:
        read = read_passage(backbone, torch.tensor(passage), WINDOW)
        stored = reader.apply(Memory(read[MEMORY_LAYER].raw_keys, read[MEMORY_LAYER].values))
        wanted.append(torch.stack([read[MEMORY_LAYER + 1].raw_keys, read[MEMORY_LAYER + 1].values]))
        mapped.append(torch.stack([stored.keys, stored.values]))
    true, guess = torch.cat(wanted, dim=2), torch.cat(mapped, dim=2)  # [2, heads, tokens, d]
    spread = (true - true.mean(dim=2, keepdim=True)).square().sum(dim=(1, 2, 3))
    r_squared = 1 - (true - guess).square().sum(dim=(1, 2, 3)) / spread
    assert reader.key_r_squared == pytest.approx(float(r_squared[0]), abs=1e-4)
    assert reader.value_r_squared == pytest.approx(float(r_squared[1]), abs=1e-4)
    assert (r_squared > 0.5).all()
    half = reader.apply(Memory(*(read[MEMORY_LAYER].raw_keys.bfloat16(), read[MEMORY_LAYER].values.bfloat16())))
    assert half.keys.dtype == half.values.dtype == torch.bfloat16
    assert torch.allclose(half.keys.float(), stored.keys, atol=0.05 * float(stored.keys.abs().max()))


def test_the_sums_are_as_large_as_said(backbone: Backbone) -> None:
    fitter = MapFitter(backbone, [0, 2], WINDOW, CHUNK, 3)
    sums = [*fitter.fitted.values(), *fitter.unseen.values()]
    taken = sum(each.inputs.nbytes + each.products.nbytes for each in sums)
    assert sums_bytes(backbone, [0, 2], 3) == taken
