"""Every question, in the order in which one would ask."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from porcelet.doctor import accelerators, environment, hardware, libraries, limits
from porcelet.doctor.finding import Finding


def examine(
    *, network: bool = False, deep: bool = False, also: Sequence[Callable[[], Finding]] = ()
) -> Iterator[Finding]:
    """Every finding about this machine. `network` also asks whether the model hub answers, `deep` reads every byte of
    the stored models. `also` are questions that only a higher layer can answer."""
    yield hardware.hardware()
    yield hardware.steal()
    yield from accelerators.accelerators()
    yield libraries.dependencies()
    yield libraries.native_parts()
    yield from libraries.extras()
    yield limits.open_files()
    yield limits.address_space()
    yield limits.overcommit()
    yield environment.encoding()
    yield environment.clock()
    try:
        yield from _with_libraries(network=network, deep=deep)
        for question in also:
            yield question()
    except ImportError as problem:
        yield libraries.not_importable(problem)


def _with_libraries(*, network: bool, deep: bool) -> Iterator[Finding]:
    """What needs torch and the other dependencies to be asked."""
    from porcelet.doctor import authorities, computing, disk, models, proxy, store
    from porcelet.doctor import network as net

    yield computing.torch_version()
    native = computing.native_library()
    yield native
    if native.state != "problem":
        yield computing.instruction_set()
        yield computing.openmp()
        yield from models.model_memory()
    yield computing.gpu()
    yield environment.environment()
    yield computing.threads()
    yield limits.memory_limit()
    yield limits.cpu_limit(computing.usable_cores())
    yield store.store()
    yield from store.integrity(deep)
    yield from store.left_over()
    yield from store.kept_experts(deep)
    yield disk.disk()
    yield disk.inodes()
    yield disk.file_system()
    yield disk.temporary()
    yield net.port()
    yield from proxy.proxies()
    yield from authorities.certificates()
    yield net.hub_access(network)
