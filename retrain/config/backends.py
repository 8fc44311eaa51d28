"""The `[backend]` section: where the model is trained, and on what."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from retrain.config.fields import Devices
from retrain.config.section import Section


class BackendConfig(Section):
    """Where the model is trained."""

    backend: Literal["local", "tinker"] = Field(
        default="local", description="Training backend: `local` (PyTorch and PEFT) or `tinker` (remote service)."
    )
    devices: Devices = Field(
        default="gpu:0",
        description="A device, `cpu`, `mps` or `gpu:N`, or two with a comma: inference then runs on the first, in a "
        "process of its own, and training on the last. Without a GPU, `gpu:0` runs on the CPU and says so.",
    )
    sharding: Literal["none", "fsdp"] = Field(
        default="none",
        description="Where several processes train: each holds the whole base model (`none`), or its layers are "
        "sharded over them (`fsdp`), for a base that does not fit on one device.",
    )
    adapter_path: str = Field(
        default="/tmp/retrain_adapter",
        min_length=1,
        description="Folder where the adapter is published for external engines, one sub-folder per policy version.",
    )

    service: Literal["tinker", "skyrl"] = Field(
        default="tinker",
        description="Whose service is at `model.base_url`: Thinking Machines' `tinker`, or a server of `skyrl` (its "
        "JAX backend), which reduces the loss in another way and does not clip gradients. Backend `tinker` only.",
    )
    max_concurrent: int = Field(
        default=64, ge=1, description="Most sampling requests under way at the service, each for one group."
    )
    patience_s: float = Field(
        default=60.0,
        gt=0,
        le=300,
        description="Seconds without a usable answer of the service until the run saves its state and stops.",
    )
    state_ttl_s: int = Field(
        default=86400,
        ge=0,
        description="Seconds for which the service keeps the full state of each step, so that a run that loses it goes "
        "on from its last step. 0 = only the checkpoints of `training.save_every` are kept there.",
    )

    @property
    def samples_on(self) -> str:
        """The device of the in-process engine."""
        return self.devices.split(",")[0]

    @property
    def trains_on(self) -> str:
        return self.devices.split(",")[-1]

    @property
    def is_split(self) -> bool:
        """Whether sampling has a device, and a process, of its own."""
        return "," in self.devices
