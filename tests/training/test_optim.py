"""vit.optim.AdamW: torch's numbers, states of 8 bits, saving and loading."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import draw
import pytest
import torch
from optim_helpers import KINDS, SETTINGS, check_code, check_step, one_more_step
from rounding import close
from torch import nn
from vit.backends import BackendError
from vit.optim import AdamW
from vit.optim.blockwise import BLOCK, code, dequantize, quantize


def model(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    net = nn.Sequential(nn.Linear(64, 80), nn.GELU(), nn.LayerNorm(80), nn.Linear(80, 10))
    draw.restart("model")
    return draw.fill(net, 0.1).to(dtype)


def fit(net: nn.Module, optimizer: torch.optim.Optimizer, steps: int, first: int = 0) -> float:
    """The last loss of some steps towards fixed answers."""
    loss = torch.zeros(())
    for step in range(first, first + steps):
        draw.restart("batch", step % 4)
        x = draw.randn(32, 64).to(next(net.parameters()).dtype)
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(net(x).float(), torch.arange(32) % 10)
        loss.backward()
        optimizer.step()
    return loss.item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_steps_are_torchs(dtype: torch.dtype) -> None:
    ours, theirs = model(dtype), model(dtype)
    fit(ours, AdamW(ours.parameters(), **SETTINGS), 20)
    fit(theirs, torch.optim.AdamW(theirs.parameters(), foreach=False, **SETTINGS), 20)
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        close(a, b, 8)  # a step has 8 operations one after the other


def test_groups_and_absent_gradients() -> None:
    net = model()
    optimizer = AdamW([{"params": net[0].parameters(), "weight_decay": 0.0}, {"params": net[3].weight}], lr=0.1)
    before = copy.deepcopy(net.state_dict())
    net[0](torch.ones(1, 64)).sum().backward()
    optimizer.step()
    changed = {name for name, value in net.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"0.weight", "0.bias"}
    assert optimizer.step(lambda: 3.5) == 3.5


@pytest.mark.parametrize("name", ["auto", "reference"])
def test_without_a_kernel_a_capturable_step_is_refused(name: str) -> None:
    parameter = nn.Parameter(draw.randn(10))
    parameter.grad = draw.randn(10)
    optimizer = AdamW([parameter], capturable=True, backend=name)
    with pytest.raises(BackendError, match=r"for float32 on cpu .* there is none: move the parameters to a GPU"):
        optimizer.step()
    assert optimizer.state[parameter]["step"] == 0  # nothing was counted


def test_the_code_is_the_papers() -> None:
    for signed in (True, False):
        values = code(signed)
        assert len(values) == len(values.unique()) == 256
        assert values.max() == 1
        assert 0 in values
        assert torch.equal(values, values.sort().values)
        assert (values.min() < 0) == signed
    assert torch.equal(-code(True)[:127].flip(0), code(True)[128:255])


@pytest.mark.parametrize("count", [1, BLOCK - 1, BLOCK, 3 * BLOCK + 5])
def test_a_block_keeps_its_largest_value_and_all_within_a_step(count: int) -> None:
    values = draw.randn(count) * 10 ** (4 * draw.rand(count) - 5)
    indices, scales = quantize(values, signed=True)
    again = dequantize(indices, scales, signed=True)
    assert (indices.dtype, indices.numel(), scales.numel()) == (torch.uint8, count, -(-count // BLOCK))
    of_block = scales.repeat_interleave(BLOCK)[:count]
    big = values.abs() > 0.1 * of_block
    assert ((again - values).abs() <= (0.5 * 0.9 / 64 + 1e-6) * of_block)[big].all()
    roots = values.abs()
    stored = dequantize(*quantize(roots, signed=False), signed=False)
    assert (stored > 0).all(), "nothing that is not 0 becomes 0"
    assert torch.equal(dequantize(*quantize(torch.zeros(9), signed=True), signed=True), torch.zeros(9))


def test_8_bit_states_are_a_quarter_and_learn_as_well() -> None:
    nets = {state: model() for state in ("float32", "8bit")}
    optimizers = {state: AdamW(net.parameters(), state=state, lr=2e-3) for state, net in nets.items()}
    losses = {state: fit(nets[state], optimizers[state], 30) for state in nets}
    assert losses["8bit"] == pytest.approx(losses["float32"], rel=0.02, abs=1e-3)
    sizes = {
        state: sum(t.numel() * t.element_size() for name, t in optimizer.state[nets[state][0].weight].items())
        for state, optimizer in optimizers.items()
    }
    assert sizes["8bit"] < 0.27 * sizes["float32"]


@pytest.mark.parametrize("state", ["float32", "8bit"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_loaded_state_goes_on_to_the_bit(state: str, dtype: torch.dtype) -> None:
    whole, part = model(dtype), model(dtype)
    fit(whole, AdamW(whole.parameters(), state=state), 10)
    first = AdamW(part.parameters(), state=state)
    fit(part, first, 4)
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second = AdamW(part.parameters(), lr=0.5, state="float32")
    second.load_state_dict(torch.load(file))
    fit(part, second, 6, first=4)
    for a, b in zip(whole.parameters(), part.parameters(), strict=True):
        assert torch.equal(a, b)
    assert pickle.loads(pickle.dumps(second)).state_dict()["param_groups"] == second.state_dict()["param_groups"]


def test_a_state_by_names_is_loaded_as_it_is() -> None:
    """torch.distributed.checkpoint calls parameters by their names; PyTorch's own cast would make floats of bytes."""
    whole, part = model(), model()
    fit(whole, AdamW(whole.parameters(), state="8bit"), 10)
    first = AdamW(part.parameters(), state="8bit")
    fit(part, first, 4)
    saved = first.state_dict()
    for group in saved["param_groups"]:
        group["params"] = [f"p{index}" for index in group["params"]]
    saved["state"] = {f"p{index}": state for index, state in saved["state"].items()}
    second = AdamW(part.parameters(), state="8bit")
    second.load_state_dict(saved)
    fit(part, second, 6, first=4)
    for a, b in zip(whole.parameters(), part.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.Adam])
def test_a_state_of_torch_goes_on(kind: type[torch.optim.Optimizer]) -> None:
    """And back to torch: a checkpoint of a training does not bind it to one of the two."""
    net, other = model(), model()
    settings = {"lr": 1e-2, "weight_decay": 0.0 if kind is torch.optim.Adam else 0.1}
    theirs = kind(other.parameters(), **settings)
    fit(other, theirs, 4)
    net.load_state_dict(other.state_dict())
    ours = AdamW(net.parameters(), lr=0.5, state="8bit")
    ours.load_state_dict(theirs.state_dict())
    assert ours.param_groups[0]["lr"] == 1e-2
    for first in (4, 7):
        fit(net, ours, 3, first=first)
        fit(other, theirs, 3, first=first)
        for a, b in zip(net.parameters(), other.parameters(), strict=True):
            close(a, b, 8)  # as above
        theirs = torch.optim.AdamW(other.parameters())
        theirs.load_state_dict(copy.deepcopy(ours.state_dict()))  # torch takes the tensors themselves
        other.load_state_dict(net.state_dict())


@pytest.mark.parametrize(
    ("theirs", "text"),
    [
        (
            lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
            "group 0 has no betas, eps, so it is of another optimizer",
        ),
        (lambda p: torch.optim.AdamW(p, amsgrad=True), "group 0 has amsgrad=True, .*go on with torch.optim.AdamW"),
        (lambda p: torch.optim.AdamW(p, maximize=True), "group 0 has maximize=True"),
        (lambda p: torch.optim.Adam(p, weight_decay=0.1), "Adam's weight_decay 0.1 in the gradient"),
    ],
)
def test_a_state_of_other_steps_is_refused(theirs: Any, text: str) -> None:
    net = model()
    fit(net, optimizer := theirs(net.parameters()), 2)
    with pytest.raises(ValueError, match=text):
        AdamW(net.parameters()).load_state_dict(optimizer.state_dict())


def test_a_state_that_does_not_fit_is_named() -> None:
    net, other = model(), model()
    optimizer, theirs = AdamW(net.parameters(), state="8bit"), torch.optim.AdamW(other.parameters())
    fit(net, optimizer, 1)
    fit(other, theirs, 1)
    saved = optimizer.state_dict()
    saved["state"] = theirs.state_dict()["state"]
    with pytest.raises(ValueError, match=r"parameter 0 does not fit AdamW\(state='8bit'\): exp_avg is torch.float32"):
        AdamW(net.parameters()).load_state_dict(saved)


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_norm": 0},
        {"ema_decay": 1.0},
        {"lr": -1},
        {"lr": float("nan")},
        {"betas": (1.0, 0.9)},
        {"eps": -1e-8},
        {"weight_decay": -1},
        {"state": "4bit"},
    ],
)
def test_settings_out_of_range_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=f"AdamW: {next(iter(wrong))}"):
        AdamW(model().parameters(), **wrong)


def test_a_gradient_that_is_not_finite_stays_visible() -> None:
    net = model()
    optimizer = AdamW(net.parameters(), state="8bit")
    net[0].weight.grad = torch.full_like(net[0].weight, float("inf"))
    optimizer.step()
    assert not net[0].weight.isfinite().any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_kernel_encodes_as_the_paper_does(backend: str, device: torch.device, dtype: torch.dtype) -> None:
    check_code(backend, device, dtype)


@pytest.mark.parametrize(("dtype", "state"), KINDS)
def test_a_kernel_steps_as_the_reference_does(
    backend: str, device: torch.device, dtype: torch.dtype, state: str
) -> None:
    check_step(backend, device, dtype, state)


def test_the_number_of_threads_changes_no_bit(backend: str, device: torch.device) -> None:
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        results.append(one_more_step(backend, device, torch.float32, "8bit"))
    (one, kept), (two, same) = results
    assert torch.equal(one, two)
    assert all(torch.equal(kept[name], same[name]) for name in kept)


def test_max_norm_and_ema_are_torchs() -> None:
    ours, theirs, average = model(), model(), model()
    optimizer = AdamW(ours.parameters(), **SETTINGS, max_norm=0.05, ema_decay=0.9)
    plain = torch.optim.AdamW(theirs.parameters(), foreach=False, **SETTINGS)
    draw.restart("batch")
    for _ in range(3):
        x = draw.randn(32, 64)
        for net in (ours, theirs):
            net.zero_grad()
            nn.functional.cross_entropy(net(x), torch.arange(32) % 10).backward()
        assert nn.utils.clip_grad_norm_(theirs.parameters(), 0.05) > 0.05
        optimizer.step()
        plain.step()
        for mean, value in zip(average.parameters(), theirs.parameters(), strict=True):
            mean.data.lerp_(value.data, 0.1)
    for a, b, mean in zip(ours.parameters(), theirs.parameters(), average.parameters(), strict=True):
        close(a, b, 8)
        close(optimizer.state[a]["ema"], mean.data, 8)
    again = pickle.loads(pickle.dumps(optimizer))
    assert (again.max_norm, again.backend) == (0.05, "auto")


def test_what_a_kernel_cannot_step(host: str) -> None:
    parameter = nn.Parameter(torch.zeros(5000, dtype=torch.float64))
    parameter.grad = torch.ones_like(parameter)
    with pytest.raises(BackendError, match="averages of 8 bits go with parameters of 16 and 32 bits, not float64"):
        AdamW([parameter], state="8bit", backend=host).step()
    AdamW([parameter], state="8bit").step()
    strided = nn.Parameter(torch.zeros(64, 200)[:, ::2])
    strided.grad = torch.ones(64, 100)
    with pytest.raises(BackendError, match=r"strides \(200, 2\) has gaps"):
        AdamW([strided], backend=host).step()
    AdamW([strided], lr=0.5).step()
    turned = nn.Parameter(torch.zeros(64, 100).t())
    turned.grad = torch.arange(6400.0).view(100, 64)  # in another order than the parameter
    AdamW([turned], lr=0.5, weight_decay=0, backend=host).step()
    close(turned.detach(), torch.where(turned.grad > 0, -0.5, 0.0), 8)
    with pytest.raises(ValueError, match="unknown backend 'gpu'"):
        AdamW([turned], backend="gpu")
