Rows = tuple[int, int]  # address, floats from row to row
Packed = tuple[int, int, bool, int, int]  # address, bits, whether symmetric, K, N
Fp8 = tuple[int, int, int]  # addresses of values and scales, K
Chosen = tuple[int, int, int, int, int, int]  # addresses of indices and weights, E, A, scratch
Heads = tuple[int, int, int]  # address, floats from row to row and from head to head
HeadsMatrix = tuple[Heads, Packed, int]  # floats, or packed and bytes from head to head; zeros for what it is not
Cache = tuple[int, bool, int, int, int]  # address, is float16, values from page to page, slot to slot, head to head
Batch = tuple[int, int, int]  # addresses of offsets, lengths, tables
Sizes = tuple[int, int, int, int, int, int]  # heads, kv_heads, k_width, v_width, page_size, max_pages
Segments = tuple[tuple[int, ...], tuple[int, ...]]  # offsets, prefixes
Three = tuple[Heads, Heads, Heads]  # of q, k and v
PackedSizes = tuple[int, int, int, int]  # heads, kv_heads, k_width, v_width

def isa() -> str: ...
def isas() -> list[str]: ...
def record_bytes(K: int, /) -> int: ...
def keep_freed_memory() -> bool: ...
def return_freed_memory() -> None: ...
def attention_part(group: int, k_width: int, v_width: int, page_size: int, /) -> int: ...
def sample(
    logits: int,
    columns: tuple[int, int, int, int, int, int],
    draws: int,
    V: int,
    tokens: int,
    logprobs: int,
    threads: int,
    /,
) -> None: ...
def allow(logits: int, masks: int, out: int, rows: int, V: int, /) -> None: ...
def packed_attention(
    segments: Segments, inputs: Three, out: Heads, lse: int, sizes: PackedSizes, scale: float, threads: int, /
) -> None: ...
def packed_attention_backward(
    segments: Segments,
    inputs: Three,
    out: Heads,
    lse: int,
    out_gradient: Heads,
    gradients: Three,
    sizes: PackedSizes,
    scale: float,
    threads: int,
    /,
) -> None: ...

class Residency:
    def __init__(self, path: str, budget: int, /) -> None: ...
    def add_layer(self, start: int, record_bytes: int, experts: int, /) -> int: ...
    def address(self) -> int: ...
    def mapping(self) -> int: ...
    def budget(self) -> int: ...
    def counts(self) -> tuple[int, int, int, int, int]: ...

class Program:
    def __init__(self) -> None: ...
    def __len__(self) -> int: ...
    def run(self, rows: int, taken: int, threads: int, /) -> int: ...
    def narrow(self) -> None: ...
    def limit(self, rows: int, /) -> None: ...
    def quantize(self, x: Heads, records: int, heads: int, K: int, wide_from: float, /) -> None: ...
    def linear_packed(self, records: int, weight: Packed, out: int, /) -> None: ...
    def rms_norm(self, x: Heads, weight: int, out: int, heads: int, width: int, eps: float, /) -> None: ...
    def rope(self, x: Heads, cosine: int, sine: int, out: int, heads: int, half: int, interleaved: bool, /) -> None: ...
    def silu_mul(self, gate: Rows, up: Rows, out: int, width: int, /) -> None: ...
    def add(self, first: Rows, second: Rows, out: int, width: int, /) -> None: ...
    def concat(
        self, first: Heads, second: Heads, out: int, heads: int, first_width: int, second_width: int, /
    ) -> None: ...
    def take_rows(self, table: Rows, index: int, out: int, width: int, /) -> None: ...
    def take_packed_rows(self, weight: Packed, index: int, out: int, /) -> None: ...
    def cache_write(self, cache: Cache, values: Heads, slots: int, sizes: tuple[int, int, int], /) -> None: ...
    def linear_float(self, x: Rows, weight: Rows, out: int, K: int, N: int, /) -> None: ...
    def heads_linear(
        self, x: Heads, weight: Heads, out: int, heads: int, inputs: int, outputs: int, mixed: bool, /
    ) -> None: ...
    def heads_packed(self, records: int, weight: Packed, head_bytes: int, heads: int, out: int, /) -> None: ...
    def experts_float(
        self, x: Rows, stacks: tuple[int, int], chosen: Chosen, hidden: int, out: int, sizes: tuple[int, int], /
    ) -> None: ...
    def linear_fp8(self, x: Rows, weight: Fp8, out: int, N: int, /) -> None: ...
    def experts_fp8(
        self,
        x: Rows,
        parts: tuple[Fp8, Fp8, Fp8],
        strides: tuple[int, int, int, int],
        chosen: Chosen,
        hidden: int,
        out: int,
        /,
    ) -> None: ...
    def experts_packed(
        self,
        records: int,
        parts: tuple[Packed, Packed, Packed],
        strides: tuple[int, int],
        chosen: Chosen,
        hidden: tuple[int, int],
        wide_from: float,
        out: int,
        residency: tuple[int, int],
        /,
    ) -> None: ...
    def route(
        self,
        logits: int,
        bias: int,
        indices: int,
        weights: int,
        scratch: int,
        sizes: tuple[int, int, int, int],
        normalize: bool,
        scale: float,
        /,
    ) -> None: ...
    def attention(
        self,
        q: int,
        k: Cache,
        v: Cache,
        batch: Batch,
        partials: int,
        out: int,
        sizes: Sizes,
        most: int,
        scale: float,
        /,
    ) -> None: ...
    def attention_expanded(
        self,
        q: tuple[Heads, Heads],
        w_uk: HeadsMatrix,
        w_uv: HeadsMatrix,
        cache: Cache,
        batch: Batch,
        first: int,
        out: int,
        sizes: tuple[int, int, int, int, int, int, int],
        scale: float,
        /,
    ) -> None: ...
    def rms_norm_backward(
        self,
        x: Heads,
        grad: Heads,
        weight: int,
        out: tuple[int, int, int],
        heads: int,
        width: int,
        block: int,
        eps: float,
        /,
    ) -> None: ...
    def rope_backward(
        self, grad: Heads, cosine: int, sine: int, dx: int, heads: int, half: int, interleaved: bool, /
    ) -> None: ...
    def silu_mul_backward(self, gate: Rows, up: Rows, grad: Rows, dgate: int, dup: int, width: int, /) -> None: ...
    def sort_experts(self, indices: int, starts: int, sorted: tuple[int, int, int], E: int, A: int, /) -> None: ...
    def sum_rows(self, source: int, place: int, out: int, A: int, width: int, /) -> None: ...
    def activate(self, gate_up: int, weights: int, order: int, hidden: int, F: int, /) -> None: ...
    def activate_backward(
        self, gate_up: int, weights: int, order: int, hidden: int, dgate_up: int, dweights: int, F: int, /
    ) -> None: ...
    def route_backward(
        self,
        logits: int,
        chosen: tuple[int, int, int],
        dlogits: int,
        E: int,
        A: int,
        softmax: bool,
        normalize: bool,
        scale: float,
        /,
    ) -> None: ...
    def logprobs(self, logits: int, targets: int, log_sums: int, logprobs: int, V: int, /) -> None: ...
    def logprobs_backward(
        self, logits: int, targets: int, log_sums: int, grad: int, dlogits: int, V: int, /
    ) -> None: ...
