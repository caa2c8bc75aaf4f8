"""Request and response models of image builds."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from rock.protocol.sandbox import SandboxConfig
from rock.protocol.wire import Inside, InvalidValue


class BuildRequest(Inside):
    """An image to build from a Dockerfile. The context follows as a tar.

    image_tag: its name. dockerfile: the text. target: the stage to build; None is the last one.
    build_args: for ARG instructions. labels: in addition to those of the Dockerfile.
    network: of RUN: "none" (the default, as for sandboxes), "nat" or "host".
    memory, cpus, pids: limits of each RUN. timeout: seconds that one RUN may take.
    use_cache: reuse steps of earlier builds. pull: of the images in FROM, as in SandboxConfig.
    registry_username, registry_password: for these; not stored. public_registries: see SandboxConfig.
    """

    image_tag: str = Field(min_length=1, max_length=400)
    dockerfile: str = Field(max_length=1 << 20)
    target: str | None = None
    build_args: dict[str, str] = Field(default_factory=dict)
    labels: dict[str, str] = Field(default_factory=dict)
    network: Literal["none", "nat", "host"] = "none"
    memory: str = "2g"
    cpus: float = Field(default=2.0, gt=0)
    pids: int = Field(default=4096, ge=16, le=1_000_000)
    timeout: float = Field(default=3600.0, gt=0, allow_inf_nan=False)
    use_cache: bool = True
    pull: Literal["missing", "always", "never"] = "missing"
    registry_username: str | None = None
    registry_password: str | None = Field(default=None, repr=False)
    public_registries: bool = False

    @field_validator("build_args")
    @classmethod
    def _build_args(cls, value: dict[str, str]) -> dict[str, str]:
        for name, text in value.items():
            if not name or "=" in name or "\0" in name + text:
                raise ValueError(f"{name[:60]!r} is no name of a variable, or its value has a NUL character")
        return value

    @model_validator(mode="after")
    def _of_sandboxes(self) -> Self:
        try:
            self.limits()
        except InvalidValue as error:
            raise ValueError(error.message) from None
        return self

    def limits(self, image: str = "scratch") -> SandboxConfig:
        """The sandbox config of a RUN: `image`, with the limits of this request."""
        return SandboxConfig(image=image, memory=self.memory, cpus=self.cpus, pids=self.pids, network=self.network)


class BuiltImage(BaseModel):
    """An image that was built. steps: instructions that make a layer or a setting; cached: number of layers reused from
    earlier builds; ran: number of RUN instructions that were executed."""

    model_config = ConfigDict(extra="ignore")

    name: str
    digest: str
    size: int
    layers: int
    steps: int
    cached: int
    ran: int
