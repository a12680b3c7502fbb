"""A machine that runs a Gluon kernel of warps with different tasks on the CPU, for what Triton's interpreter lacks:
partitions, mbarriers, boxes of the tensor memory accelerator and asynchronous products of warp groups.

Partitions are threads of which one runs at a time; who goes on is drawn at each point where warps could meet, and so is
when a box arrives. A wrong phase, a missing barrier or one too many ends in a deadlock, which is named, or in a `Race`:

- a box is written over while it is on its way, or read before it has arrived;
- a box is loaded over values whose reading no fence has ended, or results change while they are stored;
- an operand of a product changes between its issue and its wait;
- a product reads what was stored without a fence between the two;
- a product's result is used before its wait.

Layouts are not modelled; `benchmarks.compiled` compiles them.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.util import module_from_spec, spec_from_file_location
from inspect import signature
from pathlib import Path
from types import FunctionType, ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from triton.experimental.gluon import GluonJITFunction
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.language import constexpr


class Modelled:
    """A kernel of `module` in the place of a compiled one."""

    def __init__(self, module: ModuleType, kernel: str, seed: int) -> None:
        self.machine, self.kernel = Machine(module, seed), kernel

    def __getitem__(self, grid: tuple[int]) -> Any:
        return lambda *args, **kwargs: self.machine.run(self.kernel, *grid, *args, **kwargs)


def faulty(module: ModuleType, old: str, new: str, times: int, folder: Path) -> ModuleType:
    """The module with something in its source replaced that stands there so many times."""
    source = Path(str(module.__file__)).read_text(encoding="utf-8")
    assert source.count(old) == times
    path = folder / "faulty.py"
    path.write_text(source.replace(old, new), encoding="utf-8")
    spec = spec_from_file_location("faulty", path)
    assert spec and spec.loader
    made = module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


class Race(AssertionError):
    """Two warps, or a warp and a unit of the machine, did not wait for one another."""


class Deadlock(AssertionError):
    """Everybody waits."""


class Stopped(Exception):
    """Ends a partition after another one has failed."""


@dataclass
class Partition:
    """Some warps with a task of their own."""

    name: str
    bit: int
    wake: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    is_blocked: Callable[[], bool] = lambda: False
    is_done: bool = False
    products: list[Product] = field(default_factory=list)  # issued and not known to be complete
    num_stores: int = 0  # of boxes on their way to memory


class Machine:
    """Runs kernels of `module`; `seed` draws the order of events."""

    def __init__(self, module: ModuleType, seed: int) -> None:
        self.draw = random.Random(seed)
        self.haste = self.draw.choice([0.02, 0.2, 0.9])  # of boxes
        self.program, self.num_programs = 0, 1
        self.memory: list[Shared] = []
        self.partitions: list[Partition] = []
        self.boxes: list[Callable[[], None]] = []  # on their way
        self.failure: BaseException | None = None
        self.of_thread = threading.local()
        self.globals = self._language(module)

    def run(self, kernel: str, grid: int, *args: Any, **kwargs: Any) -> None:
        """One program after the other; tensors are passed as pointers, and how to launch is left aside."""
        function = self.globals[kernel]
        given = [_as_passed(arg) for arg in args]
        kwargs = {name: value for name, value in kwargs.items() if name in signature(function).parameters}
        for self.program in range(grid):
            self.num_programs = grid
            self.memory, self.partitions = [], []
            function(*given, **kwargs)
            assert not self.boxes, "boxes are on their way when the program ends"

    # ---- partitions ----------------------------------------------------------------------------------------------

    def warp_specialize(
        self, tasks: Sequence[tuple[Any, tuple[Any, ...]]], warps: list[int], registers: list[int]
    ) -> None:
        assert len(tasks) == len(warps) + 1 == len(registers) + 1
        self.partitions = [Partition(f"{task.__name__} {i}", 1 << i) for i, (task, _) in enumerate(tasks)]
        mode = torch.is_inference_mode_enabled()  # of this thread alone
        threads = [
            threading.Thread(target=torch.inference_mode(mode)(self._work), args=(partition, *task), daemon=True)
            for partition, task in zip(self.partitions, tasks, strict=True)
        ]
        for thread in threads:
            thread.start()
        self._pass_on()
        for thread in threads:
            thread.join()
        if self.failure is not None:
            raise self.failure

    def _work(self, partition: Partition, task: Any, args: tuple[Any, ...]) -> None:
        self.of_thread.partition = partition
        partition.wake.acquire()
        try:
            if self.failure is None:
                task(*args)
                assert not partition.products, f"{partition.name} ends before its products do"
        except Stopped:
            pass
        except BaseException as failure:  # it is raised again where the kernel was started
            self.failure = failure
        partition.is_done = True
        self._pass_on()

    def meet(self, is_blocked: Callable[[], bool] = lambda: False) -> None:
        """Somebody else may go on, and this partition once it is no longer blocked."""
        partition = self.of_thread.partition
        partition.is_blocked = is_blocked
        self._pass_on()
        partition.wake.acquire()
        if self.failure is not None:
            raise Stopped

    def _pass_on(self) -> None:
        """Wakes a partition that can go on, boxes arriving meanwhile."""
        left = [p for p in self.partitions if not p.is_done]
        while self.failure is None and left:
            ready = [p for p in left if not p.is_blocked()]
            if not ready and not self.boxes:
                self.failure = Deadlock(", ".join(p.name for p in left))
                break
            if ready and (not self.boxes or self.draw.random() > self.haste):
                self.draw.choice(ready).wake.release()
                return
            self.boxes.pop(self.draw.randrange(len(self.boxes)))()
        for partition in left:
            partition.wake.release()

    # ---- the language --------------------------------------------------------------------------------------------

    def _language(self, module: ModuleType) -> dict[str, Any]:
        """The module's names, with kernels as Python functions over this machine."""
        names = dict(vars(module))
        names["gl"] = SimpleNamespace(
            **{
                name: getattr(torch, name)
                for name in ("int32", "int64", "float32", "float16", "bfloat16", "exp2", "log2")
            },
            constexpr=constexpr,
            static_range=range,
            arange=lambda start, stop, layout=None: torch.arange(start, stop, dtype=torch.int32),
            zeros=lambda shape, dtype, layout=None: torch.zeros(shape, dtype=dtype),
            full=lambda shape, value, dtype, layout=None: torch.full(shape, value, dtype=dtype),
            cdiv=lambda a, b: -(-a // b),
            minimum=lambda a, b: torch.minimum(torch.as_tensor(a), torch.as_tensor(b)),
            maximum=lambda a, b: torch.maximum(torch.as_tensor(a), torch.as_tensor(b)),
            max=lambda x, axis: x.amax(axis),
            sum=lambda x, axis: x.sum(axis),
            where=torch.where,
            convert_layout=lambda x, layout: x,
            program_id=lambda axis: self.program,
            num_programs=lambda axis: self.num_programs,
            load=lambda at, mask=None, other=0: at.load(mask, other),
            store=lambda at, value, mask=None: at.store(value, mask),
            allocate_shared_memory=self._allocate,
            warp_specialize=self.warp_specialize,
            **{name: Layout for name in ("NVMMASharedLayout", "NVMMADistributedLayout", "SwizzledSharedLayout")},
            SliceLayout=Layout,
        )
        names["mbarrier"] = SimpleNamespace(
            MBarrierLayout=lambda: None,
            init=lambda bar, count: bar.barrier.init(count),
            expect=self._expect,
            arrive=self._arrive,
            wait=lambda bar, phase: self.meet(lambda: bar.barrier.phase == int(phase)),
        )
        names["fence_async_shared"] = self._fence
        names["load_box"], names["store_box"] = self._load_box, self._store_box
        names["tma"] = SimpleNamespace(store_wait=self._wait_for_stores)
        names["warpgroup_mma"] = self._product
        names["warpgroup_mma_wait"] = self._wait_for_products
        for name, value in names.items():
            if isinstance(value, constexpr):
                names[name] = value.value
            elif isinstance(value, GluonJITFunction):
                names[name] = FunctionType(value.fn.__code__, names, name, value.fn.__defaults__)
        return names

    def _allocate(self, dtype: torch.dtype, shape: list[int], layout: object) -> Shared:
        made = Shared.of(self, dtype, shape)
        self.memory.append(made)
        return made

    def me(self) -> Partition:
        """Whose thread this is."""
        found: Partition = self.of_thread.partition
        return found

    def _expect(self, bar: Shared, num_bytes: int) -> None:
        bar.barrier.expected += num_bytes
        self._arrive(bar, count=1)

    def _arrive(self, bar: Shared, *, count: int) -> None:
        bar.barrier.arrive(count)
        self.meet()

    def _fence(self) -> None:
        for shared in self.memory if self.partitions else ():
            shared.unfenced.bitwise_and_(~self.me().bit)
            shared.unread.bitwise_and_(~self.me().bit)

    def _load_box(self, boxes: Any, at: list[Any], bar: Shared, target: Shared) -> None:
        """Rows and columns outside of the source are zeros, and count as bytes all the same."""
        if target.on_its_way.any():
            raise Race("a box is loaded over one that is on its way")
        if target.unread.any():
            raise Race("a box is loaded over values that were read without a fence since")
        where = [int(one) for one in at]
        target.on_its_way.fill_(True)
        target.data.fill_(torch.nan)

        def arrive() -> None:
            box = torch.zeros(boxes.block_shape, dtype=boxes.base.dtype)
            outside, inside = _within(boxes, where)
            box[inside] = boxes.base[outside]
            target.data.copy_(box.view(target.data.shape))
            target.on_its_way.fill_(False)
            bar.barrier.expected -= box.numel() * box.element_size()
            bar.barrier.complete()

        self.boxes.append(arrive)
        self.meet()

    def _store_box(self, boxes: Any, at: list[Any], source: Shared) -> None:
        """What lies outside of the target is not written."""
        where, values, partition = [int(one) for one in at], source.read(), self.me()
        partition.num_stores += 1

        def leave() -> None:
            if not _same(source.data, values):
                raise Race("results change while they are stored")
            outside, inside = _within(boxes, where)
            boxes.base[outside] = values.view(boxes.block_shape)[inside]
            partition.num_stores -= 1

        self.boxes.append(leave)
        self.meet()

    def _wait_for_stores(self, pendings: int) -> None:
        partition = self.me()
        self.meet(lambda: partition.num_stores > pendings)

    def _product(
        self, left: Shared | Tensor, right: Shared, sums: Tensor | Product, *, use_acc: bool = True, is_async: bool
    ) -> Product:
        assert is_async
        partition = self.me()
        previous = sums.result if isinstance(sums, Product) else sums
        made = Product(left, right, previous if use_acc else torch.zeros_like(previous))
        partition.products.append(made)
        self.meet()
        return made

    def _wait_for_products(self, num_outstanding: int, deps: tuple[Product]) -> Tensor:
        partition = self.me()
        self.meet()
        cut = max(0, len(partition.products) - num_outstanding)
        for product in partition.products[:cut]:
            product.complete()
        del partition.products[:cut]
        (wanted,) = deps
        if not wanted.is_complete:
            raise Race("a product's result is used before its wait")
        return wanted.result


class Layout:
    """Any layout: none is modelled."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    @classmethod
    def get_default_for(cls, *args: Any) -> Layout:
        return cls()


def _within(boxes: Any, where: list[int]) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
    """The part of a box that lies inside its tensor: there, and in the box."""
    outside, inside = [], []
    for start, size, end in zip(where, boxes.block_shape, boxes.shape, strict=True):
        first, last = max(start, 0), max(min(start + size, end), max(start, 0))
        outside.append(slice(first, last))
        inside.append(slice(first - start, last - start))
    return tuple(outside), tuple(inside)


def _same(a: Tensor, b: Tensor) -> bool:
    """The same bits."""
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


@dataclass
class Barrier:
    """An mbarrier: it completes a phase when all have arrived and all bytes with them."""

    count: int = 0
    left: int = 0
    expected: int = 0
    phase: int = 0

    def init(self, count: int) -> None:
        self.count = self.left = count

    def arrive(self, count: int) -> None:
        self.left -= count
        if self.left < 0:
            raise Race("more arrive at a barrier than it counts")
        self.complete()

    def complete(self) -> None:
        if self.left == self.expected == 0:
            self.left, self.phase = self.count, self.phase ^ 1


@dataclass
class Shared:
    """A view of shared memory, and what the machine knows of each value."""

    machine: Machine
    data: Tensor
    unfenced: Tensor  # who stored it and has not fenced since, a bit for each partition
    unread: Tensor  # and who loaded it
    on_its_way: Tensor
    barriers: list[Barrier]

    @classmethod
    def of(cls, machine: Machine, dtype: torch.dtype, shape: list[int]) -> Shared:
        empty = torch.zeros(shape, dtype=torch.int64)
        data = torch.full(shape, torch.nan, dtype=dtype) if dtype.is_floating_point else empty.clone()
        return cls(machine, data, empty, empty.clone(), empty.bool(), [Barrier() for _ in range(shape[0])])

    def _view(self, of: Callable[[Tensor], Tensor], barriers: list[Barrier] | None = None) -> Shared:
        views = (of(t) for t in (self.data, self.unfenced, self.unread, self.on_its_way))
        return Shared(self.machine, *views, barriers or [])

    @property
    def dtype(self) -> torch.dtype:
        return self.data.dtype

    @property
    def barrier(self) -> Barrier:
        (only,) = self.barriers
        return only

    def index(self, index: int) -> Shared:
        return self._view(lambda t: t[index], self.barriers[index : index + 1])

    def slice(self, start: int, length: int, dim: int) -> Shared:
        return self._view(lambda t: t.narrow(dim, start, length))

    def permute(self, order: tuple[int, ...]) -> Shared:
        return self._view(lambda t: t.permute(order))

    def load(self, layout: object) -> Tensor:
        self.machine.meet()
        if self.on_its_way.any():
            raise Race("a box is read before it has arrived")
        self.unread.bitwise_or_(self.machine.me().bit)
        return self.data.clone()

    def store(self, value: Tensor) -> None:
        assert value.shape == self.data.shape and value.dtype == self.data.dtype
        self.machine.meet()
        self.data.copy_(value)
        self.unfenced.fill_(self.machine.me().bit)

    def read(self) -> Tensor:
        """By the asynchronous proxy."""
        if self.on_its_way.any():
            raise Race("a product reads a box that has not arrived")
        if self.unfenced.any():
            raise Race("a product reads what was stored without a fence")
        return self.data.clone()


class Product:
    """Sums of a warp group on their way."""

    def __init__(self, left: Shared | Tensor, right: Shared, sums: Tensor) -> None:
        self.left, self.right, self.sums = left, right, sums
        self.read = self._operands()
        self.result = sums + self.read[0].float() @ self.read[1].float()
        self.is_complete = False

    def _operands(self) -> tuple[Tensor, Tensor]:
        return (self.left if isinstance(self.left, Tensor) else self.left.read()), self.right.read()

    def complete(self) -> None:
        if not all(_same(a, b) for a, b in zip(self.read, self._operands(), strict=True)):
            raise Race("an operand of a product changes before its wait")
        self.is_complete = True


def _as_passed(argument: Any) -> Any:
    if isinstance(argument, TensorDescriptor):
        return SimpleNamespace(**vars(argument), dtype=argument.base.dtype)
    return Pointer(argument.view(-1)) if isinstance(argument, Tensor) else argument


class Pointer:
    """A tensor's values by their place; reading or writing outside of them fails."""

    def __init__(self, values: Tensor, offset: int | Tensor = 0) -> None:
        self.values, self.offset = values, offset
        self.dtype = SimpleNamespace(element_ty=values.dtype)

    def __add__(self, more: int | Tensor) -> Pointer:
        return Pointer(self.values, self.offset + more)

    def _places(self, mask: Tensor | bool | None) -> tuple[Tensor, Tensor]:
        places = torch.as_tensor(self.offset).long()
        is_read = torch.as_tensor(True if mask is None else mask).expand(places.shape)
        assert not is_read.any() or 0 <= places[is_read].min() <= places[is_read].max() < len(self.values)
        return places, is_read

    def load(self, mask: Tensor | bool | None, other: float) -> Tensor:
        places, is_read = self._places(mask)
        read = self.values[torch.where(is_read, places, 0)] if len(self.values) else self.values.new_zeros(places.shape)
        return torch.where(is_read, read, torch.as_tensor(other, dtype=read.dtype))

    def store(self, value: Tensor, mask: Tensor | bool | None) -> None:
        places, is_written = self._places(mask)
        assert value.dtype == self.values.dtype
        self.values[places[is_written]] = value.expand(places.shape)[is_written]
