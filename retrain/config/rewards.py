"""The keys of a reward: `[reward]`, and each of `[[reward.parts]]`. See `sections.py`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from retrain.config.fields import PartName, from_array
from retrain.config.section import Section


class RewardKeys(Section):
    """What one reward needs: `[reward]` has it, and so has each of `[[reward.parts]]`."""

    type: Literal["match", "math", "judge", "custom"] = Field(
        default="match",
        description="`match` compares the last \\boxed{} with the reference, `math` compares symbolically, `judge` "
        "asks a model, `custom` calls a function.",
    )
    judge_model: str = Field(default="", description="Model of the judge, as in `gpt-4o-mini`.")
    judge_url: str = Field(
        default="",
        description="URL of the judge's OpenAI-compatible API. Empty = `OPENAI_BASE_URL` of the environment, else "
        "`https://api.openai.com/v1`. The key is `OPENAI_API_KEY` of the environment, never in a config.",
    )
    judge_rubric: str = Field(
        default="", description="What the judge looks at, in words. Empty = whether the final answer is the reference."
    )
    judge_verdict: Literal["correct", "score"] = Field(
        default="correct", description="What the judge gives: right or wrong (1 or 0), or a score from 0 to 1."
    )
    judge_concurrency: int = Field(default=32, ge=1, description="Most requests to the judge at a time.")
    judge_timeout_s: float = Field(default=60.0, gt=0, description="Seconds until a request to the judge is given up.")
    judge_retries: int = Field(
        default=5, ge=0, description="Further attempts after a request to the judge that failed or gave no verdict."
    )
    custom_module: str = Field(default="", description="Module of the custom reward.")
    custom_function: str = Field(
        default="score", min_length=1, description="Function of the custom reward: score(response, reference) -> float."
    )
    timeout_s: float = Field(
        default=10.0,
        gt=0,
        description="Seconds that one comparison of `math` or one call of `custom` may take; more is an error.",
    )


class RewardPart(RewardKeys):
    """One of several rewards that are added."""

    name: PartName = Field(default="", description="Name in metrics, `reward_NAME`. Empty = its `type`.")
    weight: float = Field(default=1.0, description="Weight in the sum. 0 = only logged.")

    @property
    def label(self) -> str:
        """The name in metrics."""
        return self.name or self.type


class RewardConfig(RewardKeys):
    """How completions are judged."""

    max_error_rate: float = Field(
        default=0.5,
        ge=0,
        le=1,
        description="The run stops where more than this share of a step's rewards could not be computed. 1 = never.",
    )
    parts: Annotated[tuple[RewardPart, ...], from_array] = Field(
        default=(),
        description="Several rewards, as `[[reward.parts]]` tables: the reward is their weighted sum. Empty = the one "
        "reward of this section.",
    )
