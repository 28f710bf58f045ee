from __future__ import annotations

import copy
import io
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from lightning_mmgen.models.parameters import ParameterTable, Row
from lightning_mmgen.optimizer import StackedMuon, make_optimizer, orthogonal

ROWS = [Row("a", "full", lr=4e-3, weight_decay=0.1, optimizer="muon"), Row("b", "full", lr=1e-3), Row("codec", "frozen")]
ALL_THREE = [
    Row("a", "full", lr=4e-3, weight_decay=0.1, optimizer="muon"),
    Row("a.1", "full", lr=1e-3),
    Row("b", "full", lr=2e-3, weight_decay=0.05, optimizer="adafactor"),
    Row("codec", "frozen"),
]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.codec = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8)), nn.Linear(8, 3), nn.Linear(1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x))


def groups(net: Net, rows: list[Row] = ROWS) -> list[dict[str, Any]]:
    table = ParameterTable(rows)
    table.apply(net, [])
    return table.groups()


def train(net: Net, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for i in steps:
        x = torch.randn(16, 6, generator=torch.Generator().manual_seed(i))
        optimizer.zero_grad()
        net(x).sub(x[:, :3].cumsum(1)).square().mean().backward()
        optimizer.step()


def test_a_rows_matrices_go_to_muon_and_all_else_to_adamw() -> None:
    net = Net()
    found = {g["name"]: (g["optimizer"], g["lr"], [tuple(p.shape) for p in g["params"]]) for g in groups(net)}
    assert found == {
        "a": ("muon", 4e-3, [(8, 6)]),
        "a (vectors)": ("adamw", 4e-3, [(8,), (8,), (8,)]),
        "b": ("adamw", 1e-3, [(3, 8), (3,)]),
    }


def test_a_row_of_adafactor_keeps_matrices_and_vectors_together() -> None:
    found = {g["name"]: (g["optimizer"], g["lr"], [tuple(p.shape) for p in g["params"]]) for g in groups(Net(), ALL_THREE)}
    assert found == {
        "a": ("muon", 4e-3, [(8, 6)]),
        "a (vectors)": ("adamw", 4e-3, [(8,)]),
        "a.1": ("adamw", 1e-3, [(8,), (8,)]),
        "b": ("adafactor", 2e-3, [(3, 8), (3,)]),
    }


def newton_schulz(g: Tensor) -> Tensor:
    """Jordan et al. 2024: five steps of the quintic iteration, in bfloat16 as torch has it."""
    x = g.bfloat16() / g.norm()
    x = x.T if g.shape[0] > g.shape[1] else x
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.775 * gram + 2.0315 * gram @ gram) @ x
    return (x.T if g.shape[0] > g.shape[1] else x).float()


def test_a_step_is_muons_formula_on_the_matrix_and_adamws_on_the_rest() -> None:
    net = Net()
    plain, before = copy.deepcopy(net), copy.deepcopy(net)
    optimizer = make_optimizer(groups(net), (0.9, 0.99))
    train(net, optimizer, range(1))
    others = [p for n, p in plain.named_parameters() if n != "a.0.weight" and not n.startswith("codec")]
    rates = [4e-3] * 3 + [1e-3] * 2
    decays = [0.1] * 3 + [0.01] * 2
    plain_groups = [{"params": [p], "lr": r, "weight_decay": d} for p, r, d in zip(others, rates, decays, strict=True)]
    adamw = torch.optim.AdamW(plain_groups, betas=(0.9, 0.99))
    train(plain, adamw, range(1))
    for (name, p), q in zip(net.named_parameters(), plain.parameters(), strict=True):
        assert name == "a.0.weight" or torch.allclose(p, q, atol=1e-7), name
    w, grad = before.a[0].weight, net.a[0].weight.grad
    assert isinstance(w, Tensor) and grad is not None
    expected = w * (1 - 4e-3 * 0.1) - 4e-3 * 0.2 * 8**0.5 * newton_schulz(grad)  # first step: the momentum is the gradient's own direction
    torch.testing.assert_close(net.a[0].weight, expected, rtol=0, atol=2e-4)


def adafactor(x: Tensor, grads: list[Tensor], rates: list[float], decay: float) -> Tensor:
    """Shazeer & Stern 2018, algorithms 4 (the last two axes) and 5 (vectors), in float64: decay 1 - t^-0.8, clipping at 1, given rates;
    beta1 .9 averages the steps."""
    x, rows, columns, square, step = x.double(), *[torch.zeros((), dtype=torch.float64)] * 4
    for t, (g, rate) in enumerate(zip(grads, rates, strict=True), 1):
        beta2, new = 1 - t**-0.8, g.double() ** 2 + 1e-30
        if x.ndim > 1:
            rows = beta2 * rows + (1 - beta2) * new.sum(-1, keepdim=True)
            columns = beta2 * columns + (1 - beta2) * new.sum(-2, keepdim=True)
            square = rows * columns / rows.sum(-2, keepdim=True)
        else:
            square = beta2 * square + (1 - beta2) * new
        update = g / square.sqrt()
        step = 0.9 * step + 0.1 * rate * update / update.square().mean().sqrt().clamp(min=1)
        x = x - rate * decay * x - step
    return x


def test_steps_are_adafactors_algorithms() -> None:
    """At rates that a scheduler changes, with gradients that grow, so that clipping is at work."""
    shapes, rates = [(6, 4), (5,), (2, 3, 4, 5)], [2e-2 * f for f in (0.25, 0.5, 0.75, 1.0, 1.0, 1.0)]
    weights = [nn.Parameter(torch.randn(s)) for s in shapes]
    before = [w.detach().clone() for w in weights]
    grads = [[(i + 1) ** 2 * torch.randn(s) for i in range(6)] for s in shapes]
    group = {"name": "a", "params": weights, "lr": 2e-2, "weight_decay": 0.1, "optimizer": "adafactor"}
    optimizer = make_optimizer([group], (0.9, 0.999))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: min((i + 1) / 4, 1.0))
    for i in range(6):
        for w, g in zip(weights, grads, strict=True):
            w.grad = g[i]
        optimizer.step()
        schedule.step()
    for w, start, g in zip(weights, before, grads, strict=True):
        torch.testing.assert_close(w.double(), adafactor(start, g, rates, 0.1), rtol=0, atol=1e-6)
        assert (w - start).abs().max() > 0.02
    sizes = [{n: tuple(v.shape) for n, v in s.items() if n.startswith("exp_avg_sq")} for s in optimizer.state_dict()["state"].values()]
    assert sizes == [
        {"exp_avg_sq_row": (6,), "exp_avg_sq_col": (4,)},
        {"exp_avg_sq": (5,)},
        {"exp_avg_sq_row": (2, 3, 4), "exp_avg_sq_col": (2, 3, 5)},
    ]


def test_each_group_steps_as_its_optimizer_would_alone() -> None:
    def group(kind: str, seed: int) -> dict[str, Any]:
        weights = [nn.Parameter(torch.randn(6, 4, generator=torch.Generator().manual_seed(seed)))]
        return {"name": kind, "params": weights, "lr": 1e-2 * seed, "weight_decay": 0.1 * seed, "optimizer": kind}

    kinds = ("adafactor", "adamw", "muon")
    together, apart = ([group(kind, i + 1) for i, kind in enumerate(kinds)] for _ in range(2))
    optimizers = [make_optimizer(together), *(make_optimizer([g]) for g in apart)]
    for step in range(3):
        for g in (*together, *apart):
            g["params"][0].grad = torch.randn(6, 4, generator=torch.Generator().manual_seed(step))
        for optimizer in optimizers:
            optimizer.step()
    assert all(torch.equal(a["params"][0], b["params"][0]) for a, b in zip(together, apart, strict=True))


@pytest.mark.parametrize("rows", [ROWS, ALL_THREE], ids=["muon", "all three"])
def test_a_saved_state_goes_on_bit_equal(rows: list[Row]) -> None:
    net, file = Net(), io.BytesIO()
    optimizer = make_optimizer(groups(net, rows))
    train(net, optimizer, range(4))
    torch.save(optimizer.state_dict(), file)
    weights = copy.deepcopy(net.state_dict())
    train(net, optimizer, range(4, 8))
    again = Net()
    again.load_state_dict(weights)
    resumed = make_optimizer(groups(again, rows))
    file.seek(0)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    train(again, resumed, range(4, 8))
    for (name, p), q in zip(net.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(p, q), name


def test_a_scheduler_reaches_both() -> None:
    net = Net()
    optimizer = make_optimizer(groups(net))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: 0.0 if i else 1.0)
    train(net, optimizer, range(1))
    schedule.step()
    weights = copy.deepcopy(net.state_dict())
    train(net, optimizer, range(1, 3))
    assert [g["lr"] for g in optimizer.param_groups] == [0.0] * 3
    assert all(torch.equal(v, weights[n]) for n, v in net.state_dict().items())


@pytest.mark.parametrize("fused", [False, True])
def test_a_table_of_adamw_alone_gets_torchs_own(fused: bool) -> None:
    optimizer = make_optimizer([{"params": [nn.Parameter(torch.ones(2, 2))], "lr": 1e-3, "optimizer": "adamw"}], (0.8, 0.9), fused)
    assert type(optimizer) is torch.optim.AdamW
    assert optimizer.param_groups[0]["betas"] == (0.8, 0.9) and optimizer.param_groups[0]["fused"] is fused


def test_stacked_steps_are_those_of_torchs_own_muon() -> None:
    shapes = [(8, 24), (24, 8), (8, 24), (16, 16), (8, 24), (24, 8)]
    ours = [nn.Parameter(torch.randn(s, generator=torch.Generator().manual_seed(i))) for i, s in enumerate(shapes)]
    theirs = copy.deepcopy(ours)
    settings: dict[str, Any] = {"lr": 1e-2, "weight_decay": 0.1, "momentum": 0.9}
    optimizers = StackedMuon(ours, **settings), torch.optim.Muon(theirs, adjust_lr_fn="match_rms_adamw", **settings)
    for step in range(5):
        for i, (p, q) in enumerate(zip(ours, theirs, strict=True)):
            p.grad = q.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(100 * step + i)) if i != 4 or step else None
        for optimizer in optimizers:
            optimizer.step()
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-3)
    states = [o.state_dict()["state"] for o in optimizers]
    torch.testing.assert_close(states[0], states[1], rtol=0, atol=1e-6)


def test_a_kernel_steps_as_the_matrix_that_it_flattens_to() -> None:
    kernels = [nn.Parameter(torch.randn(8, 4, 3, 3, generator=torch.Generator().manual_seed(i))) for i in range(2)]
    matrices = [nn.Parameter(k.detach().flatten(1).clone()) for k in kernels]
    optimizers = StackedMuon(kernels, lr=1e-2), torch.optim.Muon(matrices, lr=1e-2, adjust_lr_fn="match_rms_adamw")
    for step in range(3):
        for i, (k, m) in enumerate(zip(kernels, matrices, strict=True)):
            k.grad = torch.randn(k.shape, generator=torch.Generator().manual_seed(10 * step + i))
            m.grad = k.grad.flatten(1)
        for optimizer in optimizers:
            optimizer.step()
    for k, m in zip(kernels, matrices, strict=True):
        torch.testing.assert_close(k.flatten(1), m, rtol=0, atol=1e-3)


def test_a_convolutions_kernel_goes_to_muon() -> None:
    table = ParameterTable([Row("a", "full", lr=1.0, optimizer="muon")])
    table.apply(nn.ModuleDict({"a": nn.Conv2d(2, 3, 3)}), [])
    assert [(g["name"], g["optimizer"], [p.ndim for p in g["params"]]) for g in table.groups()] == [
        ("a", "muon", [4]),
        ("a (vectors)", "adamw", [1]),
    ]


@pytest.mark.parametrize(("hardware", "kind", "off"), [(True, torch.bfloat16, 0.05), (False, torch.float32, 1e-5)])
def test_a_cpu_without_bfloat16_orthogonalises_in_float32(
    hardware: bool, kind: torch.dtype, off: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lightning_mmgen.optimizer.has_bfloat16", lambda: hardware)
    stack = torch.randn(3, 8, 24, generator=torch.Generator().manual_seed(0))
    found = orthogonal(stack, (3.4445, -4.775, 2.0315), 5, 1e-7)
    left, values, right = torch.linalg.svd(stack.double() / stack.norm(dim=(1, 2), keepdim=True), full_matrices=False)
    for _ in range(5):
        values = 3.4445 * values - 4.775 * values**3 + 2.0315 * values**5  # what the iteration does to each singular value
    assert found.dtype == kind and values.min() > 0.6 and values.max() < 1.3
    torch.testing.assert_close(found.double(), left * values[:, None] @ right, rtol=0, atol=off)


def test_muon_steps_a_matrix_that_is_cut_as_it_steps_the_whole(tmp_path: Path) -> None:
    """In a group of one process; two are in ``benchmarks/engines.py``."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        whole = [nn.Parameter(torch.randn(shape)) for shape in ((6, 4), (6, 4), (6, 2, 3, 3))]
        cut = [nn.Parameter(distribute_tensor(p.detach().clone(), mesh, [Shard(0)])) for p in whole]
        optimizers = StackedMuon(whole, lr=0.1, weight_decay=0.1), StackedMuon(cut, lr=0.1, weight_decay=0.1)
        for _ in range(3):
            for p, q in zip(whole, cut, strict=True):
                p.grad = torch.randn_like(p)
                q.grad = distribute_tensor(p.grad, mesh, [Shard(0)])
            for optimizer in optimizers:
                optimizer.step()
        for p, q in zip(whole, cut, strict=True):
            assert isinstance(q, DTensor) and torch.equal(q.full_tensor(), p)
    finally:
        dist.destroy_process_group()


def test_rows_whose_optimizer_a_strategy_lacks_are_named() -> None:
    table = ParameterTable([Row("a", "full", lr=1.0, optimizer="muon"), Row("b", "full", lr=1.0), Row("c", "frozen", optimizer="muon")])
    table.apply(nn.ModuleDict({name: nn.Linear(2, 2) for name in "abc"}), [])
    assert table.unknown(("adamw",)) == ["a (muon)"] and table.unknown(("adamw", "muon")) == []
