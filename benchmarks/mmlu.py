"""How long does MMLU take, and what does sharing the examples of a subject bring? Also: accuracy of one base in several storages.

    python benchmarks/mmlu.py BASE FOLDER --storages nf4-dq --share true false
    python benchmarks/mmlu.py BASE FOLDER --storages 16bit nf4-dq --style lm_eval

One line of a Markdown table for each evaluation, as soon as it is done; then how many questions each two answer alike.
"""

import argparse
import gc
import time
from itertools import combinations

import torch

from qlora_lightning.evaluation.mmlu.questions import Exam
from qlora_lightning.evaluation.mmlu.scores import Score
from qlora_lightning.evaluation.mmlu.scoring import Answers, MMLUTest, context_length
from qlora_lightning.modeling.positions import positions_of
from qlora_lightning.modeling.trained import load_trained

GIB = 2**30


def percent(score: Score) -> str:
    """With its interval."""
    low, high = score.interval
    return f"{score.accuracy:.2%} [{low:.2%}, {high:.2%}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base")
    parser.add_argument("folder")
    parser.add_argument("--storages", nargs="+", default=["nf4-dq"])
    parser.add_argument("--share", nargs="+", choices=["true", "false"], default=["true"])
    parser.add_argument("--style", default="paper")
    parser.add_argument("--shots", type=int, default=5)
    parser.add_argument("--subjects", nargs="+")
    parser.add_argument("--limit", type=int)
    parser.add_argument("--batch-tokens", type=int, nargs="+", default=[4096])
    arguments = parser.parse_args()
    exam = Exam(arguments.folder, shots=arguments.shots, limit=arguments.limit, subjects=arguments.subjects)
    questions, found = exam.read(), dict[str, Answers]()
    print("| storage | examples shared | tokens a batch | seconds | questions/s | peak GiB | mean over subjects | over questions |")
    print("|---|---|---|---|---|---|---|---|", flush=True)
    for storage in arguments.storages:
        trained = load_trained(None, arguments.base, storage)
        began = time.perf_counter()
        test = MMLUTest(questions, trained.tokenizer, arguments.style, context_length(positions_of(trained.model.config), None))
        tokens, encoding = sum(len(prompt.ids) for prompt in test.prompts), time.perf_counter() - began
        for size in arguments.batch_tokens:
            for share in arguments.share:
                if trained.device.type == "cuda":
                    torch.cuda.reset_peak_memory_stats()
                began = time.perf_counter()
                with trained.computing():
                    answers = test.answers(trained.model, batch_tokens=size, share=share == "true")
                seconds, scores = time.perf_counter() - began, test.scores(answers)
                peak = torch.cuda.max_memory_allocated() / GIB if trained.device.type == "cuda" else 0.0
                print(
                    f"| {storage} | {answers.shared} | {size:,} | {seconds:.1f} | {len(questions) / seconds:.0f} | {peak:.2f} "
                    f"| {percent(scores.macro)} | {percent(scores.micro)} |",
                    flush=True,
                )
                found[f"{storage}, examples shared: {answers.shared}, {size} tokens a batch"] = answers
        print(f"{len(questions):,} prompts of {tokens:,} tokens, encoded in {encoding:.1f} s; {scores.shortened} lost examples", flush=True)
        del trained
        gc.collect()
    for (one, first), (other, second) in combinations(found.items(), 2):
        same = int((first.choices == second.choices).sum())
        print(f"{one} against {other}: {same:,} of {len(questions):,} questions answered alike", flush=True)


if __name__ == "__main__":
    main()
