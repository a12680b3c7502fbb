Strides = tuple[int, int, int]
Sizes = tuple[int, int, int, int, int, int, int]

def isa() -> str: ...
def linear_int8(x: int, packed: int, out: int, T: int, K: int, N: int, threads: int, /) -> None: ...
def rms_norm(x: int, weight: int, out: int, rows: int, width: int, eps: float, threads: int, /) -> None: ...
def rope(
    x: int,
    cosine: int,
    sine: int,
    out: int,
    T: int,
    heads: int,
    half: int,
    token_stride: int,
    head_stride: int,
    interleaved: bool,
    threads: int,
    /,
) -> None: ...
def silu_mul(gate: int, up: int, out: int, count: int, threads: int, /) -> None: ...
def cache_write(cache: int, values: int, slots: int, T: int, row_bytes: int, /) -> None: ...
def attention_decode(
    q: int,
    k: int,
    k_strides: Strides,
    v: int,
    v_strides: Strides,
    lengths: int,
    tables: int,
    out: int,
    sizes: Sizes,
    scale: float,
    threads: int,
    /,
) -> None: ...
def linear_float(
    x: int, weight: int, bias: int, out: int, sizes: tuple[int, int, int, int, int, int], threads: int, /
) -> None: ...
def heads_linear(
    x: int,
    weight: int,
    out: int,
    sizes: tuple[int, int, int, int],
    strides: tuple[int, int, int, int, int, int],
    mixed: bool,
    threads: int,
    /,
) -> None: ...
def experts_float(
    x: int,
    gate_up: int,
    down: int,
    indices: int,
    weights: int,
    out: int,
    sizes: tuple[int, int, int, int, int, int],
    threads: int,
    /,
) -> None: ...
def route(
    logits: int,
    bias: int,
    indices: int,
    weights: int,
    sizes: tuple[int, int, int, int, int],
    normalize: bool,
    scale: float,
    threads: int,
    /,
) -> None: ...
