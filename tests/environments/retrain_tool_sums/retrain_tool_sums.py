"""A multi-turn environment with a tool: an adding machine that reads what the model wrote, and says the sum.

The model's last word counts. `fault` makes some episodes go wrong, for tests of what then happens to the others.
"""

import asyncio
import re
import time

import verifiers as vf
from datasets import Dataset

BOX = re.compile(r"\\boxed\{(\d+)\}")


def add(a: int, b: int) -> int:
    """Add two numbers."""
    return a + b


def right(completion, answer, fault=""):
    if fault == "reward":
        raise ValueError("the judge is ill")
    boxes = BOX.findall(completion[-1]["content"])
    return float(bool(boxes) and boxes[-1] == answer)


class ToolSums(vf.MultiTurnEnv):
    async def env_response(self, messages, state, **kwargs):
        fault = state["info"]["fault"]
        if fault == "raise":
            raise KeyError("broken")
        if fault == "hang":
            await asyncio.sleep(3600)
        if fault == "block":
            time.sleep(20)
        if fault == "rewrite":
            messages[0]["content"] = "something else"
        a, b = state["info"]["a"], state["info"]["b"]
        return [{"role": "user", "content": f"The machine says {add(a, b)} \u2713. Write it in a box."}]


def load_environment(examples=200, fault="", every=1, turns=2):
    def row(n):
        a, b = 10 + n * 7 % 90, 10 + n * 13 % 90
        info = {"a": a, "b": b, "fault": fault if n % every == 0 else ""}
        return {"question": f"What is {a} + {b}?", "answer": str(a + b), "info": info}

    async def reward(completion, answer, info):
        return right(completion, answer, info["fault"])

    return ToolSums(
        dataset=Dataset.from_list([row(n) for n in range(examples)]),
        rubric=vf.Rubric(funcs=[reward]),
        max_turns=turns,
    )
