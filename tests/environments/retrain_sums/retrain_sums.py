"""A single-turn environment: two-digit sums, right where the boxed number is."""

import re

import verifiers as vf
from datasets import Dataset

BOX = re.compile(r"\\boxed\{(\d+)\}")


def rows(first, count):
    pairs = [(10 + n * 7 % 90, 10 + n * 13 % 90) for n in range(first, first + count)]
    return Dataset.from_list([{"question": f"What is {a} + {b}?", "answer": str(a + b)} for a, b in pairs])


def right(completion, answer):
    boxes = BOX.findall(completion[-1]["content"])
    return float(bool(boxes) and boxes[-1] == answer)


def shortest(completions) -> list[float]:
    """Of a group, the shortest answer is the best one."""
    lengths = [len(completion[-1]["content"]) for completion in completions]
    if not min(lengths):
        raise ValueError("nothing was said")
    return [float(length == min(lengths)) for length in lengths]


def load_environment(examples=200, held_out=20, split="both", compares=False):
    """split: "eval" for an environment without a training set. compares: the reward is of a group as a whole."""
    return vf.SingleTurnEnv(
        dataset=rows(0, examples) if split == "both" else None,
        eval_dataset=rows(examples, held_out),
        rubric=vf.Rubric(funcs=[shortest if compares else right]),
    )
