"""The section ``model``: the frozen model, and the devices that hold it."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, model_validator

from fedvlm.errors import shown
from fedvlm.settings.method import Filled, Positive, Section

FORM = "none, auto, or a mapping such as {model.vision_model: 0, model.text_model: 1, lm_head: cpu}"


def _placed(given: object) -> object:
    """Refuses what is no map of devices."""
    if given in ("none", "auto"):
        return given
    if not isinstance(given, dict) or not given:
        raise ValueError(f"device_map is {FORM}")
    for name, place in given.items():
        number = type(place) is int and place >= 0
        if not isinstance(name, str) or not (number or place in ("cpu", "disk")):
            raise ValueError(
                f"device_map puts {shown(name)} on {shown(place)}; a place is the number of a GPU, "
                "cpu or disk"
            )
    return given


DeviceMap = Annotated[Literal["none", "auto"] | dict[str, int | str], BeforeValidator(_placed)]


class ModelConfig(Section):
    """The frozen vision-language model."""

    name: Filled = Field(
        "tiny", description="bundled 'tiny', a local folder, org/name or org/name@revision"
    )
    dtype: Literal["float32", "bfloat16", "float16", "float64"] = Field(
        "float32", description="type of the frozen weights; float64: for exact comparisons"
    )
    device: str = Field("auto", description="auto, cpu, cuda, cuda:1, mps")
    device_map: DeviceMap = Field(
        "none",
        description="auto: the layers over all GPUs of this process, then in the machine's memory; "
        "or a mapping of modules to GPU numbers, cpu, disk",
    )
    device_memory: Positive | None = Field(
        None,
        description="device_map=auto: most MiB of weights on a GPU; empty: three fifths of it",
    )
    shard: bool = Field(
        False,
        description="with torchrun: each process holds a share of the frozen weights, by FSDP2",
    )
    quantization: Literal["none", "8bit", "4bit"] = Field(
        "none",
        description="frozen weights quantized by bitsandbytes; 4bit: NF4, double quantization",
    )
    gradient_checkpointing: bool = Field(
        False, description="recompute activations in the backward pass: less memory, slower"
    )

    @model_validator(mode="after")
    def _the_weights_have_one_place(self) -> ModelConfig:
        wrong = []
        if self.device_memory is not None and self.device_map != "auto":
            wrong.append(
                f"device_memory={self.device_memory} has a meaning for device_map=auto only: leave "
                "it out, or set device_map=auto"
            )
        if self.device_map != "none" and self.device != "auto":
            wrong.append(f"device_map gives every layer a place: leave out device={self.device}")
        if self.device_map != "none" and self.quantization != "none":
            wrong.append(
                f"device_map with quantization={self.quantization} is not tested: leave one out"
            )
        if self.shard and self.device_map != "none":
            wrong.append(
                "shard is for several processes, and device_map for the devices of one: leave one "
                "of them out"
            )
        if self.shard and self.quantization != "none":
            wrong.append(
                f"shard with quantization={self.quantization} is not tested: leave one out"
            )
        if wrong:
            raise ValueError("; ".join(wrong))
        return self
