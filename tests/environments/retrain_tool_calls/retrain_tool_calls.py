"""A ToolEnv: the model calls `add`, and says the sum."""

import verifiers as vf
from datasets import Dataset


def add(a: int, b: int) -> int:
    """Add two numbers.

    Args:
        a: one of them
        b: the other
    """
    return a + b


def right(completion, answer):
    return float(answer in (completion[-1].content or ""))


def load_environment(examples=4):
    rows = [{"question": f"What is {n} + 5?", "answer": str(n + 5)} for n in range(10, 10 + examples)]
    return vf.ToolEnv(dataset=Dataset.from_list(rows), tools=[add], rubric=vf.Rubric(funcs=[right]), max_turns=4)
