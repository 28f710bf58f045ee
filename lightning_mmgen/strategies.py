"""Several processes from the same YAML: FSDP2 and DeepSpeed's ZeRO, on GPUs or, for tests, on CPUs (DDP is Lightning's own).

A checkpoint holds what is trained, by the names and in the shapes of a single process, whatever the engine and the number of processes.
Each process writes the elements that it holds and reads those that it needs: no tensor is ever whole on the way. So a run goes on in
another engine, and ``mmgen`` reads all of them.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.resnet import ResnetBlock2D
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.plugins.precision import DeepSpeedPrecision
from lightning.pytorch.strategies import DeepSpeedStrategy, ModelParallelStrategy, Strategy
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from .checkpoint import AtomicCheckpointIO
from .models.loading import awaited, fill
from .shards import Piece, elements, part, part_of, piece, put, shape, span

if TYPE_CHECKING:
    from .tuning import TunedModule

MOMENTS = ("exp_avg", "exp_avg_sq")
"""What AdamW keeps of each parameter, beside the number of steps."""


class Sharing(Strategy):
    """A strategy whose processes share parameters or their optimizer's states, and write what each holds of them."""

    optimizers_known: ClassVar[tuple[str, ...]] = ("adamw",)
    """Rows that ask for another optimizer are trained by AdamW, at their own rate."""
    reads_parts: bool = False
    """Whether :meth:`share` reads the weights of large parts, which are built without (``later``, see :mod:`.models.loading`)."""

    @property
    def tuned(self) -> TunedModule:
        """The module."""
        return cast("TunedModule", self.lightning_module)

    def share(self, module: TunedModule) -> None:
        """Called once the module is built and under its table."""

    @property
    def restore_checkpoint_after_setup(self) -> bool:
        return False

    @property
    def lightning_restore_optimizer(self) -> bool:
        return True

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """What is trained: this process's piece of what is cut, and the whole of what is not, in memory of its own."""
        held = {n: piece(p, part(p)) for n, p in self.tuned.trainable().items()}
        return {n: v if isinstance(v, Piece) else v.cpu().clone() for n, v in held.items()}

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        for name, value in checkpoint["state_dict"].items():
            parameter = self.tuned.get_parameter(name)
            put(parameter, part_of(parameter, value))

    def check_groups(self, optimizer: Optimizer, saved: Mapping[str, Any]) -> None:
        """Raises: ValueError: the saved state is that of other groups: another strategy runs other optimizers, say."""
        here, there = ([(g["name"], g["optimizer"]) for g in groups] for groups in (optimizer.param_groups, saved["param_groups"]))
        if here != there:
            odd = next((pair for pair in there if pair not in here), there[0])
            raise ValueError(
                f"the checkpoint's optimizer is not of this strategy: row {odd[0]!r} trained by {odd[1]}, and {type(self).__name__} has "
                f"{', '.join(f'{name}: {kind}' for name, kind in here)}; model.init_args.start takes its weights alone"
            )

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        cast(AtomicCheckpointIO, self.checkpoint_io).save_pieces(checkpoint, filepath)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        return cast(AtomicCheckpointIO, self.checkpoint_io).load_checkpoint(checkpoint_path, whole=False)


class FSDP2(Sharing, ModelParallelStrategy):
    """Every weight but the VAE's cut over all processes (``fully_shard``): each transformer layer and each block of the UNet is gathered
    when it is used, and let go after.

    Each part of the model (encoder, adapter, UNet, each layer of reference attention) is a root of its own, so that what calls a part by
    itself, as the sampler does, goes through a root. The VAE stays whole, in float32, on every device.

    Args:
        gather: dtype in which weights are gathered and computed with, ``bfloat16`` say; what is trained stays float32 where it lies, and so
            do the sums of its gradients. None: each weight's own; ``trainer.precision: bf16-mixed`` computes in bfloat16 all the same, but
            sends twice as much.
        offload: weights, gradients and optimizer state lie in the host's memory.

    Raises:
        ValueError: ``offload`` without a GPU.
    """

    optimizers_known = ("adamw", "muon")
    reads_parts = True

    def __init__(self, gather: str | None = None, offload: bool = False) -> None:
        if gather not in (None, "bfloat16", "float16", "float32"):
            raise ValueError(f"FSDP2: gather must be bfloat16, float16 or float32, not {gather!r}")
        if offload and not torch.cuda.is_available():
            raise ValueError("FSDP2: offload takes weights from a GPU to the host's memory, and there is no GPU here")
        super().__init__(tensor_parallel_size=1, save_distributed_checkpoint=False)
        self.checkpoint_io = AtomicCheckpointIO()
        self.gather, self.offload = gather, offload
        if offload:
            self._process_group_backend = "cpu:gloo,cuda:nccl"

    def setup_environment(self) -> None:
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    def share(self, module: TunedModule) -> None:
        from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard, register_fsdp_forward_method

        kind = None if self.gather is None else getattr(torch, self.gather)
        settings: dict[str, Any] = {
            "mesh": self.device_mesh["data_parallel"],
            "mp_policy": MixedPrecisionPolicy(kind, None if kind is None else torch.float32),
            "offload_policy": CPUOffloadPolicy() if self.offload else OffloadPolicy(),
            "reshard_after_forward": True,
        }
        stored = awaited(module)
        for root in module.roots():
            for block in blocks(root):
                fully_shard(block, **settings)
            fully_shard(root, **settings)
            if hasattr(root, "down_features"):
                register_fsdp_forward_method(root, "down_features")
        fill(module, stored, torch.device("cpu") if self.offload else self.root_device)

    def model_to_device(self) -> None:
        assert self.model is not None
        if not self.offload:
            self.model.to(self.root_device)
            return
        self.model._apply(lambda t: t if isinstance(t, DTensor) else t.to(self.root_device))  # type: ignore[no-untyped-call]
        self.tuned._device = self.root_device

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """The state as one process would have it, with this process's pieces of its tensors."""
        state = (optimizer._optimizer if isinstance(optimizer, LightningOptimizer) else optimizer).state_dict()
        held = {i: {k: piece(v, v) if isinstance(v, Tensor) else v for k, v in own.items()} for i, own in state["state"].items()}
        return {**state, "state": held}

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            self.check_groups(optimizer, state)
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            held = {
                i: {k: part_of(parameters[i], v) if tuple(getattr(v, "shape", ())) == parameters[i].shape else v for k, v in own.items()}
                for i, own in state["state"].items()
            }
            optimizer.load_state_dict({**state, "state": held})


def blocks(root: nn.Module) -> Iterator[nn.Module]:
    """What of a part is gathered by itself: the layers of its outermost lists, and a UNet's middle block; before each of them the
    transformer and residual blocks of a UNet in it."""
    for layer in layers(root):
        yield from (m for m in layer.modules() if m is not layer and isinstance(m, BasicTransformerBlock | ResnetBlock2D))
        yield layer


def layers(root: nn.Module) -> Iterator[nn.Module]:
    """The layers of a part's outermost lists, and a UNet's middle block."""
    for name, child in root.named_children():
        if isinstance(child, nn.ModuleList):
            yield from child
        elif name == "mid_block":
            yield child
        else:
            yield from layers(child)


class ZeRO(Sharing, DeepSpeedStrategy):
    """DeepSpeed's ZeRO (Rajbhandari et al. 2020): stage 2 cuts gradients and optimizer state over the processes, stage 3 the weights too.

    Weights keep their own dtypes, and ``trainer.precision: bf16-mixed`` computes under autocast, as it does without DeepSpeed.

    Args:
        stage: 2 or 3.
        offload: optimizer state, and in stage 3 the weights, lie in the host's memory.

    Raises:
        ValueError: another stage, or ``offload`` without a GPU.
    """

    def __init__(self, stage: int = 2, offload: bool = False) -> None:
        if stage not in (2, 3):
            raise ValueError(f"ZeRO: stage must be 2 or 3, not {stage}")
        if not torch.cuda.is_available():
            if offload:
                raise ValueError("ZeRO: offload takes optimizer state from a GPU to the host's memory, and there is no GPU here")
            os.environ["DS_ACCELERATOR"] = "cpu"
        super().__init__(stage=stage, offload_optimizer=offload, offload_parameters=offload and stage == 3)
        self.checkpoint_io = AtomicCheckpointIO()
        self.stage = stage

    @property
    def root_device(self) -> torch.device:
        device = super().root_device
        return torch.device("cpu", 0) if device.type == "cpu" else device

    def setup_environment(self) -> None:
        self.precision_plugin = Autocast(self.precision_plugin.precision)
        super(DeepSpeedStrategy, self).setup_environment()  # its own refuses CPUs

    def setup_distributed(self) -> None:
        if self.root_device.type != "cpu":
            return super().setup_distributed()
        from deepspeed import ops
        from lightning.fabric.utilities.seed import reset_seed

        reset_seed()
        self.set_world_ranks()
        ops.__compatible_ops__["deepspeed_shm_comm"] = False  # of inference alone; it would be compiled now
        self._init_deepspeed_distributed()

    @property
    def reads_parts(self) -> bool:  # type: ignore[override]
        return self.stage == 3

    def share(self, module: TunedModule) -> None:
        """Stage 3: each layer is read whole and cut before the next, so that no process ever holds much more than its part."""
        if self.stage != 3:
            return
        from deepspeed import zero

        self._init_config_if_needed()
        cutter = zero.Init(module=nn.Module(), config_dict_or_path=self.config)
        for layer in (layer for root in module.roots() for layer in root.modules()):
            fill(layer, awaited(layer, recurse=False), self.root_device, recurse=False)
            cutter._convert_to_zero_parameters(layer.parameters(recurse=False))

    def _format_config(self) -> None:
        self._format_batch_size_and_grad_accum_config()  # and no precision: DeepSpeed would cast the VAE too

    @contextmanager
    def model_sharded_context(self) -> Iterator[None]:
        yield  # the weights are cut once they are loaded

    @property
    def handles_gradient_accumulation(self) -> bool:
        """Lightning says when a step is due, at an epoch's end too; DeepSpeed would count by itself."""
        return False

    @contextmanager
    def block_backward_sync(self) -> Iterator[None]:
        yield  # gradients are cut as they come

    def _flat(self) -> tuple[Any, list[Tensor]]:
        """The optimizer below ZeRO's, whose groups are the table's, and the flat float32 tensors that it steps, of this process."""
        zero: Any = self.optimizers[0]
        return zero.optimizer, list(zero.fp32_partitioned_groups_flat if self.stage == 3 else zero.single_partition_of_fp32_groups)

    def _link(self) -> None:
        """Where each parameter's state lies in the flat tensors: stage 2 notes it after the first group's step, for that group alone."""
        zero: Any = self.optimizers[0]
        if self.stage == 2:
            zero._hp_optimizer_states_linked = False
            zero._lazy_init_hp_params_optimizer_state()

    def _fragment(self, parameter: Any, key: str) -> tuple[Tensor, int]:
        """This process's elements of what AdamW keeps of a parameter, [n], and where they begin in the whole."""
        from deepspeed.utils import safe_get_local_optimizer_state

        if self.stage == 3:
            start, stop = span(parameter)
            return safe_get_local_optimizer_state(parameter, key)[: stop - start], start
        if (held := parameter._hp_mapping) is None:
            return torch.empty(0), 0
        return held.get_optim_state_fragment(key), held.lp_fragment_address.start

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """The state as one process would have it, with this process's pieces of its tensors."""
        (base, flat), groups = self._flat(), self.tuned.groups()
        state: dict[int, Any] = {}
        if all("step" in base.state[tensor] for tensor in flat):
            self._link()
            step = float(base.state[flat[0]]["step"])
            for i, parameter in enumerate(p for group in groups for p in group["params"]):
                held = {key: Piece(*self._fragment(parameter, key), shape(parameter)) for key in MOMENTS}
                state[i] = {"step": torch.tensor(step), **held}
        ends = list(accumulate((len(group["params"]) for group in groups), initial=0))
        numbered = [
            {**{k: v for k, v in own.items() if k != "params"}, "params": list(range(*ids))}
            for own, ids in zip(base.param_groups, pairwise(ends), strict=True)
        ]
        return {"state": state, "param_groups": numbered}

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        from deepspeed.utils import safe_set_local_optimizer_state

        (base, flat), (saved,) = self._flat(), checkpoint["optimizer_states"]
        self.check_groups(base, saved)
        for group, own in zip(base.param_groups, saved["param_groups"], strict=True):
            group.update({k: v for k, v in own.items() if k not in ("params", "fused")})
        if not saved["state"]:
            return
        step = torch.tensor(max(float(values["step"]) for values in saved["state"].values()))
        for tensor in flat:
            base.state[tensor] = {"step": step.to(tensor.device).clone(), **{key: torch.zeros_like(tensor) for key in MOMENTS}}
        self._link()
        parameters = [p for group in self.tuned.groups() for p in group["params"]]
        for i, values in saved["state"].items():
            for key in MOMENTS:
                if self.stage == 3:
                    safe_set_local_optimizer_state(parameters[i], part_of(parameters[i], values[key]), key)
                else:
                    held, start = self._fragment(parameters[i], key)
                    held.copy_(elements(values[key], start, start + len(held)))


class Autocast(DeepSpeedPrecision):
    """DeepSpeed with float32 weights, under autocast where the precision is mixed.

    Raises:
        ValueError: a precision that is neither ``32-true`` nor ``bf16-mixed``.
    """

    def __init__(self, precision: Any) -> None:
        if precision not in ("32-true", "bf16-mixed"):
            raise ValueError(f"ZeRO: trainer.precision must be 32-true or bf16-mixed, not {precision}")
        super().__init__(precision)
        self._desired_dtype = torch.float32

    @contextmanager
    def forward_context(self) -> Iterator[None]:
        kind = "cuda" if torch.cuda.is_available() else "cpu"
        with torch.autocast(kind, torch.bfloat16) if self.precision == "bf16-mixed" else nullcontext():
            yield

    def backward(self, tensor: Tensor, model: Any, optimizer: Any, *args: Any, **kwargs: Any) -> None:
        """Lightning has divided the loss by the batches that accumulate; DeepSpeed would do so again, which clipping would see."""
        model.trainer.model.set_gradient_accumulation_boundary(not model.trainer.fit_loop.epoch_loop._should_accumulate())
        model.trainer.model.backward(tensor, *args, scale_wrt_gas=False, **kwargs)

    def convert_module(self, module: nn.Module) -> nn.Module:
        return module

    def convert_input(self, data: Any) -> Any:
        return data
