"""What a merged model answers in plain transformers beside the live one, and what the writing of a merged model holds in memory.

python benchmarks/merge_smollm2.py answers RUN/checkpoints/last MERGED datamodules/quickstart/heldout.jsonl
python benchmarks/merge_smollm2.py memory FOLDER --layers 24 --shard_mb 250
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

import torch

PLAIN = """
import json, sys
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, prompts = sys.argv[1], json.loads(sys.argv[2])
model, tokenizer = AutoModelForCausalLM.from_pretrained(folder, dtype="auto"), AutoTokenizer.from_pretrained(folder)
answers = []
for prompt in prompts:
    ids = tokenizer.apply_chat_template([{"role": "user", "content": prompt}], add_generation_prompt=True, return_tensors="pt")
    made = model.generate(**ids, max_new_tokens=64, do_sample=False)
    answers.append(tokenizer.decode(made[0, ids["input_ids"].shape[1] :], skip_special_tokens=True))
assert not {"qlora_lightning", "peft", "bitsandbytes"} & {*sys.modules}
print(json.dumps(answers))
"""


def answers(adapter: Path, merged: Path, prompts_file: Path, count: int) -> None:
    """Both models' greedy answers to the same prompts: the merged one's in a process that knows transformers alone."""
    from qlora_lightning.data.formats import Message
    from qlora_lightning.generation import GenerationSpec, load_assistant

    prompts = [json.loads(line)["instruction"] for line in prompts_file.read_text().splitlines()][:count]
    plain = subprocess.run([sys.executable, "-c", PLAIN, merged, json.dumps(prompts)], capture_output=True, text=True, check=True)
    of_merged = [answer.strip() for answer in json.loads(plain.stdout.splitlines()[-1])]
    assistant, _ = load_assistant(adapter, None, None)
    of_live = [assistant.answer([(Message("user", prompt),)], GenerationSpec(max_new_tokens=64))[0].strip() for prompt in prompts]
    equal = [one == other for one, other in zip(of_live, of_merged, strict=True)]
    print(f"{sum(equal)} of {len(equal)} greedy answers are equal to the letter")
    for number, (prompt, live, found) in enumerate(zip(prompts, of_live, of_merged, strict=True)):
        if number < 3 or live != found:
            print(f"\nprompt  {prompt}\nlive    {live}\nmerged  {found}")


def memory(folder: Path, layers: int, shard_mb: int) -> None:
    """Write a random model with an adapter, merge it with and without a round trip through NF4, and tell the peak of the host's memory."""
    from qlora_lightning.export.weights import AdapterFactors, Merger, TensorFiles, nf4_round_trip
    from qlora_lightning.modeling.loading import QuantizationSpec

    base, adapter = folder / "base", folder / "adapter"
    if not base.is_dir():
        subprocess.run([sys.executable, __file__, "make", folder, "--layers", str(layers)], check=True)  # its memory is not ours
    factors = AdapterFactors(adapter)
    merger = Merger(TensorFiles.of_model(base), factors, torch.bfloat16, torch.device("cpu"))
    round_trip = nf4_round_trip(QuantizationSpec(), torch.bfloat16, torch.device("cpu"))
    round_trip(torch.randn(64, 64))
    (folder / f"out-{shard_mb}").mkdir()
    before, began = _peak_mb(), time.perf_counter()
    merger.write(folder / f"out-{shard_mb}", factors.layers, round_trip, shard_mb * 10**6)
    seconds, peak = time.perf_counter() - began, _peak_mb() - before
    print(f"{merger.num_bytes / 1e6:,.0f} MB in shards of {shard_mb} MB: {seconds:.0f} s, peak {peak:,.0f} MB above the start")


def make(folder: Path, layers: int) -> None:
    """A random LLaMA of 2048 channels in bf16, and an adapter of rank 64 on all its linear layers."""
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.set_default_dtype(torch.bfloat16)
    config = LlamaConfig(hidden_size=2048, intermediate_size=5632, num_hidden_layers=layers, num_attention_heads=32, vocab_size=32000)
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder / "base", max_shard_size="5GB")
    peft = get_peft_model(model, LoraConfig(r=64, lora_alpha=16, target_modules="all-linear", init_lora_weights=False))
    peft.save_pretrained(folder / "adapter", save_embedding_layers=False)


def _peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=["answers", "memory", "make"])
    parser.add_argument("paths", nargs="+", type=Path)
    parser.add_argument("--prompts", type=int, default=12)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--shard_mb", type=int, default=250)
    given = parser.parse_args()
    if given.what == "answers":
        answers(*given.paths, given.prompts)
    elif given.what == "memory":
        memory(*given.paths, given.layers, given.shard_mb)
    else:
        make(*given.paths, given.layers)
