"""What does each kernel of the fused path cost, and is it right? At LLaMA-7B's shapes, r 64; then attention's backends and cuBLAS.

    python benchmarks/kernel_speed.py
    python benchmarks/kernel_speed.py --only lora_backward --tokens 2048

A call is captured in a CUDA graph, ten times, so that time holds no launches; what fits the L2 cache (512 tokens) may be faster than
memory. GB/s count the bytes that must move, TFLOP/s the useful operations; "of copy" is against a copy of 1 GiB. Host is the time that the
call itself takes. Errors are against the same function of `kernels/reference.py` on the same GPU: cosine, and the largest difference over
the largest entry, of the worst of its results. "Two runs" says whether they were equal bit for bit; for `dequantize`, "bits" whether it
equals bitsandbytes. A kernel that fails says so in its line; one that leaves the device unusable makes the script start again behind it.
"""

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import chain
from types import ModuleType

import torch
from kernel_cases import GROUPS, HEADS, Case, bf16, elementwise_cases, lora_cases, weight_cases
from torch import Tensor

from qlora_lightning.kernels import reference
from qlora_lightning.kernels.attention import Backend, Layout, attend, attend_backward, fa4_installed

CALLS = 10
"""In a graph."""
HEADER = ("kernel", "tokens", "us", "host us", "GB/s", "of copy", "TFLOP/s", "cosine", "max error", "two runs")


def microseconds(function: Callable[[], object]) -> tuple[float, float]:
    """Of a call: on the device, and on the host."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            function()
    torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(CALLS):
        function()
    host = (time.perf_counter() - began) / CALLS * 1e6
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(CALLS):
            function()
    times = []
    for _ in range(7):
        first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        first.record()
        graph.replay()
        last.record()
        torch.cuda.synchronize()
        times.append(first.elapsed_time(last) / CALLS * 1e3)
    return statistics.median(times), host


def cloned(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copies with the same strides, rows of a wider tensor included."""
    copies = {}
    for name, tensor in inputs.items():
        whole = torch.empty(tensor.untyped_storage().nbytes() // tensor.element_size(), device="cuda", dtype=tensor.dtype)
        copies[name] = whole.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset()).copy_(tensor)
    return copies


def errors(got: list[Tensor], expected: list[Tensor]) -> tuple[float, float]:
    """Cosine and largest relative error of the worst result."""
    cosines, largest = [], []
    for one, other in zip(got, expected, strict=True):
        one, other = one.double().flatten(), other.double().flatten()
        cosines.append(float(one @ other / (one.norm() * other.norm())))
        largest.append(float((one - other).abs().max() / other.abs().max()))
    return min(cosines), max(largest)


def measure(case: Case, ops: ModuleType, fastest: float) -> list[str]:
    """The cells of a case's line."""
    got, again = (case.call(ops, cloned(case.inputs)) for _ in range(2))
    same = "same" if all(map(torch.equal, got, again)) else "DIFFERENT"
    if case.exact:
        same += ", bits" if all(map(torch.equal, got, case.exact)) else ", WRONG BITS"
    del again
    cosine, largest = errors(got, case.call(reference, cloned(case.inputs)))
    inputs = cloned(case.inputs)
    device, host = microseconds(lambda: case.call(ops, inputs))
    rate = case.moved / device / 1e3
    operations = f"{case.operations / device / 1e6:.0f}" if case.operations else ""
    return [f"{device:.1f}", f"{host:.0f}", f"{rate:,.0f}", f"{rate / fastest:.0%}", operations, f"{cosine:.7f}", f"{largest:.1e}", same]


def products(tokens: int) -> None:
    """cuBLAS with LoRA's columns appended to W's, against LoRA's products by themselves."""
    for name, (_, inputs, outputs) in GROUPS.items():
        gradient, out = bf16(tokens, outputs), bf16(tokens, outputs)
        for appended in (0, 64, 128, 192):
            cat, weight = bf16(tokens, inputs + appended), bf16(outputs, inputs + appended, scale=0.02)
            plain, placed = weight[:, :inputs].contiguous(), weight[:, inputs:].contiguous()
            functions = {
                "cat @ [W, sB]^T": partial(torch.mm, cat, weight.t(), out=out),
                "dY @ [W, sB]": partial(torch.mm, gradient, weight, out=torch.empty_like(cat)),
            }
            if appended:
                functions["dY @ sB"] = partial(torch.mm, gradient, placed)
                functions["dY @ W"] = partial(torch.mm, gradient, plain)
            for label, function in functions.items():
                device, host = microseconds(function)
                rate = 2 * tokens * outputs * (appended if label == "dY @ sB" else inputs) / device / 1e6
                print_line(
                    [f"{label}, {name}, P {appended}", str(tokens), f"{device:.1f}", f"{host:.0f}", "", "", f"{rate:.0f}", "", "", ""]
                )


def attention_backends(tokens: int) -> None:
    """Forward and backward of every backend on rows of 512 and of 2,048 tokens; packed ones as segments of these lengths."""
    scale, width = HEADS.size**-0.5, sum(HEADS.sizes)
    for length in (512, 2048):
        rows, backends = tokens // length, dict[Backend, bool](cudnn=False, flash=False, varlen=True)
        borders = torch.arange(0, tokens + 1, length, device="cuda", dtype=torch.int32)
        pairs = [*backends.items(), *([("fa4", False), ("fa4", True)] if fa4_installed() else [])]
        for backend, packed in pairs if rows else []:
            layout = Layout(1, tokens, borders, length) if packed else Layout(rows, length)
            qkv, dout = bf16(tokens, width), bf16(tokens, HEADS.query * HEADS.size)
            shared = (HEADS, layout, None, scale, backend)
            label = f"attention {backend}, {'packed' if packed else 'rows'} of {length}"
            try:
                attended = attend(qkv, *shared)
                plain = (HEADS, Layout(rows, length), None, scale, "reference")
                exact = attend(qkv, *plain)
                directions = {
                    "forward": (lambda: [attend(qkv, *shared).out], [exact.out], 2),  # noqa: B023
                    "backward": (
                        lambda: list(attend_backward(dout, qkv, attended, *shared)),  # noqa: B023
                        list(attend_backward(dout, qkv, exact, *plain)),
                        5,
                    ),
                }
                for direction, (function, expected, products) in directions.items():
                    got = function()
                    same = all(all(map(torch.equal, got, function())) for _ in range(3))
                    cosine, largest = errors(got, expected)
                    device, host = microseconds(function)
                    rate = products * rows * HEADS.query * HEADS.size * length**2 / device / 1e6  # the half that is not masked
                    cells = [f"{device:.1f}", f"{host:.0f}", "", "", f"{rate:.0f}", f"{cosine:.7f}", f"{largest:.1e}"]
                    print_line([f"{label}, {direction}", str(tokens), *cells, "same" if same else "DIFFERENT"])
            except Exception as error:  # the next one may well work
                print_line([label, str(tokens), f"failed: {type(error).__name__}: {str(error)[:300]}"])


def print_line(cells: Sequence[str]) -> None:
    """A line of the table, at once."""
    print("| " + " | ".join(cells) + " |", flush=True)


def copy_rate() -> float:
    """GB/s that a copy of 1 GiB reads and writes."""
    source = torch.empty(2**30, device="cuda", dtype=torch.uint8)
    return 2 * source.numel() / microseconds(partial(torch.empty_like(source).copy_, source))[0] / 1e3


def start_again(behind: int) -> None:
    """In a new process image, with a new context on the device, after case number ``behind``."""
    sys.stdout.flush()
    arguments = [argument for argument in sys.argv[1:] if not argument.startswith("--skip")]
    os.execv(sys.executable, [sys.executable, sys.argv[0], *arguments, f"--skip={behind + 1}"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[512, 2048, 8192])
    parser.add_argument("--only", default="", help="kernels whose name begins so, without attention and cuBLAS")
    parser.add_argument("--skip", type=int, default=0, help="leave out so many kernels at the beginning")
    arguments = parser.parse_args()
    from qlora_lightning.kernels import triton_ops

    torch.manual_seed(0)
    rate = copy_rate()
    if not arguments.skip:
        print(f"{torch.cuda.get_device_name()}: a copy moves {rate:,.0f} GB/s\n")
        print_line(HEADER)
        print_line(["---"] * len(HEADER))
    cases = chain(weight_cases(), *(chain(lora_cases(tokens), elementwise_cases(tokens)) for tokens in arguments.tokens))
    for number, case in enumerate(cases):
        if number < arguments.skip or not case.name.startswith(arguments.only):
            continue
        try:
            print_line([case.name, str(case.tokens), *measure(case, triton_ops, rate)])
        except Exception as error:  # the next kernel may well work
            lines = [line for line in str(error).splitlines() if line.strip()]
            print_line([case.name, str(case.tokens), f"failed: {type(error).__name__}: {' / '.join(lines[:3])[:300]}"])
            try:
                torch.cuda.synchronize()
            except RuntimeError:
                start_again(number)
    for tokens in [] if arguments.only else arguments.tokens:
        attention_backends(tokens)
        products(tokens)


if __name__ == "__main__":
    main()
